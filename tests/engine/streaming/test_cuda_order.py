"""The CUDA streamer queues work in a safe order, on a simulated device with only the guarantees of CUDA.

A GPU runs each stream's work in order and different streams' work in any order that events allow. So does this device:
whenever the host calls it, it runs some of what may run, chosen at random, copies in two halves. If anything that must
wait could run too early, some order shows a layer computed on wrong bytes. The bytes and the reader threads are real;
test_cuda.py checks a real GPU.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streamed import NUM_LAYERS, PackedModel, Runtime
from support.threads import watched_threads
from torch import Tensor

from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, Pinner
from specchat.engine.streaming.readers import PackLayerReader
from specchat.models.hf.skeleton import build_skeleton

CPU = torch.device("cpu")


class Event:
    """A CUDA event: a wait is for the last record before the wait, and for nothing if there was none."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.recorded = 0
        self.reached = 0

    def record(self, stream: Stream) -> None:
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
    """Streams as the host sees them; the first stream computes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # A device that only works when it is waited for, one that keeps up, and those between.
        self._pace = rng.choice(((0,), (0, 0, 1), (0, 0, 1, 3, 100), (100,)))
        self.streams = [Stream(self)]
        self.current = self.streams[0]

    def new_stream(self, _: torch.device) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def go_on(self) -> None:
        """Run none, some or all of the work that may run."""
        for _ in range(self._rng.choice(self._pace)):
            self._step()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert self._step(), "everything waits for something"

    def _step(self) -> bool:
        ready = [stream for stream in self.streams if stream.work and stream.work[0].ready()]
        if ready:
            self._rng.choice(ready).work.popleft().run()
        return bool(ready)

    def new_slots(self, num_slots: int, nbytes: int, _: torch.device) -> list[Tensor]:
        """Return memory with old contents, and queue its zeroing."""
        slots = [torch.full((nbytes,), 0xAA, dtype=torch.uint8) for _ in range(num_slots)]
        self.current.work.extend(Work(slot.zero_) for slot in slots)
        return slots

    def copy_async(self, slot: Tensor, blob: Tensor) -> None:
        half = len(slot) // 2
        self.current.work.append(Work(lambda: slot[:half].copy_(blob[:half])))
        self.current.work.append(Work(lambda: slot[half:].copy_(blob[half:])))
        self.go_on()


@contextmanager
def fake_cuda(device: Device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", device.new_stream)
        patch.setattr(torch.cuda, "Event", lambda **_: Event(device))
        patch.setattr(torch.cuda, "stream", device.using)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.current)
        patch.setattr("specchat.engine.streaming.cuda._new_slots", device.new_slots)
        patch.setattr("specchat.engine.streaming.cuda._copy_async", device.copy_async)
        yield


class Passes:
    """Computes layers: queued work that sees, at its beginning and at its end, what the layer's parameters hold.

    Attributes:
        most_ahead: layers of one pass that were queued and not computed yet, at most.
    """

    def __init__(self, model: PackedModel, layers: Sequence[Any], device: Device) -> None:
        self._model = model
        self._layers = layers
        self._device = device
        self.most_ahead = 0

    def run(self, streamer: CudaStreamer, streamed: Sequence[int], *, fails: bool = False) -> None:
        """Compute layers; `fails` stops after the last layer is queued, before its release."""
        under_way = set[int]()
        for index in streamed:
            streamer.acquire(index)
            under_way.add(index)
            self.most_ahead = max(self.most_ahead, len(under_way))
            self._queue(index, partial(under_way.remove, index))
            if not fails or index != streamed[-1]:
                streamer.release(index)

    def _queue(self, index: int, end: Callable[[], None]) -> None:
        # A kernel reads the memory that its parameters had when it was queued.
        check = partial(self._check, index, dict(self._layers[index].named_parameters()))
        for run in (check, check, end):
            self._device.current.work.append(Work(run))
            self._device.go_on()

    def _check(self, index: int, parameters: dict[str, Tensor]) -> None:
        views = self._model.layouts[index].views(self._model.blobs[index])
        for name, parameter in parameters.items():
            assert torch.equal(parameter, views[name]), f"layer {index} computed on something else"


@given(
    tiers=st.lists(st.sampled_from(["device", "ram", "ram", "disk"]), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    num_slots=st.integers(1, 4),
    cuts=st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), st.booleans()), max_size=3),
    givings=st.dictionaries(st.integers(1, 5), st.integers(0, NUM_LAYERS - 1), max_size=3),
    num_late=st.integers(0, NUM_LAYERS - 1),
    stage_end=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
)
@settings(deadline=None, max_examples=60)
def test_layers_see_their_own_bytes_in_every_order_of_work(
    packed_model: PackedModel,
    tiers: list[str],
    num_slots: int,
    cuts: list[tuple[int, bool]],
    givings: dict[int, int],
    num_late: int,
    stage_end: int,
    seed: int,
):
    """Run whole passes, and between them passes that stop before a layer or within one.

    Meanwhile some layers are given back, streamed or not yet, and a stage of the chat ends: further layers stream.
    """
    streamed = [index for index, tier in enumerate(tiers) if tier != "device"]
    if not streamed:
        return
    in_ram = [index for index, tier in enumerate(tiers) if tier == "ram"]
    device, runtime = Device(random.Random(seed)), Runtime(1 << 40)
    layers = build_skeleton(packed_model.skeleton.config, torch.float32).layers

    pin = Pinner(runtime, lambda: None, lambda _: None)
    with watched_threads() as threads, fake_cuda(device):
        host = HostLayers(layers, streamed, in_ram, num_slots, PackLayerReader(packed_model.pack), pin)
        first = streamed[num_late:] or streamed[-1:]
        host.select(first)
        streamer = CudaStreamer(layers, first, num_slots, host, CPU)
        passes = Passes(packed_model, layers, device)
        whole = (NUM_LAYERS, False)
        end, num_bytes, now = min(stage_end, len(cuts) + 2), 0, first
        for number, (length, fails) in enumerate([whole, whole, *cuts, whole]):
            given = {givings[number]} & set(streamer.kept) if number in givings else set()
            if number == end:
                streamer.restream(set(streamed) - set(first), given)
                now = streamed
            elif given:
                streamer.restream((), given)
            slots, nbytes = streamer.host_slots(())
            assert sum(runtime.pinned.values()) == sum(streamer.kept.values()) + slots * nbytes
            passes.run(streamer, [index for index in now if index < length], fails=fails)
            num_bytes += sum(packed_model.layouts[index].nbytes for index in now if index < length)
            if length < NUM_LAYERS:
                streamer.restart()
            else:
                device.streams[0].synchronize()  # whoever asked for the pass reads what came out of it
        assert streamer.counters().num_bytes == num_bytes
        streamer.close()
    assert passes.most_ahead <= num_slots + 1, "the host is too far ahead to be stopped between layers"
    assert not any(stream.work for stream in device.streams)
    assert not runtime.pinned
    assert not threads.num_running
