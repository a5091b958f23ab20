"""Stages of a chat: none takes more memory than the plan, and a short chat has the layers of a short context."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loading import asking, plan_request
from support.planning import UNKNOWN_RATES, available, plan_for, specs

from specchat.errors import DoesNotFitError
from specchat.hardware.machine import Machine
from specchat.models.catalog.ref import demo_source
from specchat.planner.memory import build_ledger
from specchat.planner.placement import interleaved
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.planner.stages import _spread, with_stages
from specchat.records.model import KvShape, ModelSpec, ParamSize
from specchat.records.plan import Plan
from specchat.units import GIB, MIB

# 80 layers of 400 MiB; a token's keys and values take 320 KiB, so that 8,192 tokens take as much as 6.4 layers.
LARGE = ModelSpec(
    name="70b",
    architecture="AnyForCausalLM",
    vocab_size=128_256,
    hidden_size=8192,
    num_layers=80,
    mlp_size=28672,
    num_heads=64,
    max_positions=131_072,
    dtype="bf16",
    num_params=70 * 10**9,
    num_layer_params=68 * 10**9,
    layer_params=((ParamSize(400 * MIB, 1),),) * 80,
    other_params=(ParamSize(2 * GIB, 1),),
    buffer_bytes=0,
    kv_shapes=(KvShape(8, 128, 128),) * 80,
    quant="int4",
)
REQUEST = plan_request(demo_source("target"), None, "auto", dtype="bf16")


def plan_of(ctx: int, device: str = "cuda:0") -> Plan:
    machine = Machine(device, 22 * GIB, available(60 * GIB), True)
    inputs = PlanInputs(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: LARGE, None)
    return choose_plan(replace(asking(REQUEST, ctx=ctx, vram_bytes=22 * GIB), lowers_for_speed=False), inputs).plan


def stage_bytes(plan: Plan, target: ModelSpec, draft: ModelSpec | None) -> list[int]:
    """Bytes of the ledger of each stage."""
    ledgers = [
        build_ledger(target, draft, replace(plan.work, ctx=stage.ctx), replace(plan.placement, resident=stage.resident))
        for stage in plan.stages
    ]
    return [sum(item.bytes for item in ledger) for ledger in ledgers]


def check(plan: Plan, target: ModelSpec, draft: ModelSpec | None) -> None:
    contexts = [stage.ctx for stage in plan.stages]
    assert contexts == sorted(set(contexts)) and all(ctx < plan.work.ctx for ctx in contexts)
    resident = [*(set(stage.resident) for stage in plan.stages), set(plan.placement.resident)]
    assert all(later < earlier for earlier, later in pairwise(resident))
    assert all(target.num_layers - len(each) > plan.placement.slots for each in resident[:-1])
    assert all(nbytes <= plan.device_bytes <= plan.vram_bytes for nbytes in stage_bytes(plan, target, draft))


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_short_chat_keeps_the_layers_of_a_short_context(device: str):
    plan, short = plan_of(8192, device), plan_of(1024, device)
    check(plan, LARGE, None)
    assert len(plan.first_stage.resident) >= len(short.placement.resident) - 1
    assert len(plan.first_stage.resident) >= len(plan.placement.resident) + 5
    assert not short.stages and short.first_stage.resident == short.placement.resident


def test_every_stage_could_hold_no_more():
    """Half the freed memory of a layer is never left unused: the next layer does not fit."""
    plan = plan_of(16384)
    check(plan, LARGE, None)
    assert len(plan.stages) > 5
    assert all(plan.device_bytes - nbytes < 400 * MIB for nbytes in stage_bytes(plan, LARGE, None))


def test_plans_of_several_seats_and_without_streaming_have_no_stages():
    plan = plan_of(8192)
    assert with_stages(replace(plan, work=replace(plan.work, seats=2), stages=()), LARGE, None).stages == ()
    everything = replace(plan.placement, resident=tuple(range(80)), slots=0)
    assert with_stages(replace(plan, placement=everything, stages=()), LARGE, None).stages == ()


@settings(max_examples=30)
@given(target=specs(), budget=st.integers(1 << 20, 1 << 28), on_cpu=st.booleans())
def test_no_stage_takes_more_than_the_plan(target: ModelSpec, budget: int, *, on_cpu: bool):
    request = asking(REQUEST, dtype="fp32", ctx=min(target.max_positions, 9000), vram_bytes=budget)
    machine = Machine("cpu" if on_cpu else "cuda:0", budget, available(1 << 30), fast_bf16=False)
    try:
        plan = plan_for(request, machine, target, None)
    except DoesNotFitError:
        return
    check(plan, target, None)


def test_layers_of_a_short_chat_are_spread_evenly():
    """Else the slots are full while resident layers are computed one after another, and the link idles."""
    plan = plan_of(8192)
    for stage in plan.stages:
        rows = "".join("r" if index in stage.resident else "s" for index in range(80))
        assert max(map(len, rows.split("s"))) <= 3 and max(map(len, rows.split("r"))) <= 3
        assert rows[-1] == "s"


@given(st.integers(2, 80), st.data())
def test_any_number_of_further_layers_is_found(num_layers: int, data: st.DataObject):
    held = data.draw(st.integers(0, num_layers - 2))
    count = data.draw(st.integers(1, num_layers - 1 - held))
    later = interleaved(held, num_layers)
    found = _spread(later, count, num_layers, data.draw(st.integers(0, 1)))
    assert set(later) < set(found) and len(found) == held + count and num_layers - 1 not in found
