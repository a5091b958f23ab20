"""A simulated GPU with only the guarantees of CUDA about the order of queued work.

A GPU runs each stream's work in order and different streams' work in any order that events allow. So does this device:
whenever the host calls it, it runs some of what may run, chosen at random, copies in two halves. Threads may queue work
at the same time.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


class Event:
    """A CUDA event: a wait is for the last record before the wait, and for nothing if there was none."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.recorded = 0
        self.reached = 0

    def record(self, stream: Stream) -> None:
        with self._device.lock:
            self.recorded += 1
            number = self.recorded
            stream.work.append(Work(lambda: setattr(self, "reached", number)))
        self._device.go_on()

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.reached >= self.recorded)

    def query(self) -> bool:
        return self.reached >= self.recorded

    def elapsed_time(self, other: Event) -> float:
        assert self.reached == self.recorded and other.reached == other.recorded, "asked before it has happened"
        return 0.0


@dataclass
class Work:
    """Queued work; `ready` returns whether it may run once it is the first of its stream."""

    run: Callable[[], None] = lambda: None
    ready: Callable[[], bool] = lambda: True


@dataclass
class Stream:
    """Work that runs in order."""

    device: Device
    work: deque[Work] = field(default_factory=deque)

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.work.append(Work(ready=lambda: event.reached >= number))
        self.device.go_on()

    def synchronize(self) -> None:
        self.device.run_until(lambda: not self.work)


class Device:
    """Streams as the host sees them; the first stream computes.

    Attributes:
        lock: held while work runs.
        num_copied: bytes of all copies that were queued.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # A device that only works when it is waited for, one that keeps up, and those between.
        self._pace = rng.choice(((0,), (0, 0, 1), (0, 0, 1, 3, 100), (100,)))
        self.streams = [Stream(self)]
        self.lock = threading.RLock()
        self.num_copied = 0
        self._threads = threading.local()

    @property
    def current(self) -> Stream:
        """The current stream of this thread."""
        stream: Stream = getattr(self._threads, "current", self.streams[0])
        return stream

    def new_stream(self, _: torch.device) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self._threads.current = self.current, stream
        yield
        self._threads.current = before

    def go_on(self) -> None:
        """Run none, some or all of the work that may run."""
        with self.lock:
            for _ in range(self._rng.choice(self._pace)):
                self._step()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while True:
            with self.lock:
                if is_done():
                    return
                assert self._step(), "everything waits for something"

    def _step(self) -> bool:
        ready = [stream for stream in self.streams if stream.work and stream.work[0].ready()]
        if ready:
            self._rng.choice(ready).work.popleft().run()
        return bool(ready)

    def new_slots(self, num_slots: int, nbytes: int, device: torch.device) -> list[Tensor]:
        """Return memory with old contents, and queue its zeroing."""
        return [self.new_slab(nbytes, device) for _ in range(num_slots)]

    def new_slab(self, nbytes: int, _: torch.device) -> Tensor:
        slab = torch.full((nbytes,), 0xAA, dtype=torch.uint8)
        self.current.work.append(Work(slab.zero_))
        return slab

    def copy_async(self, slot: Tensor, blob: Tensor) -> None:
        half = len(slot) // 2
        with self.lock:
            self.num_copied += len(slot)
        self.current.work.append(Work(lambda: slot[:half].copy_(blob[:half])))
        self.current.work.append(Work(lambda: slot[half:].copy_(blob[half:])))
        self.go_on()


@contextmanager
def fake_cuda(device: Device) -> Iterator[None]:
    """CUDA's calls, as the streamer and the pool of experts make them, on the simulated device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", device.new_stream)
        patch.setattr(torch.cuda, "Event", lambda **_: Event(device))
        patch.setattr(torch.cuda, "stream", device.using)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.current)
        patch.setattr("specchat.engine.streaming.cuda._new_slots", device.new_slots)
        patch.setattr("specchat.engine.streaming.cuda._copy_async", device.copy_async)
        patch.setattr("specchat.engine.experts.gpu._new_slab", device.new_slab)
        patch.setattr("specchat.engine.experts.gpu._copy_async", device.copy_async)
        yield
