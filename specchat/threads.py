"""Threads whose start either succeeds or raises, even when memory runs out.

`threading.Thread.start` waits until the new thread signals that it runs. If the thread's stack takes the last free
memory, its first call fails, it never signals, and `start` hangs forever (CPython issue 140746). Here a weak reference
detects the end of a thread: the interpreter releases the thread's function when the thread ends.
"""

import _thread
import ctypes
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from specchat.errors import AllocationError

T = TypeVar("T")

_BEGUN = "begun"
# A process that was stopped for a while finds at most one such wait over, so its time limits do not run out.
_LOOK_S = 0.1


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
            raise _no_thread()

    @property
    def is_alive(self) -> bool:
        """Whether the function runs, or is about to."""
        return self._function_ref is not None and self._function_ref() is not None

    def join(self) -> None:
        """Wait until the function has ended; return at once if it never began."""
        while self.is_alive:
            self._events.get()

    def join_within(self, seconds: float) -> bool:
        """Wait at most some seconds until the function has ended, and return whether it has."""
        end = time.monotonic() + seconds
        while self.is_alive and (left := end - time.monotonic()) > 0:
            with suppress(Empty):
                self._events.get(timeout=left)
        return not self.is_alive

    def _watched_function(self) -> "partial[None]":
        """Return the function for the thread.

        Only the thread holds a strong reference, so the weak reference reports when the thread ends.
        """
        function = partial(_begin, self._events, self._run)
        self._function_ref = weakref.ref(function, self._events.put)
        return function


def _no_thread() -> AllocationError:
    return AllocationError(
        "cannot start another thread: the system is out of memory or at its thread limit",
        hint="close other programs, or lower --vram or --ctx",
    )


def _begin(events: SimpleQueue[object], run: Callable[[], None]) -> None:
    events.put(_BEGUN)
    run()


def run_within(seconds: float, run: Callable[[], T]) -> T:
    """Run a function in a thread of its own, and leave the thread behind if the function takes too long.

    A thread that is left behind ends at its next Python instruction. Inside a library, it ends with that call.

    Args:
        seconds: time limit; a time in which the whole process was stopped does not count.
        run: function to run.

    Raises:
        TimeoutError: the function did not end in time.
        AllocationError: there is no memory for a thread.
        BaseException: the function failed with this error.
    """
    results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    idents: list[int] = []

    def work() -> None:
        idents.append(_thread.get_ident())
        try:
            results.put((run(), None))
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            results.put((None, error))

    try:
        _thread.start_new_thread(work, ())  # a thread that has no memory to begin runs into the time limit
    except (MemoryError, RuntimeError) as refusal:
        raise _no_thread() from refusal
    try:
        value, error = _first(results, seconds)
    except BaseException:  # too late, or the waiting thread was interrupted
        for ident in idents:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
        raise
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None only if T has it


def _first(results: SimpleQueue[T], seconds: float) -> T:
    for _ in range(max(round(seconds / _LOOK_S), 1)):
        with suppress(Empty):
            return results.get(timeout=_LOOK_S)
    raise TimeoutError
