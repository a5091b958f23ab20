"""Every plan that fits, with its predicted speed, of a target in one precision.

What is open: whether to draft, the size of trees, slots, which layers stay, and the context where nothing larger fits.
Everything that the user has settled stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from specchat.config import DTYPE_BYTES, Dtype, ModelSpec, Plan
from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.geometry import layer_bytes
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.memory import Workload, build_host_ledger, build_ledger, host_embedding_bytes, host_embeddings
from specchat.planner.placement import Placed, Placement, Shelves, keep_in_ram, usable_ram
from specchat.planner.request import EXACT_BYTES, LOWER_QUANTS, Known, PlanRequest
from specchat.units import GIB, MIB, format_bytes

DEFAULT_CTX = 8192
_LEAST_CTX = 512
# The most nodes of a tree whose size follows what its nodes pay (engine/growth.py), the usual one first. A GPU computes
# hundreds of rows while a layer is on its way; on two CPU cores 128 rows take longer than the disk.
TREE_BUDGETS = {"cpu": (128, 64, 32, 16), "cuda": (256, 512, 128, 64, 32)}
CHUNK_ROWS = 512
# What cuBLAS keeps for itself and what the allocator of CUDA memory rounds up; not measured on a GPU yet.
CUDA_RESERVE_BYTES = 96 * MIB
# An expanded node may drop out of the tree again, so the draft may spend more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


@dataclass(frozen=True)
class Candidate:
    """A plan that fits, before it is written out."""

    target: ModelSpec
    draft: ModelSpec | None
    work: Workload
    resident: tuple[int, ...]
    in_ram: tuple[int, ...]
    budget_bytes: int
    prediction: Prediction

    @property
    def num_streamed(self) -> int:
        """Layers that are streamed."""
        return self.target.num_layers - len(self.resident)

    def plan(self, request: PlanRequest, machine: Machine) -> Plan:
        """The plan itself."""
        target, draft, work = self.target, self.draft, self.work
        kept = set(self.resident)
        sizes = {i: layer_bytes(target, i, work.dtype) for i in range(target.num_layers) if i not in kept}
        embeddings = host_embeddings(target, work)
        beside_gpu = _host_bytes(sizes, self.in_ram, work.slots) + host_embedding_bytes(target, work)
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            device=machine.device,
            dtype=work.dtype,
            ctx=work.ctx,
            tree_budget=work.tree_budget,
            draft_rows=work.draft_rows,
            slots=work.slots,
            resident=self.resident,
            num_layers=target.num_layers,
            chunk_rows=work.chunk_rows,
            ledger=build_ledger(target, draft, work, self.resident),
            device_budget_bytes=self.budget_bytes,
            adaptive=request.tree_budget is None,
            draft_quant="none" if draft is None else draft.quant,
            lowered_from=target.dtype if request.quant == "auto" and target.quant in LOWER_QUANTS else None,
            host_bytes=0 if machine.device == "cpu" else beside_gpu,
            streamed_bytes_per_step=sum(sizes.values()),
            in_ram=self.in_ram,
            host_ledger=build_host_ledger(sizes, self.in_ram, work.slots, machine.device, embeddings),
            host_embeddings=work.host_embeddings,
        )


def preference(candidate: Candidate) -> tuple[float, ...]:
    """Larger is better: speed, then a draft as it is, the usual size of trees, and what takes least memory."""
    budgets = TREE_BUDGETS["cpu" if candidate.work.device == "cpu" else "cuda"]
    budget = candidate.work.tree_budget
    rank = budgets.index(budget) if budget in budgets else 0
    is_lower = candidate.draft is not None and candidate.draft.quant in LOWER_QUANTS
    speed = round(candidate.prediction.tok_per_s, 6)  # equal ones differ in how they were added up
    return speed, -is_lower, -rank, -candidate.work.slots


def candidates(request: PlanRequest, known: Known, target: ModelSpec) -> list[Candidate]:
    """Everything that fits, with a draft and without, each at the longest context at which any of it does.

    Raises:
        DoesNotFitError: nothing does.
        UsageError: a context the model has no positions for.
    """
    budget = request.vram_bytes if request.vram_bytes is not None else _default_budget(known.machine)
    dtype = dtype_for(request, known.machine, target)
    shelves = Shelves(target, dtype, request.slots, _embeddings_room(known.machine))
    found = [
        candidate
        for draft in _drafts(request, known)
        for candidate in _with_draft(request, replace(known, draft=draft), target, shelves, budget)
    ]
    if found:
        return found
    raise _does_not_fit(request, known, target, shelves, budget)


def fastest(request: PlanRequest, known: Known, target: ModelSpec) -> Candidate | None:
    """The best candidate; None where nothing fits."""
    try:
        return max(candidates(request, known, target), key=preference)
    except DoesNotFitError:
        return None


def _with_draft(
    request: PlanRequest, known: Known, target: ModelSpec, shelves: Shelves, budget: int
) -> list[Candidate]:
    """All that fits at the longest context; a default context is halved before giving up."""
    draft = known.draft
    model = CostModel(target, draft, shelves.dtype, known.machine.device, known.rates, known.acceptance(target))
    for ctx in _contexts(request, target):
        works = _workloads(request, known, shelves.dtype, ctx)
        placed = [each for work in works for each in shelves.fill(draft, work, budget)]
        if placed:
            tiered = [(each, *_predicted(request, known, model, shelves, each)) for each in placed]
            return [
                Candidate(target, draft, each.work, each.resident, in_ram, budget, prediction)
                for each, in_ram, prediction in tiered
            ]
    return []


def _drafts(request: PlanRequest, known: Known) -> list[ModelSpec | None]:
    if known.draft is None:
        return [None]
    return [known.draft, *known.lower_drafts, *((None,) if request.draft_is_open else ())]


def _contexts(request: PlanRequest, target: ModelSpec) -> Iterator[int]:
    """Lengths to try, the longest first."""
    ctx = usual_ctx(request, target)
    yield ctx
    while request.ctx is None and ctx > _LEAST_CTX:
        ctx = max(ctx // 2, _LEAST_CTX)
        yield ctx


def usual_ctx(request: PlanRequest, target: ModelSpec) -> int:
    """What is asked for, or the default as far as the model goes.

    Raises:
        UsageError: the model has no positions for what is asked for.
    """
    if request.ctx is None:
        return min(target.max_positions, DEFAULT_CTX)
    if request.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.ctx:,} is beyond the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    return request.ctx


def _workloads(request: PlanRequest, known: Known, dtype: Dtype, ctx: int) -> list[Workload]:
    """One for each size of trees that is open."""
    on_cpu = known.machine.device == "cpu"
    open_budgets = TREE_BUDGETS["cpu" if on_cpu else "cuda"]
    budgets = open_budgets if request.tree_budget is None else (request.tree_budget,)
    return [
        Workload(
            dtype=dtype,
            ctx=ctx,
            tree_budget=budget,
            draft_rows=DRAFT_ROWS_PER_NODE * budget,
            chunk_rows=CHUNK_ROWS,
            slots=0,
            device=known.machine.device,
            reserve_bytes=0 if on_cpu else CUDA_RESERVE_BYTES,
        )
        for budget in ((0,) if known.draft is None else budgets)
    ]


def _predicted(
    request: PlanRequest, known: Known, model: CostModel, shelves: Shelves, placed: Placed
) -> tuple[tuple[int, ...], Prediction]:
    """Which streamed layers stay in host memory, and how fast that is."""
    kept = set(placed.resident)
    sizes = {i: size for i, size in enumerate(shelves.sizes) if i not in kept}
    on_cpu = known.machine.device == "cpu"
    taken = placed.device_bytes if on_cpu else host_embedding_bytes(shelves.target, placed.work)
    in_ram = keep_in_ram(sizes, _host_room(request, known.machine, taken=taken))
    ram_bytes = sum(sizes[i] for i in in_ram)
    placement = Placement(
        num_layers=len(shelves.sizes),
        num_in_ram=len(in_ram),
        num_on_disk=len(sizes) - len(in_ram),
        ram_bytes=ram_bytes,
        disk_bytes=sum(sizes.values()) - ram_bytes,
        slots=placed.work.slots,
    )
    return in_ram, model.predict(placement, placed.work.tree_budget, adaptive=request.tree_budget is None)


def _does_not_fit(
    request: PlanRequest, known: Known, target: ModelSpec, shelves: Shelves, budget: int
) -> DoesNotFitError:
    """With a hint that names the longest context that the budget allows."""
    least_known = replace(known, draft=_drafts(request, known)[-1])
    draft, ctx = least_known.draft, list(_contexts(request, target))[-1]
    work = min(_workloads(request, least_known, shelves.dtype, ctx), key=lambda work: work.tree_budget)
    fits, too_long = 0, ctx
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        enough = shelves.least_bytes(draft, replace(work, ctx=middle)) <= budget
        fits, too_long = (middle, too_long) if enough else (fits, middle)
    advice = "raise --vram, or lower --tree-budget" if draft is not None else "raise --vram"
    return DoesNotFitError(
        f"{target.name} needs at least {format_bytes(shelves.least_bytes(draft, work))} with --ctx {ctx:,}, "
        f"the budget is {format_bytes(budget)}",
        hint=f"--ctx {fits} would fit; else {advice}" if fits else advice,
    )


def _default_budget(machine: Machine) -> int:
    """Free memory less a reserve for everything else on the machine."""
    free = machine.device_free_bytes
    return usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def _host_room(request: PlanRequest, machine: Machine, *, taken: int) -> int:
    """Host memory for streamed layers; `taken` of what is usable is spoken for already."""
    room = max(usable_ram(machine.ram_available_bytes) - taken, 0)
    return room if request.ram_bytes is None else min(room, request.ram_bytes)


def _embeddings_room(machine: Machine) -> int:
    """Host memory for input embeddings: none where it is the device's as well."""
    return 0 if machine.device == "cpu" else usable_ram(machine.ram_available_bytes)


def _host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Host memory beside a GPU's: the layers that stay there, and slots for those that are read from the disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)


def dtype_for(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    """Of weights, activations and caches."""
    match request.dtype:
        case "bf16" | "fp16" | "fp32":
            return request.dtype
    if target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "fp32"
    if machine.device == "cpu":
        return "bf16" if target.dtype == "bf16" and machine.fast_bf16 else "fp32"
    if target.dtype == "fp16" or not machine.fast_bf16:
        return "fp16"
    return "bf16"
