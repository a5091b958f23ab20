"""Threads that run, or are known not to.

`threading.Thread.start` waits until the new thread says that it runs. Where memory is short its stack may be the last
that there is; then its first call fails, it says nothing, and the wait has no end (CPython's issue 140746). Here the
interpreter itself tells that a thread has ended, by letting go of the function that it was given.
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
    """Runs a function beside the others. The process does not wait for it when it ends.

    Args:
        run: takes care of its own errors.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._news: SimpleQueue[object] = SimpleQueue()
        self._given: weakref.ref[partial[None]] | None = None

    def start(self) -> None:
        """Returns once the function runs.

        Raises:
            AllocationError: it never will; there is no memory for it, or the system allows no further thread.
        """
        has_begun = False
        with suppress(MemoryError, RuntimeError):
            _thread.start_new_thread(self._watched(), ())
            has_begun = self._news.get() is _BEGUN
        if not has_begun:
            raise AllocationError(
                "the system does not give what another thread takes",
                hint="close other programs, or give a smaller --vram or --ctx",
            )

    @property
    def is_alive(self) -> bool:
        """Whether the function runs, or is about to."""
        return self._given is not None and self._given() is not None

    def join(self) -> None:
        """Returns once the function has ended; at once if it never began."""
        while self.is_alive:
            self._news.get()

    def _watched(self) -> "partial[None]":
        """The function as the thread gets it; nobody else keeps it, so news comes when the thread lets it go."""
        given = partial(_begin, self._news, self._run)
        self._given = weakref.ref(given, self._news.put)
        return given


def _begin(news: SimpleQueue[object], run: Callable[[], None]) -> None:
    news.put(_BEGUN)
    run()
