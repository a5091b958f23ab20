"""Threads whose start either succeeds or raises, even when memory runs out.

`threading.Thread.start` waits until the new thread signals that it runs. If the thread's stack takes the last free
memory, its first call fails, it never signals, and `start` hangs forever (CPython issue 140746). Here a weak reference
detects the end of a thread: the interpreter releases the thread's function when the thread ends.
"""

import _thread
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from specchat.errors import AllocationError

_BEGUN = "begun"


class Thread:
    """A daemon thread: the process does not wait for the thread on exit.

    Args:
        run: function to run; must handle its own errors.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._events: SimpleQueue[object] = SimpleQueue()
        self._function_ref: weakref.ref[partial[None]] | None = None

    def start(self) -> None:
        """Start the thread and wait until its function runs.

        Raises:
            AllocationError: there is no memory for a thread, or the system allows no further thread.
        """
        has_begun = False
        with suppress(MemoryError, RuntimeError):
            _thread.start_new_thread(self._watched_function(), ())
            has_begun = self._events.get() is _BEGUN
        if not has_begun:
            raise AllocationError(
                "cannot start another thread: the system is out of memory or at its thread limit",
                hint="close other programs, or lower --vram or --ctx",
            )

    @property
    def is_alive(self) -> bool:
        """Whether the function runs, or is about to."""
        return self._function_ref is not None and self._function_ref() is not None

    def join(self) -> None:
        """Wait until the function has ended; return at once if it never began."""
        while self.is_alive:
            self._events.get()

    def _watched_function(self) -> "partial[None]":
        """Return the function for the thread.

        Only the thread holds a strong reference, so the weak reference reports when the thread ends.
        """
        function = partial(_begin, self._events, self._run)
        self._function_ref = weakref.ref(function, self._events.put)
        return function


def _begin(events: SimpleQueue[object], run: Callable[[], None]) -> None:
    events.put(_BEGUN)
    run()
