"""Slots in host memory: threads fill them ahead of the pass, and the computing thread reads small layers itself."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

import torch
from torch import Tensor

from specchat.threads import Thread

# The computing thread reads layers up to this size itself, on demand and through the page cache (a few MiB hold all
# such layers of a model). Reading ahead costs the computing thread 90 to 230 us per layer of any size: a reader thread
# takes the GIL before and after every read, and meanwhile the computing thread sleeps and must be woken. Copying
# 256 KiB out of the page cache takes 30 us.
SMALL_LAYER_BYTES = 256 * 1024

_LOOK_S = 1.0


def is_small(nbytes: int) -> bool:
    """Return whether the computing thread reads a layer of this size itself."""
    return nbytes <= SMALL_LAYER_BYTES


class SlotQueue:
    """Keeps N slots filled with streamed layers; layer j uses slot j mod N.

    Giving a slot back queues the read tasks of the slot's next layer, and workers run the tasks in queue order. The
    queue continues across layers and passes: the first tasks of one layer overlap with the last tasks of the layer
    before, so the disk never idles between layers.

    Args:
        tasks: read tasks of each streamed layer, which together fill its slot.
        small: whether the thread that takes a layer also reads it, for each streamed layer.
        num_slots: number of slots, N.
        num_workers: number of threads; none is started if all layers are small.

    Attributes:
        wait_s: seconds that `take` waited.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Callable[[], None]]], small: Sequence[bool], num_slots: int, num_workers: int
    ) -> None:
        self._tasks = tasks
        self._small = small
        self._queue: SimpleQueue[tuple[int, int, Callable[[], None]] | None] = SimpleQueue()  # (epoch, j, task)
        self._changed = threading.Condition()
        self.wait_s = 0.0
        self._busy_s = self._busy_since = 0.0
        # `_holds[s]` is the streamed layer in slot s, None while the slot is free or being filled. It is read without
        # a lock, so taking a filled layer costs the computing thread nothing. The condition guards the other fields.
        self._holds: list[int | None] = [None] * num_slots
        self._unread = [0] * len(tasks)
        self._epoch = 0
        self._num_running = 0
        self._error: BaseException | None = None
        self._fill_first_slots()
        self._threads = [Thread(self._work) for _ in range(0 if all(small) else num_workers)]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read task ran; reads that are under way count up to now."""
        with self._changed:
            return self._busy_s + (time.perf_counter() - self._busy_since if self._num_running else 0.0)

    def take(self, j: int) -> None:
        """Wait until layer j is in its slot, and raise errors of the workers."""
        slot = j % len(self._holds)
        if self._holds[slot] == j:
            return
        begin = time.perf_counter()
        if self._small[j]:
            for task in self._tasks[j]:
                task()
            self._holds[slot] = j
        else:
            self._wait_for(slot, j)
        self.wait_s += time.perf_counter() - begin

    def give_back(self, j: int) -> None:
        """Queue the slot's next layer: j + N, or the slot's first layer in the next pass."""
        slot = j % len(self._holds)
        self._holds[slot] = None
        following = j + len(self._holds)
        self._fill(following if following < len(self._tasks) else slot)

    def restart(self) -> None:
        """Start again with the first layers, after the current read tasks have ended."""
        with self._changed:
            self._epoch += 1  # voids all queued tasks
            self._wait_until(lambda: self._num_running == 0)
            self._holds = [None] * len(self._holds)
        self._fill_first_slots()

    def close(self) -> None:
        """Stop the workers and wait for them."""
        with self._changed:
            self._epoch += 1
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._holds), len(self._tasks))):
            self._fill(j)

    def _fill(self, j: int) -> None:
        if self._small[j]:
            return
        self._unread[j] = len(self._tasks[j])
        for task in self._tasks[j]:
            self._queue.put((self._epoch, j, task))

    def _wait_for(self, slot: int, j: int) -> None:
        with self._changed:
            self._wait_until(lambda: self._holds[slot] == j)
        if self._holds[slot] != j:
            assert self._error is not None
            raise self._error

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        """Wait for a condition or an error; poll, because a worker that runs out of memory may fail to notify."""
        while not self._changed.wait_for(lambda: is_true() or self._error is not None, _LOOK_S):
            pass

    def _work(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                self._run(*entry)
        except BaseException as error:  # noqa: BLE001 - passed to the computing thread, which raises it
            self._error = error

    def _run(self, epoch: int, j: int, task: Callable[[], None]) -> None:
        with self._changed:
            if epoch != self._epoch or self._error is not None:
                return
            if self._num_running == 0:
                self._busy_since = time.perf_counter()
            self._num_running += 1
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - passed to the computing thread, which raises it
            self._error = error
        self._end(epoch, j)

    def _end(self, epoch: int, j: int) -> None:
        with self._changed:
            self._num_running -= 1
            if self._num_running == 0:
                self._busy_s += time.perf_counter() - self._busy_since
            if epoch == self._epoch and self._error is None:  # a failed task must not complete its layer
                self._unread[j] -= 1
                if self._unread[j] > 0:
                    return  # waiters need the whole layer
                self._holds[j % len(self._holds)] = j
            self._changed.notify_all()


def page_aligned(num_bytes: int) -> Tensor:
    """Allocate zeroed uint8 memory that starts at a page, as unbuffered reads require."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Unbuffered reads pin each destination page: 2.1-2.4 GB/s into huge pages, 0.8-1.6 GB/s into small pages.
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # the tensor keeps the mapping alive
