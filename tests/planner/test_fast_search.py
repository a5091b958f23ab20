"""The search against an obvious one: everything tried, every ledger and every size of tree worked out anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support.loading import plan_request
from support.planning import UNKNOWN_RATES, specs

from specchat.hardware.machine import Machine, MatmulRate
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.geometry import layer_sizes
from specchat.planner.candidates import (
    CHUNK_ROWS,
    CUDA_RESERVE_BYTES,
    DRAFT_ROWS_PER_NODE,
    TREE_BUDGETS,
    Candidate,
    Candidates,
)
from specchat.planner.cost import Acceptance, CostModel, Prediction
from specchat.planner.memory import build_ledger, bytes_beside_layers, host_embedding_bytes
from specchat.planner.placement import TierSizes, interleaved, usable_ram
from specchat.planner.rates import Rate
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.records.model import ModelSource, ModelSpec, ParamSize
from specchat.records.plan import Placement, Workload

MIB = 1 << 20
GIB = 1 << 30
NAMELESS = ModelSource("any", demo_source("target").path)

# --- the obvious search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obvious:
    """One way to run a pair."""

    draft: ModelSpec | None
    work: Workload
    placement: Placement
    prediction: Prediction


def kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def ways(request: PlanRequest, known: PlanInputs, target: ModelSpec) -> list[Obvious]:
    drafts = [known.draft] if known.draft is None or not request.draft_is_open else [known.draft, None]
    drafts[1:1] = known.lower_drafts if known.draft is not None else ()
    return [way for draft in drafts for way in ways_with(request, known, target, draft)]


def ways_with(request: PlanRequest, known: PlanInputs, target: ModelSpec, draft: ModelSpec | None) -> list[Obvious]:
    """At the longest context at which there are any."""
    ctx = min(target.max_positions, 8192) if request.choices.ctx is None else request.choices.ctx
    while True:
        found = [
            placed(request, known, target, draft, work, placement)
            for work, placement in fitting(request, known, target, draft, ctx)
        ]
        if found or request.choices.ctx is not None or ctx <= 512:
            return found
        ctx = max(ctx // 2, 512)


def fitting(
    request: PlanRequest, known: PlanInputs, target: ModelSpec, draft: ModelSpec | None, ctx: int
) -> Iterator[tuple[Workload, Placement]]:
    """For every size of trees and every number of slots, the most layers; embeddings move where more then stay."""
    open_budgets = (
        TREE_BUDGETS[kind(known.machine.device)]
        if request.choices.tree_budget is None
        else (request.choices.tree_budget,)
    )
    for tree_budget in open_budgets if draft is not None else (0,):
        found = []
        for slots in (2, 3) if request.choices.slots is None else (request.choices.slots,):
            ways = [
                most_resident(request, target, draft, workload(request, known, ctx, tree_budget, apart), slots)
                for apart in (False, True)
                if not apart or can_lend_embeddings(request, known, target)
            ]
            stay = [-1 if way is None else len(way[1].resident) for way in ways]
            found += [way for i, way in enumerate(ways) if way is not None and stay[i] > max([-1, *stay[:i]])]
        yield from dict.fromkeys(found)


def can_lend_embeddings(request: PlanRequest, known: PlanInputs, target: ModelSpec) -> bool:
    if known.machine.device == "cpu" or not target.lookup_params:
        return False
    taken = host_embedding_bytes(target, workload(request, known, 1, 0, True))
    return taken <= usable_ram(known.machine.ram_available_bytes)


def workload(request: PlanRequest, known: PlanInputs, ctx: int, tree_budget: int, apart: bool) -> Workload:
    device = known.machine.device
    return Workload(
        dtype=request.choices.dtype,  # type: ignore[arg-type]
        ctx=ctx,
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        device=device,
        reserve_bytes=0 if device == "cpu" else CUDA_RESERVE_BYTES,
        host_embeddings=apart,
    )


def most_resident(
    request: PlanRequest, target: ModelSpec, draft: ModelSpec | None, work: Workload, slots: int
) -> tuple[Workload, Placement] | None:
    layers = target.num_layers
    for count in range(layers, -1, -1):
        if 0 < layers - count <= slots:
            continue  # they might as well stay
        tried = Placement(layers, interleaved(count, layers), (), slots if count < layers else 0)
        if ledger_bytes(target, draft, work, tried) <= request.choices.vram_bytes:  # type: ignore[operator]
            return work, tried
    return None


def ledger_bytes(target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: Placement) -> int:
    return sum(item.bytes for item in build_ledger(target, draft, work, placement))


def placed(
    request: PlanRequest,
    known: PlanInputs,
    target: ModelSpec,
    draft: ModelSpec | None,
    work: Workload,
    placement: Placement,
) -> Obvious:
    sizes = layer_sizes(target, work.dtype)
    streamed = [i for i in range(target.num_layers) if i not in placement.resident]
    on_cpu = known.machine.device == "cpu"
    taken = ledger_bytes(target, draft, work, placement) if on_cpu else host_embedding_bytes(target, work)
    room = min(max(usable_ram(known.machine.ram_available_bytes) - taken, 0), request.choices.ram_bytes or 0)
    subsets = ([streamed[j] for j in interleaved(n, len(streamed))] for n in range(len(streamed), -1, -1))
    in_ram = next(subset for subset in subsets if sum(sizes[i] for i in subset) <= room)
    ram_bytes = sum(sizes[i] for i in in_ram)
    disk_bytes = sum(sizes[i] for i in streamed) - ram_bytes
    num_on_disk = len(streamed) - len(in_ram)
    tiers = TierSizes(target.num_layers, len(in_ram), num_on_disk, ram_bytes, disk_bytes, placement.slots)
    most = work.tree_budget
    trees = (
        [n for n in range(1, most + 1) if n & (n - 1) == 0 or n == most]
        if request.choices.tree_budget is None
        else [most]
    )
    predictions = [predicted(known, target, draft, work, tiers, nodes) for nodes in trees or [0]]
    where = replace(placement, in_ram=tuple(in_ram))
    return Obvious(draft, work, where, max(predictions, key=lambda each: each.tok_per_s))


def predicted(
    known: PlanInputs, target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: TierSizes, nodes: int
) -> Prediction:
    model = CostModel(
        target, draft, work.dtype, work.device, known.rates, known.acceptance(target, draft, samples=False)
    )
    return model.predict(placement, nodes, adaptive=False)


def best_of(found: Sequence[Obvious]) -> Obvious | None:
    """The fastest; of equally fast ones with a draft as it is, the usual size of trees, and fewer slots."""

    def rank(way: Obvious) -> tuple[float, ...]:
        usual = TREE_BUDGETS[kind(way.work.device)]
        nodes = way.work.tree_budget
        is_lower = way.draft is not None and way.draft.quant in ("int8", "int4")
        return (
            round(way.prediction.tok_per_s, 6),
            -is_lower,
            -(usual.index(nodes) if nodes in usual else 0),
            -way.placement.slots,
        )

    return max(found, key=rank, default=None)


# --- against it ------------------------------------------------------------------------------------------------------


def rates(disk: float, host: float, memory: float, few: float, many: float, layer_s: float):
    return replace(
        UNKNOWN_RATES,
        disk=Rate(disk, "measured"),
        pinned=Rate(host, "typical"),
        memory=Rate(memory, "typical"),
        matmul=(MatmulRate(1, few), MatmulRate(64, many), MatmulRate(512, many)),
        layer_s=layer_s,
    )


# Bytes more than what so many layers take.
NEARLY = st.sampled_from([-1, 0, 1, 10_000])
POWERS = st.floats(6, 11).map(lambda power: 10**power)
RATES = st.builds(rates, POWERS, POWERS, POWERS, POWERS, POWERS, st.floats(-7, -2).map(lambda power: 10**power))


def deeper(spec: ModelSpec) -> ModelSpec:
    """Three times as many layers: of a few none stream."""
    return replace(
        spec, num_layers=3 * spec.num_layers, layer_params=3 * spec.layer_params, kv_shapes=3 * spec.kv_shapes
    )


def lowered(spec: ModelSpec, quant: str) -> ModelSpec:
    params = tuple(tuple(ParamSize(size.count, 1) for size in layer) for layer in spec.layer_params)
    return replace(spec, quant=quant, layer_params=params)


@st.composite
def questions(draw: st.DrawFn) -> tuple[PlanRequest, PlanInputs, ModelSpec]:
    """What may be asked on any machine, for any pair; what else is needed leaves room for some layers of most."""
    device = draw(st.sampled_from(["cpu", "cuda:0"]))
    target, draft = deeper(draw(specs())), draw(specs() | st.none())
    lower = () if draft is None else draw(st.sampled_from([(), (lowered(draft, "int8"),)]))
    request = plan_request(
        target=NAMELESS,
        draft=None,
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
        ctx=draw(st.none() | st.integers(1, 512)),
        tree_budget=draw(st.sampled_from([None, None, None, 1, 48])),
        slots=draw(st.sampled_from([None, None, None, 1, 4])),
        draft_is_open=draw(st.booleans()),
    )
    beside = beside_layers(request, device, target, draft, draw(st.sampled_from([32, 64, 512])))
    sizes = layer_sizes(target, request.choices.dtype)  # type: ignore[arg-type]
    num_resident = draw(st.integers(0, target.num_layers))
    resident = interleaved(num_resident, target.num_layers)
    streamed = [size for i, size in enumerate(sizes) if i not in resident]
    in_ram = interleaved(draw(st.integers(0, len(streamed))), len(streamed))
    choices = replace(
        request.choices,
        vram_bytes=beside + sum(sizes) - sum(streamed) + 2 * max(streamed, default=0) + draw(NEARLY),
        ram_bytes=max(sum(streamed[j] for j in in_ram) + draw(NEARLY), 0),
    )
    request = replace(request, choices=choices)
    known = PlanInputs(
        machine=Machine(device, 64 * GIB, draw(st.sampled_from([0, 4 * GIB + beside + sum(sizes), 64 * GIB])), True),
        rates=draw(RATES),
        typical=UNKNOWN_RATES,
        target=lambda _: target,
        draft=draft,
        prior=Acceptance(draw(st.floats(0.1, 4)), draw(st.floats(0.5, 3)), "typical"),
        lower_drafts=lower,
    )
    return request, known, target


def beside_layers(request: PlanRequest, device: str, target: ModelSpec, draft: ModelSpec | None, nodes: int) -> int:
    """With trees of so many nodes, at the context asked for or the shortest that is tried."""
    nodes = nodes if draft is not None else 0
    reserve = 0 if device == "cpu" else CUDA_RESERVE_BYTES
    dtype, ctx = request.choices.dtype, request.choices.ctx or 512
    work = Workload(device, dtype, ctx, nodes, DRAFT_ROWS_PER_NODE * nodes, CHUNK_ROWS, reserve)  # type: ignore[arg-type]
    return ledger_bytes(target, draft, work, Placement(target.num_layers, ()))


def shown(candidate: Candidate, request: PlanRequest, known: PlanInputs) -> Obvious:
    plan = candidate.plan(request.choices, known.machine)
    work = candidate.work
    assert plan.ledger == build_ledger(candidate.target, candidate.draft, work, plan.placement)
    return Obvious(candidate.draft, work, plan.placement, candidate.prediction)


@given(question=questions())
@settings(deadline=None, max_examples=120)
def test_the_search_finds_what_trying_everything_finds(question: tuple[PlanRequest, PlanInputs, ModelSpec]):
    """To the last bit: the best, and what is best without any part of it."""
    request, known, target = question
    expected = ways(request, known, target)
    best = Candidates(request, known, target).best
    assert (best and shown(best, request, known)) == best_of(expected)
    found = [shown(each, request, known) for each in Candidates(request, known, target).all]
    assert found == expected
    assert all(each.tok_per_s == each.prediction.tok_per_s for each in Candidates(request, known, target).all)


@given(question=questions())
@settings(deadline=None, max_examples=50)
def test_nothing_is_faster_than_if_all_layers_stayed(question: tuple[PlanRequest, PlanInputs, ModelSpec]):
    request, known, target = question
    found = Candidates(request, known, target).all
    for each in found:
        budget = each.work.tree_budget
        assert each.tok_per_s <= each.model.most_tok_per_s(budget, adaptive=each.adaptive)


# --- memory ----------------------------------------------------------------------------------------------------------


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    tree_budget = draw(st.integers(0, 600))
    return Workload(
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
        ctx=draw(st.integers(1, 5000)),
        tree_budget=tree_budget,
        draft_rows=2 * tree_budget,
        chunk_rows=512,
        device=draw(st.sampled_from(["cpu", "cuda:0"])),
        reserve_bytes=draw(st.sampled_from([0, CUDA_RESERVE_BYTES])),
        host_embeddings=draw(st.booleans()),
    )


@given(target=specs(), draft=st.none() | specs(), work=workloads())
@settings(deadline=None, max_examples=100)
def test_what_is_beside_layers_adds_up_to_the_ledger(target: ModelSpec, draft: ModelSpec | None, work: Workload):
    assert bytes_beside_layers(target, draft, work) == ledger_bytes(
        target, draft, work, Placement(target.num_layers, ())
    )


@given(target=specs(), draft=st.none() | specs(), work=workloads(), more=st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_longer_contexts_and_larger_trees_never_take_less(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, more: int
):
    """What does not fit with the least of both fits with none."""
    tree_budget = work.tree_budget + more
    before = bytes_beside_layers(target, draft, work)
    assert bytes_beside_layers(target, draft, replace(work, ctx=work.ctx + more)) >= before
    larger = replace(work, tree_budget=tree_budget, draft_rows=2 * tree_budget)
    assert bytes_beside_layers(target, draft, larger) >= before
