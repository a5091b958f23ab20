"""The search against an exhaustive one that builds every ledger and predicts every tree size anew."""

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
from specchat.planner.acceptance import Acceptance
from specchat.planner.candidate import Candidate
from specchat.planner.candidates import Candidates
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.memory import build_ledger, bytes_beside_layers, host_embedding_bytes
from specchat.planner.placement import TierSizes, interleaved, usable_ram
from specchat.planner.rates import Rate
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.workload import CHUNK_ROWS, CUDA_RESERVE_BYTES, DRAFT_ROWS_PER_NODE, TREE_BUDGETS
from specchat.records.model import ModelSource, ModelSpec, ParamSize
from specchat.records.plan import Placement, Workload

MIB = 1 << 20
GIB = 1 << 30
NAMELESS = ModelSource("any", demo_source("target").path)

# --- exhaustive search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One configuration of a pair."""

    draft: ModelSpec | None
    work: Workload
    placement: Placement
    prediction: Prediction


def kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def variants(request: PlanRequest, inputs: PlanInputs, target: ModelSpec) -> list[Configuration]:
    drafts = [inputs.draft] if inputs.draft is None or not request.draft_is_open else [inputs.draft, None]
    drafts[1:1] = inputs.lower_drafts if inputs.draft is not None else ()
    return [variant for draft in drafts for variant in variants_with(request, inputs, target, draft)]


def variants_with(
    request: PlanRequest, inputs: PlanInputs, target: ModelSpec, draft: ModelSpec | None
) -> list[Configuration]:
    """Return the configurations at the longest context that fits."""
    ctx = min(target.max_positions, 8192) if request.choices.ctx is None else request.choices.ctx
    while True:
        found = [
            placed(request, inputs, target, draft, work, placement)
            for work, placement in fitting(request, inputs, target, draft, ctx)
        ]
        if found or request.choices.ctx is not None or ctx <= 512:
            return found
        ctx = max(ctx // 2, 512)


def fitting(
    request: PlanRequest, inputs: PlanInputs, target: ModelSpec, draft: ModelSpec | None, ctx: int
) -> Iterator[tuple[Workload, Placement]]:
    """Yield most resident layers per tree size and slot count; embeddings move if more layers then stay."""
    open_budgets = (
        TREE_BUDGETS[kind(inputs.machine.device)]
        if request.choices.tree_budget is None
        else (request.choices.tree_budget,)
    )
    for tree_budget in open_budgets if draft is not None else (0,):
        found = []
        for slots in (2, 3) if request.choices.slots is None else (request.choices.slots,):
            variants = [
                most_resident(request, target, draft, workload(request, inputs, ctx, tree_budget, on_host), slots)
                for on_host in (False, True)
                if not on_host or can_move_embeddings(request, inputs, target)
            ]
            stay = [-1 if variant is None else len(variant[1].resident) for variant in variants]
            found += [
                variant for i, variant in enumerate(variants) if variant is not None and stay[i] > max([-1, *stay[:i]])
            ]
        yield from dict.fromkeys(found)


def can_move_embeddings(request: PlanRequest, inputs: PlanInputs, target: ModelSpec) -> bool:
    if inputs.machine.device == "cpu" or not target.lookup_params:
        return False
    taken = host_embedding_bytes(target, workload(request, inputs, 1, 0, True))
    return taken <= usable_ram(inputs.machine.ram_available_bytes)


def workload(request: PlanRequest, inputs: PlanInputs, ctx: int, tree_budget: int, on_host: bool) -> Workload:
    device = inputs.machine.device
    return Workload(
        dtype=request.choices.dtype,  # type: ignore[arg-type]
        ctx=ctx,
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        device=device,
        reserve_bytes=0 if device == "cpu" else CUDA_RESERVE_BYTES,
        head_rows=head_rows(device),
        host_embeddings=on_host,
    )


def head_rows(device: str) -> int:
    return 8 if device == "cpu" else 32


def most_resident(
    request: PlanRequest, target: ModelSpec, draft: ModelSpec | None, work: Workload, slots: int
) -> tuple[Workload, Placement] | None:
    layers = target.num_layers
    for count in range(layers, -1, -1):
        if 0 < layers - count <= slots:
            continue  # these layers could be resident instead
        tried = Placement(layers, interleaved(count, layers), (), slots if count < layers else 0)
        if ledger_bytes(target, draft, work, tried) <= request.choices.vram_bytes:  # type: ignore[operator]
            return work, tried
    return None


def ledger_bytes(target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: Placement) -> int:
    return sum(item.bytes for item in build_ledger(target, draft, work, placement))


def placed(
    request: PlanRequest,
    inputs: PlanInputs,
    target: ModelSpec,
    draft: ModelSpec | None,
    work: Workload,
    placement: Placement,
) -> Configuration:
    sizes = layer_sizes(target, work.dtype)
    streamed = [i for i in range(target.num_layers) if i not in placement.resident]
    on_cpu = inputs.machine.device == "cpu"
    taken = ledger_bytes(target, draft, work, placement) if on_cpu else host_embedding_bytes(target, work)
    room = min(max(usable_ram(inputs.machine.ram_available_bytes) - taken, 0), request.choices.ram_bytes or 0)
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
    predictions = [predicted(inputs, target, draft, work, tiers, nodes) for nodes in trees or [0]]
    where = replace(placement, in_ram=tuple(in_ram))
    return Configuration(draft, work, where, max(predictions, key=lambda each: each.tok_per_s))


def predicted(
    inputs: PlanInputs, target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: TierSizes, nodes: int
) -> Prediction:
    model = CostModel(
        target, draft, work.dtype, work.device, inputs.rates, inputs.acceptance(target, draft, samples=False)
    )
    return model._step(placement, nodes, work.tree_budget)  # the budget decides how wide draft passes are


def best_of(found: Sequence[Configuration]) -> Configuration | None:
    """Return the fastest; ties prefer an unquantized draft, the default tree size, then fewer slots."""

    def rank(variant: Configuration) -> tuple[float, ...]:
        usual = TREE_BUDGETS[kind(variant.work.device)]
        nodes = variant.work.tree_budget
        is_lower = variant.draft is not None and variant.draft.quant in ("int8", "int4")
        return (
            round(variant.prediction.tok_per_s, 6),
            -is_lower,
            -(usual.index(nodes) if nodes in usual else 0),
            -variant.placement.slots,
        )

    return max(found, key=rank, default=None)


# --- comparisons -----------------------------------------------------------------------------------------------------


def rates(disk: float, host: float, memory: float, few: float, many: float, layer_s: float):
    return replace(
        UNKNOWN_RATES,
        disk=Rate(disk, "measured"),
        pinned=Rate(host, "typical"),
        memory=Rate(memory, "typical"),
        matmul=(MatmulRate(1, few), MatmulRate(64, many), MatmulRate(512, many)),
        layer_s=layer_s,
    )


# Bytes by which a budget differs from an exact fit.
NEARLY = st.sampled_from([-1, 0, 1, 10_000])
POWERS = st.floats(6, 11).map(lambda power: 10**power)
RATES = st.builds(rates, POWERS, POWERS, POWERS, POWERS, POWERS, st.floats(-7, -2).map(lambda power: 10**power))


def deeper(spec: ModelSpec) -> ModelSpec:
    """Triple the layers; models with few layers never stream."""
    return replace(
        spec, num_layers=3 * spec.num_layers, layer_params=3 * spec.layer_params, kv_shapes=3 * spec.kv_shapes
    )


def lowered(spec: ModelSpec, quant: str) -> ModelSpec:
    params = tuple(tuple(ParamSize(size.count, 1) for size in layer) for layer in spec.layer_params)
    return replace(spec, quant=quant, layer_params=params)


@st.composite
def questions(draw: st.DrawFn) -> tuple[PlanRequest, PlanInputs, ModelSpec]:
    """Draw a request, a machine and a pair; most budgets fit some of the layers."""
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
    inputs = PlanInputs(
        machine=Machine(device, 64 * GIB, draw(st.sampled_from([0, 4 * GIB + beside + sum(sizes), 64 * GIB])), True),
        rates=draw(RATES),
        typical=UNKNOWN_RATES,
        target=lambda _: target,
        draft=draft,
        prior=Acceptance(draw(st.floats(0.1, 4)), draw(st.floats(0.5, 3)), "typical"),
        lower_drafts=lower,
    )
    return request, inputs, target


def beside_layers(request: PlanRequest, device: str, target: ModelSpec, draft: ModelSpec | None, nodes: int) -> int:
    """Return bytes besides layers, with trees of `nodes` nodes, at the requested or the shortest context."""
    nodes = nodes if draft is not None else 0
    reserve = 0 if device == "cpu" else CUDA_RESERVE_BYTES
    dtype, ctx = request.choices.dtype, request.choices.ctx or 512
    work = Workload(
        device,
        dtype,  # type: ignore[arg-type]
        ctx,
        nodes,
        DRAFT_ROWS_PER_NODE * nodes,
        CHUNK_ROWS,
        reserve,
        head_rows(device),
    )
    return ledger_bytes(target, draft, work, Placement(target.num_layers, ()))


def shown(candidate: Candidate, request: PlanRequest, inputs: PlanInputs) -> Configuration:
    plan = candidate.plan(request.choices, inputs.machine)
    work = candidate.work
    assert plan.ledger == build_ledger(candidate.target, candidate.draft, work, plan.placement)
    return Configuration(candidate.draft, work, plan.placement, candidate.prediction)


@given(question=questions())
@settings(deadline=None, max_examples=60)
def test_the_search_equals_an_exhaustive_search(question: tuple[PlanRequest, PlanInputs, ModelSpec]):
    """Compare the best candidate and all candidates, to the last bit."""
    request, inputs, target = question
    expected = variants(request, inputs, target)
    best = Candidates(request, inputs, target).best
    assert (best and shown(best, request, inputs)) == best_of(expected)
    found = [shown(each, request, inputs) for each in Candidates(request, inputs, target).all]
    assert found == expected
    assert all(each.tok_per_s == each.prediction.tok_per_s for each in Candidates(request, inputs, target).all)


@given(question=questions())
@settings(deadline=None, max_examples=50)
def test_no_candidate_exceeds_the_speed_bound(question: tuple[PlanRequest, PlanInputs, ModelSpec]):
    request, inputs, target = question
    found = Candidates(request, inputs, target).all
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
def test_bytes_beside_layers_equal_the_ledger_without_layers(
    target: ModelSpec, draft: ModelSpec | None, work: Workload
):
    assert bytes_beside_layers(target, draft, work) == ledger_bytes(
        target, draft, work, Placement(target.num_layers, ())
    )


@given(target=specs(), draft=st.none() | specs(), work=workloads(), more=st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_memory_never_shrinks_with_context_or_tree_size(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, more: int
):
    """If the shortest context and smallest tree do not fit, nothing does."""
    tree_budget = work.tree_budget + more
    before = bytes_beside_layers(target, draft, work)
    assert bytes_beside_layers(target, draft, replace(work, ctx=work.ctx + more)) >= before
    larger = replace(work, tree_budget=tree_budget, draft_rows=2 * tree_budget)
    assert bytes_beside_layers(target, draft, larger) >= before
