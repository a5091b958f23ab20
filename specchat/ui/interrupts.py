"""Ctrl-C: pressed once it stops the answer; pressed twice within two seconds it ends the program."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

_LEAVE_WITHIN_S = 2.0


class Interrupts:
    """The handler of Ctrl-C, which remembers the time of the last press."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def forget(self) -> None:
        """Count the next Ctrl-C as the first one, because the user has done something else since the last."""
        self._last = float("-inf")

    def note(self) -> None:
        """Record one Ctrl-C.

        Raises:
            KeyboardInterrupt: the previous Ctrl-C was less than two seconds ago.
        """
        now = time.monotonic()
        if now - self._last < _LEAVE_WITHIN_S:
            raise KeyboardInterrupt
        self._last = now

    @contextmanager
    def setting(self, cancel: Event) -> Iterator[None]:
        """Make Ctrl-C set `cancel` inside the context, instead of raising KeyboardInterrupt anywhere."""

        def on_interrupt(_signum: int, _frame: FrameType | None) -> None:
            self.note()
            cancel.set()

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
