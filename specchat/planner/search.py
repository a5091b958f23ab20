"""Choosing a plan: what stays in device memory, what streams, how large context and tree are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec, Plan, Quant
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
# A third slot takes a resident layer's place. While one layer is computed and the next one waits, its fill goes on, so
# that a pass whose reading and computing take about as long stays as fast as its reads alone: measured on a disk with
# 27 streamed layers 0.95-1.04 of raw reads, and 0.76-0.93 with two slots. It pays while one layer more to stream is
# little, and where computing is slow; on a GPU it takes a fraction of the time of the copy.
NUM_SLOTS_OF_MANY = 3
MANY_STREAMED = 10
_LEAST_CTX = 512
# What cuBLAS keeps for itself and what the allocator of CUDA memory rounds up; not measured on a GPU yet.
CUDA_RESERVE_BYTES = 96 * MIB
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
    on_cpu = machine.device == "cpu"
    divisions = tuple(_divisions(target.num_layers, request.slots, many_slots=on_cpu))
    resident, work = _fit(target, draft, work, budget, divisions, ctx_is_free=request.ctx is None)
    sizes = {i: layer_bytes(target, i, work.dtype) for i in range(target.num_layers) if i not in resident}
    in_ram = keep_in_ram(sizes, _host_room(request, machine, taken=budget if on_cpu else 0))
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
        adaptive=request.tree_budget is None,
        draft_quant="none" if draft is None else draft.quant,
        lowered_from=target.dtype if request.quant == "auto" and target.quant in _LOWER else None,
        host_bytes=0 if on_cpu else _host_bytes(sizes, in_ram, work.slots),
        streamed_bytes_per_step=sum(sizes.values()),
        in_ram=in_ram,
    )


def _default_budget(machine: Machine) -> int:
    """Free memory less a reserve for everything else on the machine."""
    free = machine.device_free_bytes
    return usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def usable_ram(available_bytes: int) -> int:
    """What may be taken, or pinned, of the host's available memory without the rest of the system feeling it."""
    return max(available_bytes - max(4 * GIB, available_bytes // 10), 0)


def _host_room(request: PlanRequest, machine: Machine, *, taken: int) -> int:
    """Host memory for streamed layers; `taken` of what is usable is spoken for already."""
    room = max(usable_ram(machine.ram_available_bytes) - taken, 0)
    return room if request.ram_bytes is None else min(room, request.ram_bytes)


def keep_in_ram(sizes: Mapping[int, int], room: int) -> tuple[int, ...]:
    """The streamed layers that stay in host memory, spread evenly: while they are computed, the disk reads on.

    Args:
        sizes: bytes of the streamed layers, by index.
        room: bytes that there are for them.
    """
    streamed = tuple(sizes)
    for count in range(len(streamed), 0, -1):
        kept = tuple(streamed[j] for j in interleaved(count, len(streamed)))
        if sum(sizes[i] for i in kept) <= room:
            return kept
    return ()


def _host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Host memory beside a GPU's: the layers that stay there, and slots for those that are read from the disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)


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
        slots=NUM_SLOTS,
        device=machine.device,
        reserve_bytes=0 if machine.device == "cpu" else CUDA_RESERVE_BYTES,
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


def smaller_plan(request: PlanRequest, plan: Plan) -> Plan:
    """The next plan to try after `plan` could not have its memory: fewer resident layers, then a smaller tree.

    Raises:
        DoesNotFitError: there is nothing left to give up.
    """
    less = replace(request, vram_bytes=plan.device_bytes - 1, ctx=plan.ctx, tree_budget=plan.tree_budget or None)
    try:
        return replace(make_plan(less), adaptive=plan.adaptive)
    except DoesNotFitError:
        if plan.tree_budget > 1:
            smaller = make_plan(replace(less, tree_budget=plan.tree_budget // 2))
            return replace(smaller, adaptive=plan.adaptive)
    raise DoesNotFitError(
        f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.ctx:,}, which cannot be had",
        hint="close other programs, or lower --ctx",
    )


def _fit(
    target: ModelSpec,
    draft: ModelSpec | None,
    work: Workload,
    budget: int,
    divisions: Sequence[tuple[int, int]],
    *,
    ctx_is_free: bool,
) -> tuple[tuple[int, ...], Workload]:
    """The first of the divisions that the budget allows; a default context is halved before giving up."""
    while True:
        placed, needed = _most_resident(target, draft, work, budget, divisions)
        if placed is not None:
            return placed
        if not ctx_is_free or work.ctx <= _LEAST_CTX:
            raise DoesNotFitError(
                f"{target.name} needs at least {format_bytes(needed)} with --ctx {work.ctx:,}, "
                f"the budget is {format_bytes(budget)}",
                hint=_what_would_fit(target, draft, work, budget, divisions),
            )
        work = replace(work, ctx=max(work.ctx // 2, _LEAST_CTX))


def _most_resident(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int, divisions: Sequence[tuple[int, int]]
) -> tuple[tuple[tuple[int, ...], Workload] | None, int]:
    """The first of the divisions that the budget allows, if there is one, and the bytes last looked at."""
    needed = 0
    for num_resident, slots in divisions:
        resident = interleaved(num_resident, target.num_layers)
        candidate = replace(work, slots=slots)
        needed = sum(item.bytes for item in build_ledger(target, draft, candidate, resident))
        if needed <= budget:
            return (resident, candidate), needed
    return None, needed


def _what_would_fit(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, budget: int, divisions: Sequence[tuple[int, int]]
) -> str:
    """A hint that names the longest context that the budget allows."""
    fits, too_long = 0, work.ctx
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        placed, _ = _most_resident(target, draft, replace(work, ctx=middle), budget, divisions)
        fits, too_long = (middle, too_long) if placed is not None else (fits, middle)
    if fits:
        return f"--ctx {fits} would fit; else raise --vram, or lower --tree-budget"
    return "raise --vram, or lower --tree-budget"


def _divisions(num_layers: int, slots: int | None, *, many_slots: bool) -> Iterator[tuple[int, int]]:
    """Ways to divide layers into resident and streamed ones, best first: (resident, slots).

    Args:
        num_layers: L.
        slots: as asked for; None leaves the choice here.
        many_slots: whether one slot more is worth its memory where many layers stream.
    """
    yield num_layers, 0
    few = NUM_SLOTS if slots is None else slots
    for num_streamed in range(few + 1, num_layers + 1):  # as many slots as layers: they might as well stay
        many = slots is None and many_slots and num_streamed > MANY_STREAMED
        yield num_layers - num_streamed, NUM_SLOTS_OF_MANY if many else few
    if num_layers > few:
        yield 0, few


def interleaved(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly among all, neither first nor last if that can be: of resident ones among streamed.

    While resident layers are computed, the next streamed ones come. Behind the last streamed layer nothing comes in a
    pass, so whatever is computed there leaves the link idle; and before the first one all slots are full already.
    """
    half = num_layers // 2
    ends = [(i * num_chosen + half) // num_layers for i in range(num_layers + 1)]
    return tuple(i for i in range(num_layers) if ends[i + 1] > ends[i])
