"""Running a generator in a thread, so that screen and keyboard stay responsive during a pass."""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Generic, Self, TypeVar

from specchat.threads import Thread

T = TypeVar("T")

_END = object()
_LEAVE_WITHIN_S = 1.0


class Worker(Generic[T]):
    """A thread that runs a generator and passes on its records in order. Leaving the context ends both.

    After an error, for example a second Ctrl-C, the program is about to end. So the thread is then left behind if one
    call of a library keeps it for more than a second.

    Args:
        records: generator; runs in the thread and is closed there.
        cancel: event that asks the generator to end.
    """

    def __init__(self, records: Iterator[T], cancel: threading.Event) -> None:
        self._records = records
        self._cancel = cancel
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = Thread(self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def next(self, timeout_s: float) -> T | None:
        """Wait at most `timeout_s` seconds for the next record; return None if there is none by then.

        Raises:
            StopIteration: there are no more records.
            BaseException: the generator failed with this error.
        """
        try:
            record = self._queue.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None
        if record is not _END:
            return record  # type: ignore[return-value]
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._thread.join()  # all records were taken
            return
        self._cancel.set()
        self._thread.join_within(_LEAVE_WITHIN_S)

    def _run(self) -> None:
        try:
            with closing(self._records):  # type: ignore[type-var]  # a generator, whose `close` Iterator does not know
                for record in self._records:
                    self._queue.put(record)
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            self._error = error
        self._queue.put(_END)
