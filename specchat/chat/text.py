"""From token ids to text while the tokens are still coming: detokenizing, and watching for stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer

# What decoders write for bytes that are no character (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text one by one; a character is shown when all its bytes are there, and not before.

    Args:
        tokenizer: whose ids these are.
        skip_special_tokens: leave them out of the text; parsers of answers need to see them.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._num_shown_ids = 0
        self._shown: list[str] = []
        self._stream: _RustStream | _WindowStream = (
            _WindowStream(self._decode)
            if tokenizer.backend is None
            else _RustStream(tokenizer.backend, skip_special_tokens=skip_special_tokens)
        )

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is in parts, and for special tokens."""
        self._token_ids.append(token_id)
        try:
            delta = self._stream.step(token_id)
        except _WindowLostError:
            # The decoder took back text it had given (byte runs turning invalid do that): what was shown stays, and
            # the tokens after it are decoded on their own.
            self._stream = _WindowStream(self._decode)
            delta = "".join(self._stream.step(pending) for pending in self._token_ids[self._num_shown_ids :])
        if delta:
            self._num_shown_ids = len(self._token_ids)
            self._shown.append(delta)
        return delta

    def flush(self, *, complete: bool) -> str:
        """The text still held back at the end of an answer.

        Args:
            complete: the answer ended by itself. One that was cut off ends at its last whole character instead.
        """
        shown = "".join(self._shown)
        full = self._decode(self._token_ids)
        is_prefix = full.startswith(shown)
        rest = full[len(shown) :] if is_prefix else self._decode(self._token_ids[self._num_shown_ids :])
        return rest if complete else rest.rstrip(_REPLACEMENT)


class _WindowLostError(Exception):
    """The text of the tokens so far no longer starts with what was shown of it."""


class _RustStream:
    """The incremental decoder of `tokenizers`."""

    def __init__(self, backend: Any, *, skip_special_tokens: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception as error:
            raise _WindowLostError from error


class _WindowStream:
    """The same for tokenizers written in Python: decodes a short window of tokens again for each new one.

    The window starts with tokens whose text was shown already, because what a token looks like can depend on the one
    before it (a space at the start of a word, say).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        self._pending.append(token_id)
        shown = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) or len(text) <= len(shown):
            return ""
        if not text.startswith(shown):
            raise _WindowLostError
        self._context, self._pending = self._pending, []
        return text[len(shown) :]


class StopStrings:
    """Lets text through up to the first stop string; what may become one is held back until that is decided.

    The stop string that is complete first wins; of several complete at the same character, the one that began first.
    So the cut does not depend on how the text is divided into deltas.

    Attributes:
        matched: the stop string that was found, or None so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, delta: str) -> str:
        """The part of the text so far that can be shown now; nothing any more once a stop string was found."""
        if self.matched is not None:
            return ""
        text = self._held + delta
        found = self._first_match(text)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return text[:start]
        num_held = self._num_undecided(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out to be ordinary text, at the end of an answer."""
        rest, self._held = self._held, ""
        return rest

    def _first_match(self, text: str) -> tuple[int, str] | None:
        starts = ((text.find(stop), stop) for stop in self._stops)
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
