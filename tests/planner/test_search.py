"""Plans stay within their budget: by the ledger for any model, in real memory for the demo pair."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from dataclasses import dataclass, replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import write
from support.loading import load_engine, plan_here, plan_request
from support.planning import UNKNOWN_RATES, available, plan_for, specs
from support.plans import changed

from specchat.engine.engine import Engine
from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.catalog.ref import demo_source
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import layer_bytes
from specchat.planner.inputs import find_inputs
from specchat.planner.memory import RUNTIME_BYTES, build_ledger
from specchat.planner.placement import NUM_SLOTS, interleaved, pinnable_ram, usable_ram
from specchat.planner.rates import Rate
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.planner.search import choose_plan, smaller_plan
from specchat.planner.workload import CUDA_RESERVE_BYTES
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, ModelSpec, ParamSize
from specchat.records.plan import Placement, Plan
from specchat.units import GIB, MIB, format_bytes

MACHINE = Machine("cpu", 64 * GIB, 64 * GIB, fast_bf16=False)
TARGET, DRAFT = demo_source("target"), demo_source("draft")

# --- which layers stay -----------------------------------------------------------------------------------------------


@given(num_layers=st.integers(1, 100), data=st.data())
@settings(deadline=None, max_examples=100)
def test_interleaved_layers_are_spread_evenly(num_layers: int, data: st.DataObject):
    """Every range of layers contains its share of resident layers, rounded up or down."""
    num_resident = data.draw(st.integers(0, num_layers))
    resident = interleaved(num_resident, num_layers)
    assert len(resident) == num_resident and list(resident) == sorted(set(resident))
    assert all(0 <= layer < num_layers for layer in resident)
    begin = data.draw(st.integers(0, num_layers))
    end = data.draw(st.integers(begin, num_layers))
    share = (end - begin) * num_resident / num_layers
    assert abs(sum(begin <= layer < end for layer in resident) - share) < 1


def test_interleaved_examples():
    assert interleaved(0, 4) == () and interleaved(4, 4) == (0, 1, 2, 3)
    assert interleaved(2, 6) == (1, 4) and interleaved(3, 4) == (0, 1, 2) and interleaved(3, 30) == (4, 14, 24)


# --- any model, on paper ---------------------------------------------------------------------------------------------


def request(vram_bytes: int | None, **kwargs: object) -> PlanRequest:
    return plan_request(target=ModelSource("any", TARGET.path), draft=None, vram_bytes=vram_bytes, **kwargs)  # type: ignore[arg-type]


def try_plan(spec: ModelSpec, draft: ModelSpec | None, vram_bytes: int, **kwargs: object) -> Plan | None:
    try:
        return plan_for(request(vram_bytes, **kwargs), MACHINE, spec, draft)
    except DoesNotFitError:
        return None


def reserve(device: str) -> int:
    return 0 if device == "cpu" else CUDA_RESERVE_BYTES


def num_slots(num_streamed: int, device: str = "cpu") -> int:
    return 0 if not num_streamed else 3 if num_streamed > 10 and device == "cpu" else 2


def ledger_bytes(
    spec: ModelSpec, draft: ModelSpec | None, plan: Plan, num_resident: int, slots: int | None = None
) -> int:
    slots = num_slots(spec.num_layers - num_resident) if slots is None else slots
    placement = Placement(spec.num_layers, interleaved(num_resident, spec.num_layers), (), slots)
    work = replace(plan.work, reserve_bytes=0)
    return sum(item.bytes for item in build_ledger(spec, draft, work, placement))


def check_plan(plan: Plan, spec: ModelSpec, draft: ModelSpec | None, budget: int) -> None:
    assert sum(item.bytes for item in plan.ledger) == plan.device_bytes <= budget == plan.vram_bytes
    assert all(item.bytes >= 0 for item in plan.ledger)
    assert plan.device_bytes == ledger_bytes(spec, draft, plan, len(plan.placement.resident), plan.placement.slots)
    assert plan.placement.resident == interleaved(len(plan.placement.resident), spec.num_layers)
    assert plan.streamed_bytes_per_step == sum(layer_bytes(spec, i, plan.work.dtype) for i in plan.placement.streamed)
    assert plan.placement.slots in ((NUM_SLOTS, 3) if plan.placement.streamed else (0,))
    assert not 0 < len(plan.placement.streamed) <= plan.placement.slots, (
        "slots for layers that could be resident instead"
    )
    assert not plan.work.host_embeddings, "a CPU has no separate host memory"
    assert plan.work.ctx <= spec.max_positions
    more = range(len(plan.placement.resident) + 1, spec.num_layers + 1)
    slots = {n: plan.placement.slots if n < spec.num_layers else 0 for n in more}
    feasible = [n for n in more if not 0 < spec.num_layers - n <= slots[n]]
    assert all(ledger_bytes(spec, draft, plan, n, slots[n]) > budget for n in feasible), "more layers could be resident"


BUDGETS = st.integers(1, 30_000_000)
# Fixed settings, so that only memory decides.
FIXED = {"tree_budget": 64, "slots": NUM_SLOTS}


@given(spec=specs(), draft=st.none() | specs(), budgets=st.tuples(BUDGETS, BUDGETS), ctx=st.sampled_from([512, 300]))
@settings(deadline=None, max_examples=100)
def test_more_budget_never_keeps_fewer_layers(
    spec: ModelSpec, draft: ModelSpec | None, budgets: tuple[int, int], ctx: int
):
    plans = [try_plan(spec, draft, budget, ctx=ctx, **FIXED) for budget in sorted(budgets)]
    for plan, budget in zip(plans, sorted(budgets), strict=True):
        if plan is not None:
            check_plan(plan, spec, draft, budget)
            assert plan.work.ctx == ctx
    little, much = plans
    if little is not None:
        assert much is not None and len(much.placement.resident) >= len(little.placement.resident)


@given(spec=specs(), draft=st.none() | specs(), budgets=st.tuples(BUDGETS, BUDGETS))
@settings(deadline=None, max_examples=100)
def test_more_budget_never_shortens_the_context(spec: ModelSpec, draft: ModelSpec | None, budgets: tuple[int, int]):
    """Halve a default context only if nothing fits; at equal context, keep at least as many layers resident."""
    little, much = (try_plan(spec, draft, budget, **FIXED) for budget in sorted(budgets))
    for plan, budget in zip((little, much), sorted(budgets), strict=True):
        if plan is not None:
            check_plan(plan, spec, draft, budget)
            longest = min(spec.max_positions, 8192)
            assert plan.work.ctx == longest or least_bytes(spec, draft, doubled(plan)) > budget
    if little is not None:
        assert much is not None and (much.work.ctx, len(much.placement.resident)) >= (
            little.work.ctx,
            len(little.placement.resident),
        )


def least_bytes(spec: ModelSpec, draft: ModelSpec | None, plan: Plan) -> int:
    """Return the least bytes over all resident counts; with unequal layers, 0 resident need not be the minimum."""
    counts = (*range(spec.num_layers - NUM_SLOTS), spec.num_layers)
    return min(ledger_bytes(spec, draft, plan, n, NUM_SLOTS if n < spec.num_layers else 0) for n in counts)


def doubled(plan: Plan) -> Plan:
    return changed(plan, ctx=2 * plan.work.ctx)


@given(spec=specs(), draft=st.none() | specs())
@settings(deadline=None, max_examples=50)
def test_the_minimum_that_an_error_names_is_enough(spec: ModelSpec, draft: ModelSpec | None):
    with pytest.raises(DoesNotFitError) as caught:
        plan_for(request(1, ctx=512, tree_budget=64), MACHINE, spec, draft)
    everything = plan_for(request(10**12, ctx=512, tree_budget=64), MACHINE, spec, draft)
    assert everything.placement.resident == tuple(range(spec.num_layers)) and everything.streamed_bytes_per_step == 0
    least = least_bytes(spec, draft, everything)
    assert f"at least {format_bytes(least)} " in caught.value.message
    assert "--vram" in (caught.value.hint or "")
    assert try_plan(spec, draft, least, ctx=512, tree_budget=64) is not None
    assert try_plan(spec, draft, least - 1, ctx=512, tree_budget=64) is None


@pytest.mark.parametrize(
    ("asked", "device", "checkpoint", "fast_bf16", "expected"),
    [
        ("auto", "cpu", "bf16", False, "fp32"),
        ("auto", "cpu", "bf16", True, "bf16"),
        ("auto", "cpu", "fp16", True, "fp32"),
        ("auto", "cuda:0", "bf16", True, "bf16"),
        ("auto", "cuda:0", "fp32", True, "bf16"),
        ("auto", "cuda:0", "fp16", True, "fp16"),
        ("auto", "cuda:0", "bf16", False, "fp16"),
        ("fp32", "cuda:0", "fp16", True, "fp32"),
        ("bf16", "cpu", "fp32", False, "bf16"),
    ],
)
def test_dtype(asked: str, device: str, checkpoint: str, fast_bf16: bool, expected: str):
    small = replace(demo_specs()[0], dtype=checkpoint)  # type: ignore[arg-type]
    large = replace(small, num_params=EXACT_BYTES)
    machine = Machine(device, 8 * GIB, 64 * GIB, fast_bf16)
    plan = plan_for(request(None, dtype=asked), machine, large, None)
    assert plan.work.dtype == expected and plan.work.device == device
    assert plan_for(request(None, dtype=asked), machine, small, None).work.dtype == (
        "fp32" if asked == "auto" else expected
    )


def test_default_budget_leaves_room_for_the_rest_of_the_machine():
    spec = demo_specs()[0]
    for device, free, budget in (("cpu", 20, 16), ("cpu", 100, 96), ("cuda:0", 8, 7)):
        machine = Machine(device, free * GIB, 100 * GIB, fast_bf16=False)
        assert plan_for(request(None), machine, spec, None).vram_bytes == budget * GIB


@pytest.mark.parametrize("total", [1.5, 2, 3, 4, 8])
def test_small_machines_have_a_budget(total: float):
    """A model of twice their memory streams."""
    free = int(0.85 * total * GIB)
    spec = demo_specs()[0]
    layer = int(2 * total * GIB / 32 / 4)
    large = replace(spec, layer_params=((ParamSize(layer),),) * 32, num_layers=32, kv_shapes=spec.kv_shapes[:1] * 32)
    machine = Machine("cpu", free, free, fast_bf16=False)
    plan = plan_for(request(None, quant="none"), machine, large, None)
    assert plan.vram_bytes == free - free // 4 and plan.device_bytes <= plan.vram_bytes
    assert plan.placement.streamed and plan.placement.resident  # some layers stay even here


# --- where streamed layers are between passes ------------------------------------------------------------------------


@given(spec=specs(), budget=BUDGETS, ram=st.integers(0, 2_000_000), device=st.sampled_from(["cpu", "cuda:0"]))
@settings(deadline=None, max_examples=100)
def test_as_many_layers_stay_in_host_memory_as_fit(spec: ModelSpec, budget: int, ram: int, device: str):
    try:
        asked = request(budget + reserve(device), ctx=512, ram_bytes=ram)
        plan = plan_for(asked, Machine(device, 64 * GIB, 64 * GIB, fast_bf16=False), spec, None)
    except DoesNotFitError:
        return
    sizes = [layer_bytes(spec, i, plan.work.dtype) for i in range(spec.num_layers)]
    on_disk = [i for i, tier in enumerate(plan.placement.tiers) if tier == "disk"]
    assert set(plan.placement.in_ram) <= set(plan.placement.streamed)
    assert [tier == "device" for tier in plan.placement.tiers] == [
        i in plan.placement.resident for i in range(spec.num_layers)
    ]
    kept_bytes = sum(sizes[i] for i in plan.placement.in_ram)
    assert kept_bytes <= ram
    more = (
        [plan.placement.streamed[j] for j in interleaved(len(plan.placement.in_ram) + 1, len(plan.placement.streamed))]
        if on_disk
        else []
    )
    assert not on_disk or sum(sizes[i] for i in more) > ram
    slots_bytes = min(plan.placement.slots, len(on_disk)) * max((sizes[i] for i in on_disk), default=0)
    host = {item.item: item.bytes for item in plan.host_ledger}
    embeddings = host.get("rows of embeddings", 0) + host.get("input embeddings", 0)
    host.pop("embeddings in the page cache", 0)
    assert plan.host_bytes == (0 if device == "cpu" else kept_bytes + slots_bytes + embeddings)
    assert host.pop("Python and libraries") == RUNTIME_BYTES
    assert host.pop("reading", 0) == (16 << 20 if on_disk else 0)
    if device == "cpu":
        assert host == ({"layers in the page cache": kept_bytes} if kept_bytes else {})
    else:
        assert sum(host.values()) == plan.host_bytes and host.get("pinned layers", 0) == kept_bytes


@given(spec=specs(), budget=BUDGETS, room=st.integers(0, 5_000_000))
@settings(deadline=None, max_examples=100)
def test_embeddings_move_to_the_host_only_if_more_layers_then_stay(spec: ModelSpec, budget: int, room: int):
    """Compare with both variants counted out; embeddings and layers in host memory fit together."""
    machine = Machine("cuda:0", 64 * GIB, available(room), fast_bf16=False)
    try:
        asked = request(budget + reserve("cuda:0"), ctx=512, dtype="fp32", slots=NUM_SLOTS)
        plan = plan_for(asked, machine, spec, None)
    except DoesNotFitError:
        return
    counts = [n for n in range(spec.num_layers + 1) if not 0 < spec.num_layers - n <= NUM_SLOTS]
    most = {
        on_host: max((n for n in counts if fits(spec, changed(plan, host_embeddings=on_host), n, budget)), default=-1)
        for on_host in (False, True)
    }
    host = {item.item: item.bytes for item in plan.host_ledger}
    assert host.pop("embeddings in the page cache", 0) == (4 * spec.lookup_params if plan.work.host_embeddings else 0)
    assert host.get("rows of embeddings", 0) == (
        2 * plan.work.chunk_rows * spec.hidden_size * 4 if plan.work.host_embeddings else 0
    )
    assert len(plan.placement.resident) == most[plan.work.host_embeddings]
    assert sum(host.get(item, 0) for item in ("rows of embeddings", "pinned layers")) <= room
    if plan.work.host_embeddings:
        assert spec.lookup_params and most[True] > most[False]
        assert "head" in {item.item for item in plan.ledger}


def fits(spec: ModelSpec, plan: Plan, num_resident: int, budget: int) -> bool:
    slots = NUM_SLOTS if num_resident < spec.num_layers else 0
    return ledger_bytes(spec, None, plan, num_resident, slots) <= budget


def test_embeddings_in_host_memory_free_device_memory_for_layers():
    """A table of three layers' size frees three layers; a converted table must fit in host memory."""
    spec = demo_specs()[0]
    layer = layer_bytes(spec, 0, "fp32")
    table = 3 * layer // 4
    large = replace(
        spec,
        layer_params=spec.layer_params[:1] * 40,
        dtype="bf16",
        num_layers=40,
        kv_shapes=spec.kv_shapes[:1] * 40,
        other_params=(*spec.other_params, ParamSize(table)),
        lookup_params=table,
    )
    tied, served = replace(large, lookup_params=0), replace(large, dtype="fp32")
    slow = replace(UNKNOWN_RATES, pinned=Rate(layer / 0.1, "measured"))

    def planned(spec: ModelSpec, vram_bytes: int, room: int) -> Plan:
        machine = Machine("cuda:0", 64 * GIB, available(room), fast_bf16=False)
        asked = request(vram_bytes + reserve("cuda:0"), ctx=512, dtype="fp32", quant="none")
        return choose_plan(asked, PlanInputs(machine, slow, slow, lambda _: spec)).plan

    enough = 64 * layer
    everything = planned(large, 100 * enough, enough)
    assert len(everything.placement.resident) == 40 and not everything.work.host_embeddings
    budget = everything.device_bytes - reserve("cuda:0") - 20 * layer
    little = 4 * table - 1
    plans = [
        planned(*each)
        for each in ((large, budget, enough), (served, budget, little), (large, budget, little), (tied, budget, enough))
    ]
    assert [plan.work.host_embeddings for plan in plans] == [True, True, False, False]
    assert [len(plan.placement.resident) for plan in plans] == [18 + 3, 18 + 3, 18, 18]
    made, mapped = ({item.item: item.bytes for item in plan.host_ledger} for plan in plans[:2])
    assert made["input embeddings"] == mapped["embeddings in the page cache"] == 4 * table
    assert plans[0].host_bytes == sum(made.values()) - RUNTIME_BYTES
    assert mapped["rows of embeddings"] + mapped["pinned layers"] <= little
    tight = planned(large, budget, 4 * table + 5 * layer)  # the size of one layer is for embedding rows
    host = {item.item: item.bytes for item in tight.host_ledger}
    assert tight.work.host_embeddings and len(tight.placement.in_ram) == 4
    assert host["input embeddings"] + host["rows of embeddings"] + host["pinned layers"] <= 4 * table + 5 * layer


def test_host_memory_leaves_room_for_the_rest_of_the_machine():
    """Leave a quarter of the available memory free, at most 4 GiB; on the CPU, also subtract the budget."""
    assert [usable_ram(free * GIB) for free in (0, 2, 4, 20, 100)] == [0, 3 * GIB // 2, 3 * GIB, 16 * GIB, 96 * GIB]
    spec = demo_specs()[0]
    layer, budget = layer_bytes(spec, 0, "fp32"), 100 * MIB
    large = replace(spec, layer_params=spec.layer_params * 40, num_layers=320, kv_shapes=spec.kv_shapes[:1] * 320)
    for device, free in (("cpu", available(budget + 3 * layer)), ("cuda:0", available(3 * layer))):
        plan = plan_for(
            request(budget + reserve(device), ctx=16, dtype="fp32"),
            Machine(device, free, free, fast_bf16=False),
            large,
            None,
        )
        assert len(plan.placement.in_ram) == 3


@pytest.mark.parametrize("total, free, pinnable", [(16, 15, 11.25), (16, 16, 12), (64, 63, 56), (64, 40, 36)])
def test_some_host_memory_is_never_pinned(total: int, free: int, pinnable: float):
    """8 GiB, or a quarter of a smaller memory; what computes on the CPU, or in a control group, pins nothing."""
    gpu = Machine("cuda:0", 8 * GIB, free * GIB, True, total_bytes=(total + 8) * GIB, device_total_bytes=8 * GIB)
    assert pinnable_ram(gpu) == pinnable * GIB
    confined = replace(gpu, is_confined=True)
    assert pinnable_ram(confined) == usable_ram(free * GIB, is_confined=True)
    assert pinnable_ram(replace(gpu, device="cpu")) == usable_ram(free * GIB)


def test_a_third_slot_is_used_when_reading_and_computing_take_equal_time():
    """Only on a CPU, and not if one of the two dominates."""
    spec = demo_specs()[0]
    many = replace(spec, layer_params=spec.layer_params * 4, num_layers=32, kv_shapes=spec.kv_shapes * 4)
    layer = layer_bytes(many, 0, "fp32")
    rates = replace(UNKNOWN_RATES, layer_s=1e-3, reading_s=0.0)
    for device, read_s, expected in (("cpu", 1.2e-3, 3), ("cpu", 0.1, 2), ("cpu", 1e-4, 2), ("cuda:0", 1.2e-3, 2)):
        slow = replace(rates, disk=Rate(layer / read_s, "measured"), pinned=Rate(layer / read_s, "measured"))
        machine = Machine(device, 64 * GIB, 64 * GIB, fast_bf16=False)
        asked = request(32 * MIB + reserve(device), ctx=16, dtype="fp32", quant="none", ram_bytes=0)
        plan = choose_plan(asked, PlanInputs(machine, slow, slow, lambda _: many)).plan
        assert plan.placement.slots == expected and len(plan.placement.streamed) > 10
    rest = plan.device_bytes - reserve("cuda:0") - (len(plan.placement.resident) + 2) * layer
    least = plan_for(request(rest + 2 * layer, ctx=16, dtype="fp32"), MACHINE, many, None)
    assert (least.placement.slots, least.placement.resident) == (2, ())


@given(spec=specs(), draft=st.none() | specs(), budget=st.integers(100_000, 3_000_000))
@settings(deadline=None, max_examples=50)
def test_the_error_names_the_longest_context_that_fits(spec: ModelSpec, draft: ModelSpec | None, budget: int):
    """Accept the --ctx of the hint, and refuse one more token."""
    asked = spec.max_positions
    with contextlib.suppress(DoesNotFitError):
        plan_for(request(budget, ctx=asked), MACHINE, spec, draft)
        return
    with pytest.raises(DoesNotFitError) as caught:
        plan_for(request(budget, ctx=asked), MACHINE, spec, draft)
    named = re.search(r"--ctx (\d+) or less", caught.value.hint or "")
    longest = int(named[1]) if named else 0
    assert longest < asked and try_plan(spec, draft, budget, ctx=longest + 1) is None
    assert not longest or try_plan(spec, draft, budget, ctx=longest) is not None


def test_smaller_plans_drop_resident_layers_before_tree_nodes():
    spec, draft = demo_specs()
    asked = plan_request(TARGET, DRAFT, device="cpu", vram_bytes=GIB, ctx=CTX, tree_budget=32)
    inputs = find_inputs(asked)
    seen = [choose_plan(asked, inputs).plan]
    with pytest.raises(DoesNotFitError, match="cannot be allocated"):
        while True:
            seen.append(smaller_plan(asked, inputs, seen[-1]))
    sizes = [each.device_bytes for each in seen]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    trees = [each.work.tree_budget for each in seen]
    assert trees == sorted(trees, reverse=True) and trees[0] == 32 and trees[-1] == 1
    whole = [each for each in seen if each.work.tree_budget == 32]
    assert {len(each.placement.resident) for each in whole} == {*range(spec.num_layers - NUM_SLOTS), spec.num_layers}
    assert all(each.work.ctx == CTX and each.draft == draft.name for each in seen)


# --- the demo pair, in memory ----------------------------------------------------------------------------------------

CTX = 512
QUESTIONS = ("Tell me a story about a fox.", "Why is the sky blue?")
SAMPLINGS = (Sampling(), Sampling(temperature=0.7, top_p=0.95, seed=3))
WEIGHTS = ("resident layers", "slots", "embeddings and head", "KV cache", "draft", "draft KV cache")
WORKSPACES = ("hidden rows", "tree mask", "activations", "head blocks", "drafting", "sampling noise")


@cache
def demo_specs() -> tuple[ModelSpec, ModelSpec]:
    return describe(TARGET), describe(DRAFT)


def demo_plan(vram_bytes: int | None, ctx: int | None = CTX) -> Plan:
    return plan_here(
        plan_request(TARGET, DRAFT, device="cpu", vram_bytes=vram_bytes, ctx=ctx, tree_budget=32, quant="none")
    )


@dataclass
class Answers:
    tokens: list[int]
    num_steps: int


def answer(engine: Engine) -> Answers:
    """Answer all questions with all samplings, and check memory after every step."""
    tokenizer = load_tokenizer(TARGET.path)
    tokens, num_steps = list[int](), 0
    for question in QUESTIONS:
        prompt = tokenizer.encode(tokenizer.render([Message("user", question)]))
        for sampling in SAMPLINGS:
            for step in engine.generate(prompt, sampling, stop_ids=frozenset({3}), max_tokens=24):
                tokens += step.token_ids
                num_steps += 1
                check_memory(engine)
    return Answers(tokens, num_steps)


def check_memory(engine: Engine) -> None:
    memory, plan = engine.memory(), engine.plan
    assert memory.device_peak_bytes <= memory.predicted_device_bytes == plan.device_bytes <= plan.vram_bytes
    assert memory.device_budget_bytes == plan.vram_bytes
    assert (memory.resident_layers, memory.streamed_layers) == (
        len(plan.placement.resident),
        len(plan.placement.streamed),
    )


@pytest.fixture(scope="module")
def unlimited() -> Answers:
    plan = demo_plan(10 * GIB)
    assert not plan.placement.streamed
    with load_engine(plan, TARGET, DRAFT) as engine:
        return answer(engine)


def budget_for(num_resident: int) -> int:
    """Return the least bytes that allow `num_resident` resident layers."""
    return ledger_bytes(*demo_specs(), demo_plan(10 * GIB), num_resident)


@pytest.mark.parametrize("num_resident", [0, 1, 2])
def test_demo_within_a_budget_that_streams_most_layers(unlimited: Answers, num_resident: int):
    plan = demo_plan(budget_for(num_resident))
    assert (
        len(plan.placement.resident) == num_resident
        and len(plan.placement.streamed) >= 0.75 * plan.placement.num_layers
    )
    ledger = {item.item: item.bytes for item in plan.ledger}
    assert set(ledger) == {*WEIGHTS, *WORKSPACES}
    assert plan.generation_bytes == sum(ledger[item] for item in ("KV cache", "draft KV cache", *WORKSPACES))
    with load_engine(plan, TARGET, DRAFT) as engine:
        # before the first pass, allocated memory equals the ledger to the byte
        assert engine.memory().device_peak_bytes == sum(ledger[item] for item in WEIGHTS)
        answers = answer(engine)
        assert engine.memory().device_peak_bytes > sum(ledger[item] for item in WEIGHTS)
    assert answers == unlimited
    assert answers.num_steps < len(answers.tokens) / 2  # several tokens a step


def test_ledger_matches_the_checkpoint_header(unlimited: Answers):
    """Count sizes from the file's header, without the planner's arithmetic."""
    plan = demo_plan(budget_for(2))
    ledger = {item.item: item.bytes for item in plan.ledger}
    layers, rest = checkpoint_numbers(TARGET)
    draft_layers, draft_rest = checkpoint_numbers(DRAFT)
    padding = 8192  # per layer: tensors start at multiples of 256, layers at pages
    assert 0 <= ledger["resident layers"] - 4 * sum(layers[i] for i in plan.placement.resident) < 2 * padding
    assert 0 <= ledger["slots"] - 4 * 2 * max(layers) < 2 * padding
    assert 0 <= ledger["embeddings and head"] - 4 * rest < 1024  # and rotary tables
    assert 0 <= ledger["draft"] - 4 * (sum(draft_layers) + draft_rest) < len(draft_layers) * padding
    config, draft_config = (json.loads((source.path / "config.json").read_text()) for source in (TARGET, DRAFT))
    assert ledger["KV cache"] == (CTX + 32) * kv_row_bytes(config)
    assert ledger["draft KV cache"] == (CTX + 64) * kv_row_bytes(draft_config)


def checkpoint_numbers(source: ModelSource) -> tuple[list[int], int]:
    """Return the number of elements per layer, and of all other tensors together."""
    with (source.path / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    layers: dict[int, int] = {}
    rest = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        count = 1
        for size in entry["shape"]:
            count *= size
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            layers[index] = layers.get(index, 0) + count
        else:
            rest += count
    return [layers[i] for i in sorted(layers)], rest


def kv_row_bytes(config: dict[str, int]) -> int:
    return 4 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def test_budget_too_small():
    with pytest.raises(DoesNotFitError) as caught:
        demo_plan(budget_for(0) - 1)
    assert format_bytes(budget_for(0)) in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(DoesNotFitError):
        demo_plan(1000, ctx=None)


def test_context_beyond_the_model():
    assert demo_plan(GIB, ctx=1024).work.ctx == demo_plan(GIB, ctx=None).work.ctx == 1024
    with pytest.raises(UsageError, match=r"1,025.*1,024") as caught:
        demo_plan(GIB, ctx=1025)
    assert not isinstance(caught.value, DoesNotFitError) and "\n" not in caught.value.message


def test_a_small_budget_shortens_a_default_context():
    least = budget_for(0)  # at 512
    plan = demo_plan(least, ctx=None)
    assert plan.work.ctx == 512 and not plan.placement.resident
    with pytest.raises(DoesNotFitError):
        demo_plan(least, ctx=1024)


def test_an_engine_with_another_budget_continues_the_same_text(unlimited: Answers):
    """The text does not depend on which layers are streamed."""
    tokenizer = load_tokenizer(TARGET.path)
    prompt = tokenizer.encode(tokenizer.render([Message("user", QUESTIONS[0])]))
    with load_engine(demo_plan(10 * GIB), TARGET, DRAFT) as engine:
        whole, _ = write(engine, prompt, SAMPLINGS[1], 24)
    with load_engine(demo_plan(budget_for(0)), TARGET, DRAFT) as engine:
        rest, steps = write(engine, [*prompt, *whole[:9]], SAMPLINGS[1], 15)
    assert rest == whole[9:] and steps[0].streamed_bytes == engine.plan.streamed_bytes_per_step
