"""The end of a terminal's text that is still changing: a few rows that are drawn over until they are final.

Rich's own live display redraws everything at every change, from a thread, and loses count when rows scroll away. Here
only rows that changed are written, by whoever calls, and what is final is written once and never touched again.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TextIO

from rich.cells import cell_len

# Rows are cut off at the margin and not wrapped, whatever width a terminal gives to rare characters: each takes one
# line, so that going back over them arrives where they began.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_ERASE_BELOW = "\x1b[J"
# Terminals that can show a frame at once do so between these two; others ignore them.
_FRAME, _FRAME_END = "\x1b[?2026h", "\x1b[?2026l"

# Set by terminals that wrap what they show anew when they become narrower; xterm and the Linux console do not.
_SIGNS_OF_REFLOW = ("VTE_VERSION", "KITTY_WINDOW_ID", "KONSOLE_VERSION", "WEZTERM_PANE", "WT_SESSION", "TMUX")
_PROGRAMS_THAT_REFLOW = {"iTerm.app", "Apple_Terminal", "vscode", "ghostty", "WezTerm"}


def can_redraw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which the cursor can go back up."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def reflows(environment: Mapping[str, str]) -> bool:
    """Whether the terminal is known to wrap long rows anew when it is made narrower."""
    named = environment.get("TERM_PROGRAM") in _PROGRAMS_THAT_REFLOW
    return named or any(sign in environment for sign in _SIGNS_OF_REFLOW)


@dataclass(frozen=True)
class Row:
    """One line of the live part.

    Attributes:
        shown: with its styles, safe to write to a terminal.
        num_cells: columns it takes.
    """

    shown: str
    num_cells: int

    @classmethod
    def plain(cls, text: str) -> "Row":
        """Text without styles, already neutral."""
        return cls(text, cell_len(text))


class LiveRegion:
    """The rows at the end of the terminal's text that may still change. The cursor waits behind the last of them.

    Args:
        stream: a terminal that `can_redraw`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows: list[Row] = []
        self._width = 0
        self._reflows = reflows(os.environ)

    def size(self) -> tuple[int, int]:
        """Columns and rows now."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            size = shutil.get_terminal_size()
        return max(size.columns, 1), max(size.lines, 1)

    def update(self, rows: Sequence[Row], final: Sequence[str] = ()) -> None:
        """Puts `final` where the live rows began, for good, and `rows` below as the new live ones.

        Args:
            rows: what may change; those that would not fit on the screen are left out at the top.
            final: lines to keep, with styles and without line ends; longer ones wrap as the terminal likes.
        """
        width, height = self.size()
        rows = list(rows)[-(height - 1) :] if height > 1 else []
        kept = 0 if final or width != self._width else _num_equal(self._rows, rows)
        if final or kept < max(len(rows), len(self._rows)):
            self._write(self._back_to(kept, width) + "".join(f"{line}\n" for line in final) + _joined(rows, kept))
        self._rows, self._width = rows, width

    def clear(self) -> None:
        """Takes the live rows away."""
        self.update(())

    def _back_to(self, index: int, width: int) -> str:
        """Moves to the end of the live row before `index`, or to the start of the first, and erases what follows."""
        if not self._rows:
            return ""
        lines_below = sum(self._num_lines(row, width) for row in self._rows[max(index, 1) :])
        lines_up = lines_below + (self._num_lines(self._rows[0], width) - 1 if index == 0 else 0)
        up = f"\x1b[{lines_up}A" if lines_up else ""
        if index == 0:
            return f"\r{up}{_ERASE_BELOW}"
        column = self._rows[index - 1].num_cells
        return f"\r{up}" + (f"\x1b[{column}C" if column else "") + _ERASE_BELOW

    def _num_lines(self, row: Row, width: int) -> int:
        if not self._reflows or width >= self._width:
            return 1
        return max(-(-row.num_cells // width), 1)

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        framed = f"{_FRAME}{text}{_FRAME_END}"
        self._stream.write(framed.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _num_equal(a: Sequence[Row], b: Sequence[Row]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _joined(rows: Sequence[Row], kept: int) -> str:
    """What is to be written for the rows from `kept` on, from the end of the one before."""
    if kept >= len(rows):
        return ""
    line_ends = ["\n" if i else "" for i in range(kept, len(rows))]
    return _NO_WRAP + "".join(end + row.shown for end, row in zip(line_ends, rows[kept:], strict=True)) + _WRAP
