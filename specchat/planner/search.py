"""Choosing a plan: what stays in device memory, what streams, how large context and tree are."""

from dataclasses import dataclass, replace

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec, Plan, Tier
from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.hardware.probe import find_machine
from specchat.models.geometry import describe, layer_bytes, num_params
from specchat.planner.memory import Workload, build_ledger
from specchat.units import GIB, MIB, format_bytes

DEFAULT_CTX = 8192
DEFAULT_TREE_BUDGET = 64
CHUNK_ROWS = 512
# Up to this size full precision costs nothing that a user would notice, and is exact to the token.
EXACT_BYTES = 64 * MIB
NUM_SLOTS = 2
_LEAST_CTX = 512
# What cuBLAS keeps for itself and what the allocator of CUDA memory rounds up; not measured on a GPU yet.
_CUDA_RESERVE_BYTES = 96 * MIB
# An expanded node may drop out of the tree again, so the draft may spend more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for; None and "auto" leave the choice open.

    Attributes:
        target, draft: local models; draft None is plain decoding.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" or a Dtype.
        vram_bytes: device memory budget (RAM on the CPU).
        ctx: committed tokens that the caches hold.
        tree_budget: draft nodes per tree.
        ram_bytes: cap on host memory.
    """

    target: ModelSource
    draft: ModelSource | None
    device: str = "auto"
    dtype: str = "auto"
    vram_bytes: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    ram_bytes: int | None = None


def make_plan(request: PlanRequest) -> Plan:
    """The plan for this machine and these models; nothing but configurations is read.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: a context the model has no positions for.
        DeviceUnusableError: the device asked for by name cannot be used.
    """
    machine = find_machine(request.device)
    draft = describe(request.draft) if request.draft is not None else None
    return plan_for(request, machine, describe(request.target), draft)


def plan_for(request: PlanRequest, machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """`make_plan` once everything is known; a pure function."""
    budget = request.vram_bytes if request.vram_bytes is not None else _default_budget(machine)
    work = _workload(request, machine, target, draft)
    resident, work = _fit(target, draft, work, budget, ctx_is_free=request.ctx is None)
    streamed_bytes = sum(layer_bytes(target, i, work.dtype) for i in range(target.num_layers) if i not in resident)
    return Plan(
        target=target.name,
        draft=None if draft is None else draft.name,
        quant="none",
        device=machine.device,
        dtype=work.dtype,
        ctx=work.ctx,
        tree_budget=work.tree_budget,
        draft_rows=work.draft_rows,
        slots=work.slots,
        resident=resident,
        num_layers=target.num_layers,
        chunk_rows=work.chunk_rows,
        ledger=build_ledger(target, draft, work, resident),
        device_budget_bytes=budget,
        host_bytes=0 if machine.device == "cpu" else streamed_bytes,
        streamed_bytes_per_step=streamed_bytes,
        tier=_tier(request, machine, streamed_bytes, taken=budget if machine.device == "cpu" else 0),
    )


def _default_budget(machine: Machine) -> int:
    """Free memory less a reserve for everything else on the machine."""
    free = machine.device_free_bytes
    return _usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def _usable_ram(free: int) -> int:
    """What may be taken of the host's free memory without the rest of the system feeling it."""
    return max(free - max(4 * GIB, free // 10), 0)


def _tier(request: PlanRequest, machine: Machine, streamed_bytes: int, *, taken: int) -> Tier:
    """Whether the streamed layers stay in host memory between passes; `taken` is spoken for already."""
    ram = _usable_ram(machine.ram_available_bytes)
    if request.ram_bytes is not None:
        ram = min(ram, request.ram_bytes)
    return "ram" if streamed_bytes + taken <= ram else "disk"


def _workload(request: PlanRequest, machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> Workload:
    if request.ctx is not None and request.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.ctx:,} is beyond the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    tree_budget = 0 if draft is None else DEFAULT_TREE_BUDGET if request.tree_budget is None else request.tree_budget
    return Workload(
        dtype=_dtype(request, machine, target),
        ctx=request.ctx if request.ctx is not None else min(target.max_positions, DEFAULT_CTX),
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        slots=NUM_SLOTS,
        reserve_bytes=0 if machine.device == "cpu" else _CUDA_RESERVE_BYTES,
    )


def _dtype(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    match request.dtype:
        case "bf16" | "fp16" | "fp32":
            return request.dtype
    if num_params(target) * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "fp32"
    if machine.device == "cpu":
        return "bf16" if target.dtype == "bf16" and machine.fast_bf16 else "fp32"
    if target.dtype == "fp16" or not machine.fast_bf16:
        return "fp16"
    return "bf16"


def smaller_plan(request: PlanRequest, plan: Plan) -> Plan:
    """The next plan to try after `plan` could not have its memory: fewer resident layers, then a smaller tree.

    Raises:
        DoesNotFitError: there is nothing left to give up.
    """
    less = replace(request, vram_bytes=plan.device_bytes - 1, ctx=plan.ctx, tree_budget=plan.tree_budget or None)
    try:
        return make_plan(less)
    except DoesNotFitError:
        if plan.tree_budget > 1:
            return make_plan(replace(less, tree_budget=plan.tree_budget // 2))
    raise DoesNotFitError(
        f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.ctx:,}, which cannot be had",
        hint="close other programs, or lower --ctx",
    )


def _fit(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int, *, ctx_is_free: bool
) -> tuple[tuple[int, ...], Workload]:
    """The most resident layers that the budget allows; a default context is halved before giving up."""
    while True:
        placed, needed = _most_resident(target, draft, work, budget)
        if placed is not None:
            return placed
        if not ctx_is_free or work.ctx <= _LEAST_CTX:
            raise DoesNotFitError(
                f"{target.name} needs at least {format_bytes(needed)} with --ctx {work.ctx:,}, "
                f"the budget is {format_bytes(budget)}",
                hint=_what_would_fit(target, draft, work, budget),
            )
        work = replace(work, ctx=max(work.ctx // 2, _LEAST_CTX))


def _most_resident(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int
) -> tuple[tuple[tuple[int, ...], Workload] | None, int]:
    """The placement with the most resident layers within the budget, if there is one, and the bytes last looked at."""
    needed = 0
    for num_resident in range(target.num_layers, -1, -1):
        resident = interleaved(num_resident, target.num_layers)
        num_streamed = target.num_layers - num_resident
        if 0 < num_streamed <= work.slots:
            continue  # as many slots as layers: they might as well stay
        candidate = replace(work, slots=work.slots if num_streamed else 0)
        needed = sum(item.bytes for item in build_ledger(target, draft, candidate, resident))
        if needed <= budget:
            return (resident, candidate), needed
    return None, needed


def _what_would_fit(target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int) -> str:
    """A hint that names the longest context that the budget allows."""
    fits, too_long = 0, work.ctx
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        placed, _ = _most_resident(target, draft, replace(work, ctx=middle), budget)
        fits, too_long = (middle, too_long) if placed is not None else (fits, middle)
    if fits:
        return f"--ctx {fits} would fit; else raise --vram, or lower --tree-budget"
    return "raise --vram, or lower --tree-budget"


def interleaved(num_resident: int, num_layers: int) -> tuple[int, ...]:
    """Resident layers spread evenly among streamed ones, so that the link never idles while they compute."""
    return tuple(i for i in range(num_layers) if (i + 1) * num_resident // num_layers > i * num_resident // num_layers)
