"""Incremental detokenizing and detection of stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer

# Decoders emit this character for bytes that do not form a character, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """An incremental detokenizer that emits a character only when all its bytes are known.

    Args:
        tokenizer: tokenizer of the target.
        skip_special_tokens: whether to leave special tokens out of the text; parsers of answers need to see them.
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
        """Return the text that `token_id` completes; empty for partial characters and skipped special tokens."""
        self._token_ids.append(token_id)
        try:
            delta = self._stream.step(token_id)
        except _WindowLostError:
            # The decoder changed text that was already shown, for example because a run of bytes became invalid. Keep
            # the shown text, and decode the later tokens separately.
            self._stream = _WindowStream(self._decode)
            delta = "".join(self._stream.step(pending) for pending in self._token_ids[self._num_shown_ids :])
        if delta:
            self._num_shown_ids = len(self._token_ids)
            self._shown.append(delta)
        return delta

    def flush(self, *, complete: bool) -> str:
        """Return the text that is still held back at the end of an answer.

        Args:
            complete: whether the answer ended by itself; a truncated answer ends at its last whole character.
        """
        shown = "".join(self._shown)
        full = self._decode(self._token_ids)
        is_prefix = full.startswith(shown)
        rest = full[len(shown) :] if is_prefix else self._decode(self._token_ids[self._num_shown_ids :])
        return rest if complete else rest.rstrip(_REPLACEMENT)


class _WindowLostError(Exception):
    """The text of the tokens no longer starts with the text that was shown."""


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
    """An incremental decoder for tokenizers written in Python; each step decodes a short window of tokens.

    The window starts with tokens that were shown already, because a token's text can depend on the token before it
    (for example, the space at the start of a word).
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
    """A filter that passes text up to the first stop string and holds back text that may become one.

    The stop string that is completed first wins. If several are completed at the same character, the one that began
    first wins. So the cut does not depend on how the text is split into deltas.

    Attributes:
        matched: stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, delta: str) -> str:
        """Add `delta` and return the text that can be shown now; empty once a stop string was found."""
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
        """Return the text that was held back, once the answer has ended without a stop string."""
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
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
