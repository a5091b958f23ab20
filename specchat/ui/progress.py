"""Progress of byte transfers, such as a download or writing a pack."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from specchat.ui.console import Talk
from specchat.units import format_bytes, format_rate

_REDRAW_S = 0.2
_RATE_AFTER_S = 1.0  # until then, caches determine the rate, not the disk or the network


class Pace:
    """The progress text of a transfer: bytes done, rate, remaining time.

    Args:
        what: description of the transfer, such as "downloading org/name".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start: tuple[float, int] | None = None

    def text(self, done: int, total: int) -> str:
        """Return the progress text.

        Args:
            done: bytes transferred so far.
            total: bytes of the whole transfer.
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
    """A reporter that prints to stderr immediately."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a progress line that is redrawn in place."""
        with ProgressLine(self._talk, what) as line:
            yield line.update

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._talk.warn(text)


class ProgressLine:
    """A progress line that is redrawn in place on terminals, and silent elsewhere.

    Args:
        talk: stderr.
        what: description of the transfer.
    """

    def __init__(self, talk: Talk, what: str) -> None:
        self._talk = talk
        self._pace = Pace(what)
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def update(self, done: int, total: int) -> None:
        """Show the bytes done and the total bytes."""
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
