"""Choosing a plan: what stays in device memory, what streams, how large context and tree are."""

from dataclasses import dataclass, replace
from typing import Literal

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec, Plan, Quant, Tier
from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.hardware.probe import find_machine
from specchat.models.geometry import describe, layer_bytes, weight_bytes
from specchat.planner.memory import Workload, build_ledger
from specchat.units import GIB, MIB, format_bytes

_LOWER: tuple[Quant, ...] = ("int8", "int4")
DEFAULT_CTX = 8192
# The most nodes of a tree whose size follows what its nodes pay (engine/growth.py). A GPU computes hundreds of rows
# while a layer is on its way; on two CPU cores 128 rows take longer than the disk.
AUTO_TREE_BUDGET = {"cpu": 128, "cuda": 256}
CHUNK_ROWS = 512
# Up to this size full precision costs nothing that a user would notice, and is exact to the token.
EXACT_BYTES = 64 * MIB
NUM_SLOTS = 2
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
        slots: staging buffers for streamed layers.
        quant: "auto" or a Quant: what the target's matrices are stored in.
        draft_quant: likewise for the draft, by a Quant.
    """

    target: ModelSource
    draft: ModelSource | None
    device: str = "auto"
    dtype: str = "auto"
    vram_bytes: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    ram_bytes: int | None = None
    slots: int | None = None
    quant: Literal["auto"] | Quant = "auto"
    draft_quant: Quant = "none"


def make_plan(request: PlanRequest) -> Plan:
    """The plan for this machine and these models; nothing but configurations is read.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: a context the model has no positions for.
        DeviceUnusableError: the device asked for by name cannot be used.
    """
    machine = find_machine(request.device)
    draft = describe(request.draft, request.draft_quant) if request.draft is not None else None
    target = _described(request, machine)
    return plan_for(request, machine, target, draft)


def _described(request: PlanRequest, machine: Machine) -> ModelSpec:
    """The target in the precision asked for.

    auto lowers it only where all the machine's memory together could never hold the weights, and then no further than
    necessary: so the same command gives the same text on the same machine, whatever else runs there.
    """
    if request.quant != "auto":
        return describe(request.target, request.quant)
    spec = describe(request.target)
    if spec.quant != "none":
        return spec  # it comes quantized
    for quant in _LOWER:
        if weight_bytes(spec, _dtype(request, machine, spec)) <= machine.total_bytes:
            break
        spec = describe(request.target, quant)
    return spec


def plan_for(request: PlanRequest, machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """`make_plan` once everything is known; a pure function."""
    budget = request.vram_bytes if request.vram_bytes is not None else _default_budget(machine)
    work = _workload(request, machine, target, draft)
    resident, work = _fit(target, draft, work, budget, ctx_is_free=request.ctx is None)
    streamed_bytes = sum(layer_bytes(target, i, work.dtype) for i in range(target.num_layers) if i not in resident)
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
        resident=resident,
        num_layers=target.num_layers,
        chunk_rows=work.chunk_rows,
        ledger=build_ledger(target, draft, work, resident),
        device_budget_bytes=budget,
        host_bytes=0 if machine.device == "cpu" else streamed_bytes,
        streamed_bytes_per_step=streamed_bytes,
        adaptive=request.tree_budget is None,
        tier=_tier(request, machine, streamed_bytes, taken=budget if machine.device == "cpu" else 0),
        draft_quant="none" if draft is None else draft.quant,
        lowered_from=target.dtype if request.quant == "auto" and target.quant in _LOWER else None,
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
    auto = AUTO_TREE_BUDGET["cpu" if machine.device == "cpu" else "cuda"]
    tree_budget = 0 if draft is None else request.tree_budget or auto
    return Workload(
        dtype=_dtype(request, machine, target),
        ctx=request.ctx if request.ctx is not None else min(target.max_positions, DEFAULT_CTX),
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        slots=NUM_SLOTS if request.slots is None else request.slots,
        device=machine.device,
    )


def _dtype(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
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


def _fit(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int, *, ctx_is_free: bool
) -> tuple[tuple[int, ...], Workload]:
    """The most resident layers that the budget allows; a default context is halved before giving up."""
    while True:
        for num_resident in range(target.num_layers, -1, -1):
            resident = interleaved(num_resident, target.num_layers)
            num_streamed = target.num_layers - num_resident
            if 0 < num_streamed <= work.slots:
                continue  # as many slots as layers: they might as well stay
            candidate = replace(work, slots=work.slots if num_streamed else 0)
            needed = sum(item.bytes for item in build_ledger(target, draft, candidate, resident))
            if needed <= budget:
                return resident, candidate
        if not ctx_is_free or work.ctx <= 512:
            raise DoesNotFitError(
                f"{target.name} needs at least {format_bytes(needed)} with --ctx {work.ctx:,}, "
                f"the budget is {format_bytes(budget)}",
                hint="raise --vram, or lower --ctx or --tree-budget",
            )
        work = replace(work, ctx=max(work.ctx // 2, 512))


def interleaved(num_resident: int, num_layers: int) -> tuple[int, ...]:
    """Resident layers spread evenly among streamed ones, so that the link never idles while they compute."""
    return tuple(i for i in range(num_layers) if (i + 1) * num_resident // num_layers > i * num_resident // num_layers)
