"""An answer on the screen during generation: text, thinking, and a status line below them.

On a terminal, complete rows are written once; the changing end and the status line are redrawn in place. Pipes and
files get the text byte for byte. On terminals without cursor movement the text is appended.
"""

import os
import stat
import time
from collections.abc import Callable
from typing import TextIO

from specchat.ui.console import AnswerStream, Talk, is_same_file, wants_styles
from specchat.ui.live import LiveRegion, Row, can_redraw
from specchat.ui.markdown import MarkdownStream, PlainStream, TextStream, styled_row, tail_rows

# Maximum share of time spent on drawing, so that generation is not slowed down: a long draw delays the next draw.
_SHARE_OF_TIME = 0.02
_REDRAW_S = 0.05
_TICK_S = 0.25
_THINKING_ROWS = 6
_NEVER = float("inf")


class AnswerView:
    """The view of one answer.

    Args:
        out: stdout, for the text of the answer.
        talk: stderr, for everything else.
        raw: whether to show the text as it is, without rendering Markdown.
        folds_thinking: whether to show only the end of the thinking, and to remove it when it is finished.
        status: function that returns the status line for a width in columns.
        owns_text: whether this view shows the text. If false, it only shows the status line, and the caller writes
            to stdout through `elsewhere`.
    """

    def __init__(
        self,
        out: AnswerStream,
        talk: Talk,
        *,
        raw: bool,
        folds_thinking: bool,
        status: Callable[[int], str],
        owns_text: bool = True,
    ) -> None:
        self._out = out
        self._talk = talk
        self._folds_thinking = folds_thinking
        self._status = status
        self._draws_text = owns_text and can_redraw(out.stream)
        self._draws_talk = can_redraw(talk.stream) and not talk.quiet and (self._draws_text or not out.is_terminal)
        canvas = out.stream if self._draws_text else talk.stream if self._draws_talk else None
        self._region = None if canvas is None else LiveRegion(canvas)
        styled = wants_styles(out.stream)
        self._text: TextStream = MarkdownStream() if styled and not raw else PlainStream()
        self._dim = "dim" if wants_styles(talk.stream) else ""
        self._thoughts: PlainStream | None = None
        self._due_at = self._not_before = float("-inf")

    def next_draw_in_s(self) -> float:
        """Return the seconds until the next `draw` is due, if no new text arrives."""
        if self._region is None:
            return _TICK_S
        return min(max(self._due_at - time.monotonic(), 0.0), _TICK_S)

    def write(self, text: str) -> None:
        """Add the next piece of the answer."""
        if not text:
            return
        if self._draws_text:
            self._text.feed(text)
            self._due_at = min(self._due_at, self._not_before)
        else:
            self.elsewhere(lambda: self._out.write(text))

    def elsewhere(self, write: Callable[[], None]) -> None:
        """Call a function that writes to stdout directly."""
        if self._region is not None and not _is_file(self._out.stream):
            # The reader of the pipe may write to the same terminal and break the status line, so remove the line.
            self._region.clear()
            self._region = None
        write()

    def think(self, text: str) -> None:
        """Add the next piece of the thinking."""
        if self._region is None or not self._draws_talk:
            self._talk.write(text)
            return
        self._thoughts = self._thoughts or PlainStream(self._dim)
        self._thoughts.feed(text)
        self._due_at = min(self._due_at, self._not_before)

    def end_thinking(self, summary: str) -> None:
        """Fold or complete the thinking, then show its summary."""
        thoughts, self._thoughts = self._thoughts, None
        if self._region is not None:
            rows = [] if thoughts is None or self._folds_thinking else thoughts.finished(self._width(), last=True)
            self._region.update([], [row.shown for row in rows])
        self._talk.end_line()
        self._talk.say(summary, "dim")

    def interlude(self, say: Callable[[], None]) -> None:
        """Print something else after the text that is complete so far."""
        if self._region is not None:
            self._region.update([], [row.shown for row in self._text.finished(self._width())])
        elif self._out.is_terminal or is_same_file(self._out.stream, self._talk.stream):
            self._out.end_line()
        say()
        self._due_at = self._not_before

    def draw(self) -> None:
        """Draw new text and the status line, if a redraw is due."""
        now = time.monotonic()
        if self._region is None or now < self._due_at:
            return
        begin_s = time.thread_time()
        width = self._width()
        final = self._final(width)
        self._region.update(self._changing(width), final)
        pause_s = (time.thread_time() - begin_s) / _SHARE_OF_TIME
        self._not_before = now + max(_REDRAW_S, pause_s)
        self._due_at = now + max(_TICK_S, pause_s) if self._draws_talk else _NEVER

    def end(self) -> None:
        """Show the remaining text and remove the status line."""
        if self._region is not None:
            rows = self._text.finished(self._width(), last=True) if self._draws_text else []
            self._region.update([], [row.shown for row in rows])
        self._out.end_line()

    def _final(self, width: int) -> list[str]:
        rows = []
        if self._thoughts is not None and not self._folds_thinking:
            rows += self._thoughts.finished(width)
        rows += self._text.finished(width)
        return [row.shown for row in rows]

    def _changing(self, width: int) -> list[Row]:
        """Return the rows that may still change: the end of the thinking or the text, and the status line."""
        rows = []
        if self._thoughts is not None and self._folds_thinking:
            rows += tail_rows(self._thoughts.pending, width, _THINKING_ROWS, self._dim)
        elif self._thoughts is not None:
            rows += self._thoughts.unfinished(width)
        rows += self._text.unfinished(width)
        if self._draws_talk:
            rows.append(styled_row(self._status(width), self._dim))
        return rows

    def _width(self) -> int:
        assert self._region is not None
        return self._region.size()[0]


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False
