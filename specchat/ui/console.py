"""The output streams: the answer goes to stdout, everything else to stderr. Styles go to terminals only."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.text import Text

from specchat.masking import masked


def wants_styles(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that supports escape sequences, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


# Bidirectional overrides and isolates, which can disguise a text, and separators that some terminals treat as line
# ends. The marks LRM and RLM, which right-to-left scripts need, do not reorder text and are kept.
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)


def _controls() -> dict[int, str | None]:
    """Return the translation table from characters that a terminal executes to visible signs."""
    table: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
    table |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")
    table |= {0x7F: "\N{SYMBOL FOR DELETE}", 0x0D: None}  # a carriage return could overwrite shown text
    table |= dict.fromkeys(_REORDERING, "\N{REPLACEMENT CHARACTER}")
    table |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")  # surrogates, which UTF-8 cannot encode
    del table[0x0A], table[0x09]
    return table


_CONTROLS = _controls()
_LONGEST_LINE = 1_000  # characters of an error; a longer one repeats a long name or value


def neutral(text: str) -> str:
    """Return `text` with control characters made visible.

    The result cannot move the cursor, set the window title or make the terminal answer queries.
    """
    return text.translate(_CONTROLS)


def is_same_file(one: TextIO, other: TextIO) -> bool:
    """Return whether two streams write to one file or terminal, as after `2>&1`."""
    try:
        return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))
    except (OSError, ValueError):  # a stream without a file, or a closed one
        return False


class AnswerStream:
    """Stdout: control characters are made visible on a terminal; other outputs get the exact bytes.

    Attributes:
        stream: underlying stream.
        is_terminal: whether the stream is a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._at_line_start = True

    def write(self, text: str) -> None:
        """Write `text` and flush."""
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
        """End the current line, so that the next output starts on a new one."""
        if not self._at_line_start:
            self.write("\n")


class Talk:
    """Stderr: everything except the answer.

    Attributes:
        stream: underlying stream.
        quiet: whether notices and warnings are silenced.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream = stream
        self.quiet = quiet
        self._at_line_start = True
        self._is_terminal = stream.isatty()
        self.console = _console(stream, soft_wrap=not self._is_terminal)  # lines in a log are not wrapped

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None off a terminal, where lines are not broken."""
        return self.console.width if self._is_terminal else None

    def say(self, text: str, style: str = "") -> None:
        """Print a notice, unless --quiet is set."""
        if not self.quiet:
            self.console.print(Text(neutral(text), style))

    def say_styled(self, text: Text) -> None:
        """Print a styled notice without control characters, unless --quiet is set."""
        if not self.quiet:
            self.console.print(text)

    def write(self, text: str) -> None:
        """Print the next piece of a streamed text, unless --quiet is set."""
        if text and not self.quiet:
            self.console.print(Text(neutral(text), "dim"), end="", soft_wrap=True)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """End the current line, so that the next output starts on a new one."""
        if not self._at_line_start:
            self.write("\n")

    def tell(self, text: str) -> None:
        """Print the output of a command, even if --quiet is set."""
        self.console.print(Text(neutral(text)))

    def overwrite(self, text: str) -> None:
        """Print a line that the next call replaces; only on terminals, unless --quiet is set."""
        if not self.quiet and self.console.is_terminal:
            width = max(self.console.width - 1, 1)
            self.console.file.write(f"\r\x1b[K{neutral(text)[:width]}")
            self.console.file.flush()

    def ring(self) -> None:
        """Ring the terminal's bell."""
        if self._is_terminal:
            self.stream.write("\a")
            self.stream.flush()

    def warn(self, text: str) -> None:
        """Print a warning, unless --quiet is set."""
        if not self.quiet:
            self._labelled("warning", "yellow", text)

    def error(self, message: str, hint: str | None) -> None:
        """Print an error and its hint, even if --quiet is set."""
        self._labelled("error", "bold red", message)
        if hint:
            self._labelled("hint", "cyan", hint)

    def _labelled(self, label: str, style: str, text: str) -> None:
        line = neutral(" ".join(masked(text).split("\n")))
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 4 :]}"
        self.console.print(Text.assemble((f"{label}: ", style), line))


def columns(stream: TextIO, off_terminal: int = 100) -> int:
    """Return the width for lines: the terminal's columns, or `off_terminal` elsewhere."""
    return Console(file=stream).width if stream.isatty() else off_terminal


def report_console(stream: TextIO, columns_off_terminal: int) -> Console:
    """Return a console for tables on stdout: styled on a terminal, plain text of a fixed width elsewhere."""
    return _console(stream, width=None if stream.isatty() else columns_off_terminal)


def _console(stream: TextIO, *, soft_wrap: bool = False, width: int | None = None) -> Console:
    """Return a console that prints text verbatim, with colours only if the stream accepts them."""
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
    """Return an `AnswerStream` on the current stdout."""
    return AnswerStream(sys.stdout)


def talk(*, quiet: bool = False) -> Talk:
    """Return a `Talk` on the current stderr."""
    return Talk(sys.stderr, quiet=quiet)


@contextmanager
def typing_ahead(stream: TextIO) -> Iterator[None]:
    """Keep keys typed between two prompts off the screen, and leave them unchanged for the next prompt.

    Otherwise the terminal would echo them into the answer and turn Enter into a line break.
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
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(fd, termios.TCSANOW, before)
