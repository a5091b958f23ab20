"""The pieces of the simulation of several devices, against times that can be added up by hand."""

from __future__ import annotations

import pytest
from benchmarks.simulated_devices import (
    GB,
    LLAMA_70B,
    MI250,
    SERVER,
    Deal,
    Device,
    Model,
    Network,
    deal,
    deals,
    pass_s,
    ranges,
    shares,
    speed,
    tokens_per_pass,
    woven,
)

# A layer takes a second to arrive and none to compute.
MODEL = Model(num_layers=12, layer_params=0, layer_bytes=1.0, hidden=1, head_s=0.0, draft_s=0.0)
LINK = Device(link=1.0, flops=1.0, memory=1e9, room=2.0, layer_s=0.0)
NOWHERE = Network(1e15, 0.0)


def streamed(owner: tuple[int, ...], slots: int = 2) -> Deal:
    return Deal(owner, frozenset(), slots)


@pytest.mark.parametrize(("count", "seconds"), [(1, 12), (2, 6), (4, 3)])
def test_links_of_woven_devices_add_up(count: int, seconds: float):
    found = pass_s(MODEL, [LINK] * count, NOWHERE, streamed(woven([12 / count] * count)), [1])
    assert found == pytest.approx(seconds, rel=1e-6)


def test_ranges_gain_only_what_slots_hold():
    """Each of two ranges of six layers begins with two that are there, while the other range waits for four."""
    assert pass_s(MODEL, [LINK] * 2, NOWHERE, streamed(ranges([6, 6])), [1]) == pytest.approx(8, rel=1e-6)
    assert pass_s(MODEL, [LINK] * 2, NOWHERE, streamed(ranges([6, 6]), slots=4), [1]) == pytest.approx(6, rel=1e-6)


def test_unequal_links_end_together():
    devices = [Device(4.0, 1.0, 1e9, 2.0, 0.0), LINK]
    wanted = shares(MODEL, devices, 2)
    assert wanted == pytest.approx([9.6, 2.4])
    owner = woven(wanted)
    assert (owner.count(0), owner.count(1)) == (10, 2)
    assert pass_s(MODEL, devices, NOWHERE, streamed(owner), [1]) == pytest.approx(12 / 5, rel=0.1)


def test_resident_layers_are_spread_among_those_of_their_device():
    found = deal(MODEL, [Device(1.0, 1.0, 1.0, 4.0), Device(1.0, 1.0, 1.0, 3.0)], woven([6, 6]), 2)
    assert found is not None and found.resident == {2, 7, 8}  # two of device 0's six layers, one of device 1's
    assert deal(MODEL, [Device(1.0, 1.0, 1.0, 1.0)] * 2, woven([6, 6]), 2) is None


def test_a_load_serves_all_microbatches_or_one():
    dealt = streamed((0,) * 12)
    assert pass_s(MODEL, [LINK], NOWHERE, dealt, [1, 1]) == pytest.approx(12, rel=1e-6)
    assert pass_s(MODEL, [LINK], NOWHERE, dealt, [1, 1], shares_loads=False) == pytest.approx(24, rel=1e-6)


def test_rows_hop_where_the_device_changes():
    devices = [Device(1e9, 1.0, 1e9, 99.0, 0.0)] * 2
    owner = woven([6, 6])
    dealt = Deal(owner, frozenset(range(12)), 0)
    hops = sum(a != b for a, b in zip((0, *owner), (*owner, 0), strict=True))
    found = pass_s(MODEL, devices, Network(10.0, 1.0), dealt, [5])
    assert hops == 12 and found == pytest.approx(hops * (1.0 + 2 * 5 / 10.0), rel=1e-6)


def test_microbatches_pipeline_resident_ranges():
    """Two stages of six seconds each: two microbatches take as long as one: no stage waits."""
    devices = [Device(1e9, 1.0, 1e9, 99.0, layer_s=1.0)] * 2
    dealt = Deal(ranges([6, 6]), frozenset(range(12)), 0)
    assert pass_s(MODEL, devices, NOWHERE, dealt, [1], shares_loads=False) == pytest.approx(12, rel=1e-6)
    assert pass_s(MODEL, devices, NOWHERE, dealt, [1, 1], shares_loads=False) == pytest.approx(12, rel=1e-6)


@pytest.mark.parametrize("nodes", [4, 6, 8])
def test_the_setting_of_specmemo_gives_its_ratios(nodes: int):
    """arXiv 2506.01986: 2x over batched plain decoding, and 8x the throughput with a batch of 10."""
    (named,) = deals(LLAMA_70B, [MI250] * 8, ["ranges"], [2])
    plain = speed(LLAMA_70B, [MI250] * 8, SERVER, named, batch=10, nodes=0).tok_per_s
    one = speed(LLAMA_70B, [MI250] * 8, SERVER, named, batch=1, nodes=nodes).tok_per_s
    ten = speed(LLAMA_70B, [MI250] * 8, SERVER, named, batch=10, nodes=nodes).tok_per_s
    assert 1.9 < ten / plain < 2.6
    assert 6.9 < ten / one < 10.1


def test_trees_bring_tokens():
    assert tokens_per_pass(0) == 1 and tokens_per_pass(64) == pytest.approx(4.6, abs=0.05)
    assert MI250.room > LLAMA_70B.num_layers / 8 * LLAMA_70B.layer_bytes and GB == 1e9
