"""Records made in a thread of their own, so that the screen keeps moving and keys are heeded while a pass runs."""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from types import TracebackType
from typing import Generic, Self, TypeVar

from specchat.threads import Thread

T = TypeVar("T")

_END = object()


class Worker(Generic[T]):
    """Runs an iterator in a thread and hands over what it yields, in order. Leaving the context ends both.

    Args:
        records: a generator; it runs, and is closed, in the thread.
        cancel: asks it to come to an end.
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
        """The next record, or None if there is none within that time.

        Raises:
            StopIteration: there are no more.
            BaseException: whatever ended the iterator.
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
        if kind is not None:
            self._cancel.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(self._records):  # type: ignore[type-var]  # a generator, whose `close` Iterator does not know
                for record in self._records:
                    self._queue.put(record)
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            self._error = error
        self._queue.put(_END)
