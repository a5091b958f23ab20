"""An index of a text that finds where the last tokens of another text stood before."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

# Lengths of the repeats that are looked up, longest first.
_ORDERS = (4, 2, 1)
# Places that are compared for each length, latest first.
_MOST_PLACES = 12


class SuffixIndex:
    """A text that grows at its end and can be cut, with chains of the places of equal short runs of tokens.

    For each length of runs, a table holds the latest place behind each run, and an array the place before it, as in
    LZ77. So a token costs a few dozen bytes, and cutting the text undoes appending.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._latest: list[dict[int, int]] = [{} for _ in _ORDERS]
        self._earlier = [array("i") for _ in _ORDERS]

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        text = self.tokens
        for token in tokens:
            text.append(token)
            place = len(text)
            for order, latest, earlier in zip(_ORDERS, self._latest, self._earlier, strict=True):
                if place < order:
                    earlier.append(-1)
                    continue
                key = hash(tuple(text[place - order : place]))
                earlier.append(latest.get(key, -1))
                latest[key] = place

    def truncate(self, length: int) -> None:
        """Cut the text after its first `length` tokens."""
        text = self.tokens
        while len(text) > length:
            place = len(text)
            for order, latest, earlier in zip(_ORDERS, self._latest, self._earlier, strict=True):
                before = earlier.pop()
                if place >= order:
                    key = hash(tuple(text[place - order : place]))
                    if before < 0:
                        del latest[key]
                    else:
                        latest[key] = before
            text.pop()

    def matches(self, tail: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield places behind repeats of the last tokens of `tail`, and the lengths of the repeats.

        A place is the index of the token that follows a repeat. Shorter runs are looked up only if longer ones do not
        repeat.
        """
        for order, latest, earlier in zip(_ORDERS, self._latest, self._earlier, strict=True):
            if len(tail) < order:
                continue
            place = latest.get(hash(tuple(tail[-order:])), -1)
            found = 0
            for _ in range(_MOST_PLACES):
                if place < 0:
                    break
                if place < len(self.tokens) and (length := self._common(place, tail)) >= order:
                    yield place, length
                    found += 1
                place = earlier[place - 1]
            if found:
                return

    def _common(self, place: int, tail: Sequence[int]) -> int:
        """Return how many tokens before the place equal the end of the tail."""
        most = min(len(tail), place)
        text = self.tokens
        return next((count for count in range(most) if text[place - 1 - count] != tail[-1 - count]), most)
