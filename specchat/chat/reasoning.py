"""Which part of a model's text is thinking and which is the answer, while the text is still coming."""

from __future__ import annotations

from typing import Protocol

from specchat.records.chat import Part

Piece = tuple[Part, str]

_OPEN, _CLOSE = "<think>", "</think>"


class Parser(Protocol):
    """Cuts a stream of text into pieces; an empty piece says that a part begins."""

    @property
    def part(self) -> Part:
        """The part that the next character belongs to, as far as is known."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the text."""


class PlainText:
    """No thinking: everything is the answer."""

    part: Part = "answer"

    def feed(self, text: str) -> list[Piece]:
        """`text`, as it is."""
        return [("answer", text)]

    def finish(self) -> list[Piece]:
        """Nothing."""
        return []


class ThinkTags:
    """Thinking between <think> and </think> at the very start, for models whose tokenizer ships no parser.

    Tags elsewhere are text: an answer may speak of them.

    Args:
        opened: the prompt ends within the thinking.
        begun: the prompt ends within the answer.
    """

    def __init__(self, *, opened: bool = False, begun: bool = False) -> None:
        self._undecided = not opened and not begun
        self._held = ""
        self.part: Part = "reasoning" if opened else "answer"

    def feed(self, text: str) -> list[Piece]:
        """Holds back what may become a tag."""
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
        """The beginning of a tag that did not come to its end."""
        rest, self._held = self._held, ""
        return [(self.part, rest)]

    def _decide(self, pieces: list[Piece]) -> bool:
        """Whether it is known by now if the text starts with a tag."""
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
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


class Parts:
    """A parser's pieces without the blank space that templates put around thinking.

    Text that comes without any thinking is passed on as it is.

    Args:
        parser: finds the parts.
        continuing: the text goes on where an earlier one was cut off, so that its own first blanks count.
    """

    def __init__(self, parser: Parser, *, continuing: bool = False) -> None:
        self._parser = parser
        self._has_thought = parser.part == "reasoning"
        self._trims: Part | None = "reasoning" if self._has_thought and not continuing else None
        self._blanks = ""  # at the end of the thinking so far; only kept if more of it comes

    @property
    def part(self) -> Part:
        """The part that the next character belongs to."""
        return self._parser.part

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`, none of them empty."""
        return self._trimmed(self._parser.feed(text))

    def finish(self) -> list[Piece]:
        """The rest."""
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
