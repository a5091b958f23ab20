"""A batch of read tasks that threads run, and the threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from specchat.threads import Thread

_LOOK_S = 1.0

ReadTask = Callable[[], None]


class ReadBatch:
    """Read tasks that were queued together.

    Args:
        num_tasks: number of tasks.
    """

    def __init__(self, num_tasks: int) -> None:
        self._unread = num_tasks
        self._has_begun = self._is_withdrawn = False
        self._error: BaseException | None = None
        self._counting = threading.Lock()
        self._over = threading.Lock()  # held until the last task has ended
        if num_tasks:
            self._over.acquire()

    def start_task(self) -> bool:
        """Return whether the next task may run: not after the batch was withdrawn."""
        with self._counting:
            self._has_begun = not self._is_withdrawn
            return self._has_begun

    def withdraw(self) -> bool:
        """Take all tasks back unless one has begun, and return whether none will run."""
        with self._counting:
            self._is_withdrawn = not self._has_begun
            return self._is_withdrawn

    @property
    def is_over(self) -> bool:
        """Whether all tasks have ended, or will never run."""
        return not self._unread or self._is_withdrawn

    def end_task(self, error: BaseException | None = None) -> None:
        """Count a task that has ended, with the error that it failed with."""
        if error is not None:
            self._error = error
        with self._counting:
            self._unread -= 1
            if not self._unread:
                self._over.release()

    def wait_until_over(self) -> None:
        """Wait until all tasks have ended; a failed task counts as ended."""
        while not self._over.acquire(timeout=_LOOK_S):  # a thread that runs out of memory may fail to notify
            pass
        self._over.release()

    def wait(self) -> None:
        """Wait until all tasks have ended, and raise the error of one of them."""
        self.wait_until_over()
        if self._error is not None:
            raise self._error


class ReadThreads:
    """Threads that run read tasks in the order of their batches.

    Args:
        num_threads: number of threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._queue: SimpleQueue[tuple[ReadBatch, ReadTask] | None] = SimpleQueue()
        self._threads = [Thread(self._work) for _ in range(num_threads)]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    def begin(self, tasks: Sequence[ReadTask], batch: ReadBatch | None = None) -> ReadBatch:
        """Queue tasks behind those of earlier batches, and return their batch at once.

        Args:
            tasks: read tasks.
            batch: batch for as many tasks; None for a new one.
        """
        batch = batch or ReadBatch(len(tasks))
        put = self._queue.put
        for task in tasks:
            put((batch, task))
        return batch

    def drain(self) -> None:
        """Wait until all queued tasks have ended; a failed task counts as ended."""
        meeting = threading.Barrier(len(self._threads) + 1)
        self.begin([partial(_meet, meeting)] * len(self._threads))
        meeting.wait()

    def close(self) -> None:
        """Wait until all queued tasks have ended, and end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            batch, task = entry
            error: BaseException | None = None
            try:
                if batch.start_task():
                    task()
            except BaseException as caught:  # noqa: BLE001 - passed to the computing thread, which raises it
                error = caught
            batch.end_task(error)
            del entry, batch, task, error  # no reference outlives the task


def _meet(meeting: threading.Barrier) -> None:
    meeting.wait()
