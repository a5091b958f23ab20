"""Ctrl-C: once asks to stop, twice in quick succession leaves the program, whatever it is doing."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

_LEAVE_WITHIN_S = 2.0


class Interrupts:
    """Remembers when Ctrl-C was last pressed."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def note(self) -> None:
        """Counts one Ctrl-C.

        Raises:
            KeyboardInterrupt: the one before was less than two seconds ago.
        """
        now = time.monotonic()
        if now - self._last < _LEAVE_WITHIN_S:
            raise KeyboardInterrupt
        self._last = now

    @contextmanager
    def setting(self, cancel: Event) -> Iterator[None]:
        """While an answer is written, Ctrl-C asks it to stop instead of breaking off wherever the program is."""

        def on_interrupt(_signum: int, _frame: FrameType | None) -> None:
            self.note()
            cancel.set()

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
