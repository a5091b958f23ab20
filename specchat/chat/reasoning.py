"""Parsers that split a model's text into thinking and answer during generation."""

from __future__ import annotations

from typing import Protocol

from specchat.records.chat import Part

Piece = tuple[Part, str]

_OPEN, _CLOSE = "<think>", "</think>"


class Parser(Protocol):
    """A parser that cuts a stream of text into pieces; an empty piece marks the start of a part."""

    @property
    def part(self) -> Part:
        """The part that the next character belongs to, as far as the parser knows."""

    def feed(self, text: str) -> list[Piece]:
        """Add `text` and return the pieces that are now certain."""

    def finish(self) -> list[Piece]:
        """Return the text that was held back, once the whole text is known."""


class PlainText:
    """A parser for models that do not think: all text is the answer."""

    part: Part = "answer"

    def feed(self, text: str) -> list[Piece]:
        """Return `text` unchanged."""
        return [("answer", text)]

    def finish(self) -> list[Piece]:
        """Return nothing; no text is held back."""
        return []


class ThinkTags:
    """A parser for thinking between <think> and </think>, for models whose tokenizer ships no parser.

    Only an opening tag at the very start counts. Tags elsewhere are text, because an answer may mention them.

    Args:
        opened: whether the prompt ends within the thinking.
        begun: whether the prompt ends within the answer.
    """

    def __init__(self, *, opened: bool = False, begun: bool = False) -> None:
        self._undecided = not opened and not begun
        self._held = ""
        self.part: Part = "reasoning" if opened else "answer"

    @classmethod
    def after(cls, prompt: str) -> ThinkTags:
        """Return a parser for the answer to a rendered prompt, which may end with an opening tag."""
        return cls(opened=prompt.rstrip().endswith("<think>"))

    def feed(self, text: str) -> list[Piece]:
        """Add `text` and return the certain pieces; text that may become a tag is held back."""
        self._held += text
        pieces: list[Piece] = []
        if self._undecided and not self._decide(pieces):
            return []
        if self.part == "reasoning":
            self._think(pieces)
        if self.part == "answer":
            pieces.append(("answer", self._held))
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        """Return the beginning of a tag that was never completed."""
        rest, self._held = self._held, ""
        return [(self.part, rest)]

    def _decide(self, pieces: list[Piece]) -> bool:
        """Return whether the text is long enough to know if it starts with a tag."""
        start = self._held.lstrip()
        if start.startswith(_OPEN):
            self.part, self._held = "reasoning", start[len(_OPEN) :]
            pieces.append(("reasoning", ""))
        elif _OPEN.startswith(start):
            return False
        self._undecided = False
        return True

    def _think(self, pieces: list[Piece]) -> None:
        thought, found, rest = self._held.partition(_CLOSE)
        if found:
            self.part, self._held = "answer", rest
        else:
            num_held = _overlap(thought, _CLOSE)
            self._held = thought[len(thought) - num_held :]
            thought = thought[: len(thought) - num_held]
        pieces.append(("reasoning", thought))


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


class Parts:
    """A parser's pieces without the white space that templates put around thinking.

    Text without thinking passes unchanged.

    Args:
        parser: splits the text into parts.
        continuing: whether the text continues an earlier one; its leading white space is then kept.
    """

    def __init__(self, parser: Parser, *, continuing: bool = False) -> None:
        self._parser = parser
        self._has_thought = parser.part == "reasoning"
        self._trims: Part | None = "reasoning" if self._has_thought and not continuing else None
        self._blanks = ""  # trailing white space of the thinking; emitted only if more thinking follows

    @property
    def part(self) -> Part:
        """Part that the next character belongs to."""
        return self._parser.part

    def feed(self, text: str) -> list[Piece]:
        """Add `text` and return the pieces that are now certain; none is empty."""
        return self._trimmed(self._parser.feed(text))

    def finish(self) -> list[Piece]:
        """Return the text that was held back, once the whole text is known."""
        return self._trimmed(self._parser.finish())

    def _trimmed(self, pieces: list[Piece]) -> list[Piece]:
        trimmed = ((part, self._thought(text) if part == "reasoning" else self._answer(text)) for part, text in pieces)
        return [(part, text) for part, text in trimmed if text]

    def _thought(self, text: str) -> str:
        if not self._has_thought:
            self._has_thought, self._trims = True, "reasoning"
        if self._trims == "reasoning":
            text = text.lstrip()
            if text:
                self._trims = None
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        return kept

    def _answer(self, text: str) -> str:
        if self._has_thought:
            self._has_thought, self._blanks, self._trims = False, "", "answer"
        if self._trims == "answer":
            text = text.lstrip()
            if text:
                self._trims = None
        return text
