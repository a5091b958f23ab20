"""Streamed layers in host memory hold the right bytes in any order of work, and pinning may fail.

The copies to a GPU are simulated (real ones: test_cuda.py); reads from disk to host memory are real.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streamed import NUM_LAYERS, PackedModel, Runtime
from support.threads import FAILURES, at_most, watched_threads

from specchat.engine.streaming import slots
from specchat.engine.streaming.host_layers import HostLayers, Pinner
from specchat.engine.streaming.readers import CheckpointLayerReader, PackLayerReader
from specchat.engine.streaming.slots import page_aligned
from specchat.errors import AllocationError
from specchat.records.limits import READ_THREADS


@pytest.mark.parametrize(("room", "num_pinned"), [(1 << 40, 4), (3 << 20, 1), ((5 << 20) - 1, 2), (100, 0)])
def test_pinning_stops_at_the_first_refusal_and_warns(room: int, num_pinned: int):
    runtime, said, forgotten = Runtime(room), list[str](), list[bool]()
    pin = Pinner(runtime, lambda: forgotten.append(True), said.append)
    blobs = [page_aligned(size << 20) for size in (2, 2, 2, 1)]
    pin(blobs)
    assert list(runtime.pinned) == [blob.data_ptr() for blob in blobs[:num_pinned]]
    if num_pinned == 4:
        assert not said and not forgotten
    else:
        left = sum(blob.nbytes for blob in blobs[num_pinned:]) >> 20
        assert len(said) == 1 and f"cannot pin {left}.0 MiB of 7.0 MiB" in said[0] and "half its rate" in said[0]
        assert runtime.refusals == len(forgotten) == 1  # no further attempt, and no error left behind
    pin.close()
    assert not runtime.pinned


def test_pinning_no_blobs_calls_nothing():
    runtime = Runtime(0)
    Pinner(runtime, lambda: None, lambda _: None)([])
    assert runtime.refusals == 0


@given(
    tiers=st.lists(st.sampled_from(["device", "ram", "disk"]), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    slots=st.integers(1, 3),
    packed=st.booleans(),
    passes=st.lists(st.integers(0, NUM_LAYERS), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_take_returns_the_right_layer(
    packed_model: PackedModel, tiers: list[str], slots: int, packed: bool, passes: list[int]
):
    """Passes stop after some layers and restart; a copy is still running when the next layer is taken."""
    streamed = [i for i, tier in enumerate(tiers) if tier != "device"]
    in_ram = [i for i, tier in enumerate(tiers) if tier == "ram"]
    runtime = Runtime(1 << 40)

    layouts = dict(enumerate(packed_model.layouts))
    filler = PackLayerReader(packed_model.pack) if packed else CheckpointLayerReader(packed_model.reader(), layouts)
    pin = Pinner(runtime, lambda: None, lambda _: None)
    with watched_threads() as threads:
        host = HostLayers(packed_model.skeleton.layers, streamed, in_ram, slots, filler, pin)
    assert len(runtime.pinned) == len(in_ram) + min(slots, len(streamed) - len(in_ram))
    under_way = list[
        Callable[[], None]
    ]()  # copies out of slots; each must be waited for before the next layer is taken
    for length in [*passes, NUM_LAYERS]:
        for j, index in enumerate(streamed[:length]):
            blob = host.take(j)
            assert host.keeps(j) == (index in in_ram)
            assert host.keeps(j) or not under_way
            seen = blob.clone()
            assert torch.equal(seen, packed_model.blobs[index])

            def copied(blob: torch.Tensor = blob, seen: torch.Tensor = seen) -> None:
                assert torch.equal(blob, seen), "overwritten before it was copied"
                under_way.clear()

            if not host.keeps(j):
                under_way.append(copied)
            host.give_back(j, copied)
        host.restart()
        assert not under_way
    host.close()
    assert not runtime.pinned
    assert not threads.num_running


def test_the_slot_of_the_last_layer_is_filled_before_the_next_pass(
    packed_model: PackedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slots, "SMALL_LAYER_BYTES", 0)  # threads read all layers
    pin = Pinner(Runtime(1 << 40), lambda: None, lambda _: None)
    filler = PackLayerReader(packed_model.pack)
    host = HostLayers(packed_model.skeleton.layers, range(NUM_LAYERS), [], 2, filler, pin)
    copied = list[int]()
    for j in range(NUM_LAYERS):
        host.take(j)
        host.give_back(j, lambda j=j: copied.append(j))
    assert copied == list(range(NUM_LAYERS - 1))
    host.reuse_slot()
    assert copied == list(range(NUM_LAYERS))
    begin = time.monotonic()
    while host._queue._holds != [0, 1]:
        assert time.monotonic() < begin + 10, "nobody reads the first layers of the next pass"
        time.sleep(0.001)
    host.close()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("failing", range(1, READ_THREADS + 1))
def test_a_reader_thread_that_cannot_start_leaves_nothing_pinned(packed_model: PackedModel, failing: int, failure: str):
    runtime, filler = Runtime(1 << 40), PackLayerReader(packed_model.pack)
    pin, layers = Pinner(runtime, lambda: None, lambda _: None), packed_model.skeleton.layers
    with at_most(60), watched_threads(failing, failure) as threads, pytest.raises(AllocationError):
        HostLayers(layers, range(NUM_LAYERS), [1], 2, filler, pin)
    filler.close()
    assert threads.count == failing and not threads.num_running and not runtime.pinned
