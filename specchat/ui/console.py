"""Where words go: the answer to stdout, talk to stderr, and nothing but text to anything that is not a terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.text import Text


def wants_styles(stream: TextIO) -> bool:
    """Whether escape sequences may be written to `stream`: a terminal that can show them, and nobody said no."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


# Overrides and isolates of writing direction, which make a text read as another one, and separators that some terminals
# take for line ends. The marks that right-to-left scripts do need (LRM, RLM) only hint and stay.
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)


def _controls() -> dict[int, str | None]:
    """What a terminal would obey instead of show, and the sign to show for it."""
    table: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
    table |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")
    table |= {0x7F: "\N{SYMBOL FOR DELETE}", 0x0D: None}  # a carriage return could write over what stands there
    table |= dict.fromkeys(_REORDERING, "\N{REPLACEMENT CHARACTER}")
    table |= dict.fromkeys(
        range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"
    )  # halves of characters, which UTF-8 has not
    del table[0x0A], table[0x09]
    return table


_CONTROLS = _controls()


def neutral(text: str) -> str:
    """`text` with control characters made visible, so that it cannot move the cursor, set titles or answer queries."""
    return text.translate(_CONTROLS)


class AnswerStream:
    """stdout: shown safely on a terminal, byte for byte as it is anywhere else.

    Attributes:
        stream: where it all goes.
        is_terminal: whether somebody looks at it directly.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._at_line_start = True

    def write(self, text: str) -> None:
        """Shows `text` at once."""
        if not text:
            return
        if self.is_terminal:
            text = neutral(text)
            encoding = self.stream.encoding or "utf-8"
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        else:
            self.stream.flush()
            self.stream.buffer.write(text.encode())
            self.stream.buffer.flush()
        self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Makes sure that what comes next starts on a line of its own."""
        if not self._at_line_start:
            self.write("\n")


class Talk:
    """stderr: everything that is not the answer.

    Attributes:
        stream: where it all goes.
        quiet: whether notices are wanted at all.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream = stream
        self.quiet = quiet
        self._at_line_start = True
        self._is_terminal = stream.isatty()
        self.console = _console(stream, soft_wrap=not self._is_terminal)  # a log gets its lines whole

    def say(self, text: str, style: str = "") -> None:
        """One notice; --quiet silences it."""
        if not self.quiet:
            self.console.print(Text(neutral(text), style))

    def say_styled(self, text: Text) -> None:
        """One notice that has styles of its own and nothing in it that a terminal would obey."""
        if not self.quiet:
            self.console.print(text)

    def write(self, text: str) -> None:
        """The next piece of a text that comes in pieces; --quiet silences it."""
        if text and not self.quiet:
            self.console.print(Text(neutral(text), "dim"), end="", soft_wrap=True)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Makes sure that what comes next starts on a line of its own."""
        if not self._at_line_start:
            self.write("\n")

    def tell(self, text: str) -> None:
        """The answer to a command; always shown."""
        self.console.print(Text(neutral(text)))

    def overwrite(self, text: str) -> None:
        """A line that the next one takes the place of; only on terminals that can go back."""
        if not self.quiet and self.console.is_terminal:
            width = max(self.console.width - 1, 1)
            self.console.file.write(f"\r\x1b[K{neutral(text)[:width]}")
            self.console.file.flush()

    def warn(self, text: str) -> None:
        """Something that will not go as asked; --quiet silences it."""
        if not self.quiet:
            self._labelled("warning", "yellow", text)

    def error(self, message: str, hint: str | None) -> None:
        """What went wrong, and what to do about it; always shown."""
        self._labelled("error", "bold red", message)
        if hint:
            self._labelled("hint", "cyan", hint)

    def _labelled(self, label: str, style: str, text: str) -> None:
        self.console.print(Text.assemble((f"{label}: ", style), neutral(" ".join(text.split("\n")))))


def columns(stream: TextIO, off_terminal: int = 100) -> int:
    """How wide lines may be: the terminal's width, or what is easy to read elsewhere."""
    return Console(file=stream).width if stream.isatty() else off_terminal


def report_console(stream: TextIO, columns_off_terminal: int) -> Console:
    """For tables on stdout: drawn on a terminal, plain text of a fixed width elsewhere."""
    return _console(stream, width=None if stream.isatty() else columns_off_terminal)


def _console(stream: TextIO, *, soft_wrap: bool = False, width: int | None = None) -> Console:
    """Text as it is, in colours only where they are wanted."""
    styled = wants_styles(stream)
    return Console(
        file=stream,
        force_terminal=styled,
        color_system="auto" if styled else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=soft_wrap,
        width=width,
    )


def answer_stream() -> AnswerStream:
    """Stdout as it is now."""
    return AnswerStream(sys.stdout)


def talk(*, quiet: bool = False) -> Talk:
    """Stderr as it is now."""
    return Talk(sys.stderr, quiet=quiet)


@contextmanager
def typing_ahead(stream: TextIO) -> Iterator[None]:
    """Keeps what is typed between two prompts off the screen and as it was typed, for the next prompt to read.

    Without this a terminal would write it into the answer, and turn an Enter into a mere line break.
    """
    import termios

    try:
        fd = stream.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    ahead = [*before]
    ahead[0] &= ~termios.ICRNL
    ahead[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(fd, termios.TCSANOW, ahead)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
