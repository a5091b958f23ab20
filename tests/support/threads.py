"""Threads as the system starts them, and as it fails to; and a limit on how long a test may wait for any of that."""

from __future__ import annotations

import _thread
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# What can become of a start: an error at once, or a thread that has no memory left for its first call.
FAILURES = ("refused", "dies")


class Starts:
    """Stands for the system, which starts threads.

    Args:
        failing: which one fails, counted from 1; 0 for none.
        failure: how.

    Attributes:
        count: of calls.
    """

    def __init__(self, failing: int = 0, failure: str = "refused") -> None:
        self.count = 0
        self._failing = failing
        self._failure = failure
        self._start = _thread.start_new_thread
        self._given: list[weakref.ref[Callable[..., Any]]] = []

    def __call__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
        self.count += 1
        self._given.append(weakref.ref(function))
        if self.count != self._failing:
            return self._start(function, arguments)
        if self._failure == "refused":
            raise RuntimeError("can't start new thread")
        return self._start(lambda _: None, (function,))

    @property
    def num_running(self) -> int:
        """Threads that have not ended: a thread holds on to its function until then."""
        return sum(given() is not None for given in self._given)


@contextmanager
def watched_threads(failing: int = 0, failure: str = "refused") -> Iterator[Starts]:
    """Watches the threads of ours that are started meanwhile, and lets one of them fail."""
    starts = Starts(failing, failure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("_thread.start_new_thread", starts)
        yield starts


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """What waits for longer fails, instead of hanging the suite."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
