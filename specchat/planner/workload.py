"""The parts of a workload that a request leaves open: dtype, context, budgets of nodes and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from specchat.errors import UsageError
from specchat.hardware.machine import Machine
from specchat.planner.placement import usable_ram
from specchat.planner.request import EXACT_BYTES, PlanRequest
from specchat.records.limits import CUDA_HEAD_BLOCK_ROWS, HEAD_BLOCK_ROWS
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec
from specchat.records.plan import Workload
from specchat.units import GIB, MIB

DEFAULT_CTX = 8192
_LEAST_CTX = 512
# Tree budgets to try, the default first; adaptive trees (engine/drafting) may stay smaller. A GPU computes hundreds of
# rows while a layer is loaded; on two CPU cores, computing 128 rows takes longer than reading the layer from disk.
TREE_BUDGETS = {"cpu": (128, 64, 32, 16), "cuda": (256, 512, 128, 64, 32)}
CHUNK_ROWS = 512
# Memory for the workspaces of cuBLAS, 8 to 32 MiB, and for rounding of small blocks in the CUDA allocator; not measured
# on a GPU yet. The ledger counts what is rounded of the caches.
CUDA_RESERVE_BYTES = 64 * MIB
# Expanded nodes may be cut from the tree again, so the draft needs more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


def default_tree_budgets(device: str) -> tuple[int, ...]:
    """Return the tree budgets to try, the default first."""
    return TREE_BUDGETS["cpu" if device == "cpu" else "cuda"]


@lru_cache(maxsize=512)
def workload(
    dtype: Dtype, ctx: int, tree_budget: int, device: str, seats: int, *, shares_cache: bool, tapped_width: int
) -> Workload:
    """Return a workload with the usual rows and reserve."""
    return Workload(
        device=device,
        dtype=dtype,
        ctx=ctx,
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        reserve_bytes=0 if device == "cpu" else CUDA_RESERVE_BYTES,
        head_rows=HEAD_BLOCK_ROWS if device == "cpu" else CUDA_HEAD_BLOCK_ROWS,
        seats=seats,
        shares_cache=shares_cache,
        tapped_width=tapped_width,
    )


@lru_cache(maxsize=512)
def with_points(work: Workload, num_points: int) -> Workload:
    """Return the workload with another number of restore points."""
    return replace(work, most_points=num_points)


@lru_cache(maxsize=512)
def with_host_embeddings(work: Workload) -> Workload:
    """Return the workload with input embeddings in host memory."""
    return replace(work, host_embeddings=True)


def contexts(ctx: int, *, is_open: bool) -> tuple[int, ...]:
    """Return the contexts to try, longest first; a context that the user left open is halved down to 512."""
    found = [ctx]
    while is_open and found[-1] > _LEAST_CTX:
        found.append(max(found[-1] // 2, _LEAST_CTX))
    return tuple(found)


def usual_ctx(request: PlanRequest, target: ModelSpec) -> int:
    """Return the requested context, or the default limited to the model's maximum.

    Raises:
        UsageError: the context is longer than the model allows.
    """
    if request.choices.ctx is None:
        return min(target.max_positions, DEFAULT_CTX)
    if request.choices.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.choices.ctx:,} exceeds the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    return request.choices.ctx


def dtype_for(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    """Return the dtype of weights, activations and caches."""
    match request.choices.dtype:
        case "bf16" | "fp16" | "fp32":
            return request.choices.dtype
    if target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "fp32"
    if machine.device == "cpu":
        return "bf16" if target.dtype == "bf16" and machine.fast_bf16 else "fp32"
    if target.dtype == "fp16" or not machine.fast_bf16:
        return "fp16"
    return "bf16"


def default_budget(machine: Machine) -> int:
    """Return free device memory minus a reserve for other programs."""
    free = machine.device_free_bytes
    if machine.device != "cpu":
        return max(free - GIB, 0)
    return usable_ram(free, is_confined=machine.is_confined)


def layer_host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Return the host memory of a plan for a GPU: layers kept in RAM, and slots for layers read from disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)
