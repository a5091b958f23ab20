"""The live region: the last rows of a terminal's text, redrawn in place until they are final.

Rich's live display redraws everything on each change, from a thread, and miscounts when rows scroll off the screen.
Here only changed rows are written, in the caller's thread. Final rows are written once and never touched again.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TextIO

from rich.cells import cell_len

# Rows are cut off at the margin instead of wrapped, so each takes exactly one line, even if the terminal's width of a
# rare character differs from ours. Moving the cursor up then always reaches the first row.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_ERASE_BELOW = "\x1b[J"
# Synchronized output: terminals that support it show everything between these two at once; others ignore them.
_FRAME, _FRAME_END = "\x1b[?2026h", "\x1b[?2026l"

# Variables set by terminals that re-wrap shown text when they become narrower; xterm and the Linux console do not.
_SIGNS_OF_REFLOW = ("VTE_VERSION", "KITTY_WINDOW_ID", "KONSOLE_VERSION", "WEZTERM_PANE", "WT_SESSION", "TMUX")
_PROGRAMS_THAT_REFLOW = {"iTerm.app", "Apple_Terminal", "vscode", "ghostty", "WezTerm"}


def can_redraw(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that can move the cursor up."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def reflows(environment: Mapping[str, str]) -> bool:
    """Return whether the terminal is known to re-wrap long rows when it becomes narrower."""
    named = environment.get("TERM_PROGRAM") in _PROGRAMS_THAT_REFLOW
    return named or any(sign in environment for sign in _SIGNS_OF_REFLOW)


@dataclass(frozen=True)
class Row:
    """One row of the live region.

    Attributes:
        shown: styled text, safe to write to a terminal.
        num_cells: width in columns.
    """

    shown: str
    num_cells: int

    @classmethod
    def plain(cls, text: str) -> "Row":
        """Return a row of unstyled text without control characters."""
        return cls(text, cell_len(text))


class LiveRegion:
    """The last rows of the terminal's text, which may still change. The cursor stays behind the last row.

    Args:
        stream: terminal for which `can_redraw` is true.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows: list[Row] = []
        self._width = 0
        self._reflows = reflows(os.environ)

    def size(self) -> tuple[int, int]:
        """Return the current columns and rows of the terminal."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            size = shutil.get_terminal_size()
        return max(size.columns, 1), max(size.lines, 1)

    def update(self, rows: Sequence[Row], final: Sequence[str] = ()) -> None:
        """Write `final` permanently at the start of the live region, and `rows` below as the new live rows.

        Args:
            rows: new live rows; rows that do not fit on the screen are omitted at the top.
            final: permanent lines, styled, without line ends; the terminal wraps long ones.
        """
        width, height = self.size()
        rows = list(rows)[-(height - 1) :] if height > 1 else []
        kept = 0 if final or width != self._width else _num_equal(self._rows, rows)
        if final or kept < max(len(rows), len(self._rows)):
            self._write(self._back_to(kept, width) + "".join(f"{line}\n" for line in final) + _joined(rows, kept))
        self._rows, self._width = rows, width

    def clear(self) -> None:
        """Erase the live rows."""
        self.update(())

    def _back_to(self, index: int, width: int) -> str:
        """Return the sequence that erases all live rows from `index` on.

        The cursor ends behind the row before `index`, or at the start of the first row.
        """
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
    """Return the text to write for the rows from `kept` on; the cursor is behind the row before."""
    if kept >= len(rows):
        return ""
    line_ends = ["\n" if i else "" for i in range(kept, len(rows))]
    return _NO_WRAP + "".join(end + row.shown for end, row in zip(line_ends, rows[kept:], strict=True)) + _WRAP
