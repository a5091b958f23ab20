"""Plans for several machines: layers in turn, a row for each machine, and rows that cost what the network takes."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
from planner.test_device_plans import FIRST, TARGET, chosen, over

from specchat.errors import UnsupportedModelError
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.peers import inputs_of
from specchat.planner.request import DeviceInputs, Peer
from specchat.records.model import KvShape

FAR = "10.0.0.2:7000"


def worker(bytes_per_s: float) -> DeviceInputs:
    """A worker as it tells of itself: figures cross the network as JSON."""
    figures = {"machine": asdict(FIRST), "rates": asdict(over(12.5)), "vram_bytes": None}
    found = inputs_of(json.loads(json.dumps(figures)), Peer(FAR, 1e-4, bytes_per_s))
    assert (found.machine, found.rates) == (FIRST, over(12.5))
    return found


def test_layers_are_dealt_in_turn_and_each_machine_has_a_row():
    plan = chosen(worker(1e9), devices=()).plan
    assert plan.placement.apart and plan.placement.devices == ("cuda:0", f"{FAR} cuda:0")
    rows = plan.devices
    assert [each.device for each in rows] == list(plan.placement.devices)
    assert all(each.streamed and each.link_s > 0 for each in rows)
    owners = [plan.owner[index] for index in plan.placement.streamed]
    assert sum(a != b for a, b in itertools.pairwise(owners)) > len(owners) // 2
    own = {index for index in plan.placement.streamed if plan.owner[index] == 0}
    assert own | set(plan.placement.part(0).resident) == set(plan.placement.owned(0))
    assert plan.placement.part(1).streamed == tuple(i for i in plan.placement.streamed if plan.owner[i] == 1)


def test_rows_cost_the_time_of_the_network():
    fast, slow = (chosen(worker(rate), devices=()).prediction.tok_per_s for rate in (1e10, 1e6))
    assert fast > 1.5 * slow


def test_layers_that_share_more_than_rows_are_refused():
    spec = known_spec(TARGET.name, "int4")
    assert spec is not None
    shared = replace(spec, kv_shapes=(KvShape(0, 0, 0), *spec.kv_shapes[1:]))
    with pytest.raises(UnsupportedModelError, match="cannot be split over workers"):
        chosen(worker(1e9), target=shared, devices=())
