"""The CUDA streamer queues work in a safe order, on a simulated device with only the guarantees of CUDA.

If anything that must wait could run too early, some order shows a layer computed on wrong bytes. The bytes and the
reader threads are real; test_cuda.py checks a real GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_order import Device, Work, fake_cuda
from support.streamed import NUM_LAYERS, PackedModel, Runtime
from support.threads import watched_threads
from torch import Tensor

from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, Pinner
from specchat.engine.streaming.readers import PackLayerReader
from specchat.models.hf.skeleton import build_skeleton

CPU = torch.device("cpu")


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
