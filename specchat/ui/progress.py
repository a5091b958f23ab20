"""One line that follows bytes on their way: a download, a pack being written."""

import time
from types import TracebackType
from typing import Self

from specchat.ui.console import Talk
from specchat.units import format_bytes, format_rate

_REDRAW_S = 0.2
_RATE_AFTER_S = 1.0  # before that, a rate says more about caches than about the disk or the line


class ProgressLine:
    """Shows how far it is, how fast and how long it will take, in place, on terminals that can; else says nothing.

    Args:
        talk: where to.
        what: what is happening, such as "downloading org/name".
    """

    def __init__(self, talk: Talk, what: str) -> None:
        self._talk = talk
        self._what = what
        self._drawn_at = float("-inf")
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        return self

    def update(self, done: int, total: int) -> None:
        """Bytes so far, and bytes altogether."""
        now = time.monotonic()
        self._start = self._start or (now, done)
        if now - self._drawn_at < _REDRAW_S and done < total:
            return
        self._drawn_at = now
        line = f"{self._what}: {format_bytes(done)} of {format_bytes(total)}"
        self._talk.overwrite(line + self._pace(now, done, total))

    def _pace(self, now: float, done: int, total: int) -> str:
        assert self._start is not None
        elapsed, moved = now - self._start[0], done - self._start[1]
        if elapsed < _RATE_AFTER_S or moved <= 0:
            return ""
        rate = moved / elapsed
        return f" · {format_rate(rate)} · {(total - done) / rate:.0f} s left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn_at > float("-inf"):
            self._talk.overwrite("")
