"""Slots in host memory, and who fills them: threads that read ahead, or for small layers whoever asks for one."""

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

# Up to this size a layer is read by the thread that computes, when it gets there, and through the page cache (which
# holds all of a model's such layers in a few MiB). Reading ahead costs the computing thread 90 to 230 us a layer,
# however small: a reader needs the interpreter's lock on its way into every read and out of it, and while it has it the
# other one sleeps and has to be woken. Copying 256 KiB out of the page cache takes 30 us.
SMALL_LAYER_BYTES = 256 * 1024

_LOOK_S = 1.0


def is_small(nbytes: int) -> bool:
    """Whether a layer of so many bytes is read by whoever computes it."""
    return nbytes <= SMALL_LAYER_BYTES


class SlotQueue:
    """Keeps slots filled, each with the streamed layers that live in it, in turn: layer j is in slot j mod N.

    Giving a slot back queues the pieces of the layer that lives there next, and the workers take pieces in that order.
    So the queue runs on across layers and passes: while the last pieces of one layer are read, the first of the next
    are under way, and the disk never waits at a layer's end.

    Args:
        works: per streamed layer, the pieces of work that together fill its slot.
        small: per streamed layer, whether it is filled only when it is taken, by the thread that takes it.
        num_slots: N.
        num_workers: threads; none is started if all layers are small.
    """

    def __init__(
        self, works: Sequence[Sequence[Callable[[], None]]], small: Sequence[bool], num_slots: int, num_workers: int
    ) -> None:
        self._works = works
        self._small = small
        self._queue: SimpleQueue[tuple[int, int, Callable[[], None]] | None] = SimpleQueue()  # (epoch, j, work)
        self._changed = threading.Condition()
        self.wait_s = 0.0
        # `_holds[s]` is the streamed layer whose bytes slot s has, None while it is free or being filled. Reading it
        # needs no lock: taking a layer that is there costs the computing thread nothing. The condition guards the rest.
        self._holds: list[int | None] = [None] * num_slots
        self._unread = [0] * len(works)
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

    def take(self, j: int) -> None:
        """Returns once layer j is in its slot; errors of the workers come out here."""
        slot = j % len(self._holds)
        if self._holds[slot] == j:
            return
        begin = time.perf_counter()
        if self._small[j]:
            for work in self._works[j]:
                work()
            self._holds[slot] = j
        else:
            self._wait_for(slot, j)
        self.wait_s += time.perf_counter() - begin

    def give_back(self, j: int) -> None:
        """Queues the next layer that lives in this slot: N further on, or the slot's own first in the next pass."""
        slot = j % len(self._holds)
        self._holds[slot] = None
        following = j + len(self._holds)
        self._fill(following if following < len(self._works) else slot)

    def restart(self) -> None:
        """Begins again with the first layers, once the pieces under way have ended."""
        with self._changed:
            self._epoch += 1  # makes what is queued void
            self._wait_until(lambda: self._num_running == 0)
            self._holds = [None] * len(self._holds)
        self._fill_first_slots()

    def close(self) -> None:
        """Ends the workers and waits for them."""
        with self._changed:
            self._epoch += 1
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._holds), len(self._works))):
            self._fill(j)

    def _fill(self, j: int) -> None:
        if self._small[j]:
            return
        self._unread[j] = len(self._works[j])
        for work in self._works[j]:
            self._queue.put((self._epoch, j, work))

    def _wait_for(self, slot: int, j: int) -> None:
        with self._changed:
            self._wait_until(lambda: self._holds[slot] == j)
        if self._holds[slot] != j:
            assert self._error is not None
            raise self._error

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Waits for that or for an error, looking from time to time: out of memory, a worker may not get to tell."""
        while not self._changed.wait_for(lambda: is_so() or self._error is not None, _LOOK_S):
            pass

    def _work(self) -> None:
        try:
            while (piece := self._queue.get()) is not None:
                self._run(*piece)
        except BaseException as error:  # noqa: BLE001 - carried to the computing thread, which raises it
            self._error = error

    def _run(self, epoch: int, j: int, work: Callable[[], None]) -> None:
        with self._changed:
            if epoch != self._epoch or self._error is not None:
                return
            self._num_running += 1
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - likewise
            self._error = error
        self._end(epoch, j)

    def _end(self, epoch: int, j: int) -> None:
        with self._changed:
            self._num_running -= 1
            if epoch == self._epoch and self._error is None:  # a piece that failed must not complete its layer
                self._unread[j] -= 1
                if self._unread[j] > 0:
                    return  # nobody waits for less than a layer
                self._holds[j % len(self._holds)] = j
            self._changed.notify_all()


def page_aligned(num_bytes: int) -> Tensor:
    """Zeroed uint8 memory that starts at a page, as unbuffered reads require."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Unbuffered reads pin the pages they write to one by one: 2.1-2.4 GB/s into huge pages, 0.8-1.6 into small.
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping for as long as it is used
