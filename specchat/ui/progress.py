"""Bytes on their way, for people: a download, a pack being written."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from specchat.ui.console import Talk
from specchat.units import format_bytes, format_rate

_REDRAW_S = 0.2
_RATE_AFTER_S = 1.0  # before that, a rate says more about caches than about the disk or the line


class Pace:
    """Says how far something is, how fast it goes and how long it will take.

    Args:
        what: what is happening, such as "downloading org/name".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start: tuple[float, int] | None = None

    def text(self, done: int, total: int) -> str:
        """As of now.

        Args:
            done: bytes so far.
            total: bytes altogether.
        """
        now = time.monotonic()
        self._start = self._start or (now, done)
        elapsed, moved = now - self._start[0], done - self._start[1]
        text = f"{self._what}: {format_bytes(done)} of {format_bytes(total)}"
        if elapsed < _RATE_AFTER_S or moved <= 0:
            return text
        rate = moved / elapsed
        return f"{text} · {format_rate(rate)} · {(total - done) / rate:.0f} s left"


class TalkReporter:
    """Reports at once, on stderr."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A line that is drawn over."""
        with ProgressLine(self._talk, what) as line:
            yield line.update

    def warn(self, text: str) -> None:
        """A line."""
        self._talk.warn(text)


class ProgressLine:
    """Shows a pace in place, on terminals that can; else says nothing.

    Args:
        talk: where to.
        what: what is happening.
    """

    def __init__(self, talk: Talk, what: str) -> None:
        self._talk = talk
        self._pace = Pace(what)
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def update(self, done: int, total: int) -> None:
        """Bytes so far, and bytes altogether."""
        now = time.monotonic()
        text = self._pace.text(done, total)
        if now - self._drawn_at < _REDRAW_S and done < total:
            return
        self._drawn_at = now
        self._talk.overwrite(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn_at > float("-inf"):
            self._talk.overwrite("")
