"""Seats of an engine: the tokens whose rows each seat keeps, and the seat that a prompt gets."""

from __future__ import annotations

from collections.abc import Sequence, Set

from specchat.engine.model import TreeModel
from specchat.engine.tree import common_prefix


class Seats:
    """The committed tokens of every seat of a target's KV cache.

    Args:
        num: number of seats.
        target: model whose cache has the seats.
    """

    def __init__(self, num: int, target: TreeModel) -> None:
        self._target = target
        # For each seat, the tokens whose rows are in the target's KV cache.
        self._held: list[list[int]] = [[] for _ in range(num)]
        self._by_use = list(range(num))  # the seat that was used least recently comes first

    @property
    def longest(self) -> int:
        """Most tokens that a seat keeps."""
        return max(map(len, self._held))

    def take(self, free: Set[int], tokens: Sequence[int]) -> int:
        """Return the free seat that suits a prompt best, which counts as used from now on."""
        seat = choose_seat([each for each in self._by_use if each in free], self._held, tokens)
        self._by_use.remove(seat)
        self._by_use.append(seat)
        return seat

    def reuse(self, seat: int, tokens: Sequence[int]) -> int:
        """Keep the rows that a prompt shares with a seat, and return their number.

        The prompt's last token is always computed again: its hidden state is not kept. Recurrent layers can only
        return to restore points. One is saved at the end of the last answer if the prompt continues it.
        """
        held = self._held[seat]
        shared = min(common_prefix(held, tokens), len(tokens) - 1)
        if shared == len(held):
            self._target.cache.save(seat)
        self.truncate(seat, shared)
        return len(held)

    def truncate(self, seat: int, length: int) -> None:
        """Drop a seat's tokens beyond `length`, and uncommitted rows of a failed pass."""
        held = self._held[seat]
        del held[self._target.cache.truncate(seat, min(length, len(held))) :]

    def commit(self, seat: int, tokens: list[int]) -> None:
        """Record the tokens whose rows the seat keeps after a pass."""
        self._held[seat] = tokens

    def forget(self) -> None:
        """Empty all seats."""
        for seat in range(len(self._held)):
            self.truncate(seat, 0)
        self._by_use.sort()


def choose_seat(seats: Sequence[int], held: Sequence[Sequence[int]], tokens: Sequence[int]) -> int:
    """Return the seat for a prompt: the one whose text it goes on with, else the one that waited longest.

    A prompt that keeps less than half of a seat's rows belongs to another text, unless the seat holds all of it. The
    seat's text may be continued later.

    Args:
        seats: free seats, the one that was used least recently first.
        held: tokens whose rows each seat keeps.
        tokens: tokens of the prompt.
    """
    prompt = list(tokens)
    shared = {seat: common_prefix(held[seat], prompt) for seat in seats}
    continued = [seat for seat in seats if held[seat] and 2 * shared[seat] >= min(len(held[seat]), 2 * len(prompt))]
    return max(continued, key=shared.__getitem__) if continued else seats[0]
