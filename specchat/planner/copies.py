"""The target's own low-bit copies that may draft for a target."""

from collections.abc import Sequence

from specchat.errors import UsageError
from specchat.models.sizes.describe import as_copy
from specchat.models.sizes.geometry import weight_bytes
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.records.model import AUTO_QUANTS, DTYPE_BYTES, QUANTS, Dtype, ModelSpec, Quant

# A copy that nobody asked for must be this much faster than all other drafts: quantizing it takes minutes at the first
# start, and its pack takes disk space.
COPY_IF_FASTER_BY = 1.2


def smaller_copies(target: ModelSpec, copies: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return the copies that have a lower precision than the target.

    Args:
        target: sizes of the target in the precision that it runs in.
        copies: sizes of its copies.

    Raises:
        UsageError: no copy can draft.
    """
    if _is_recurrent(target):
        raise UsageError(
            f"--draft self does not work with {target.name}: its recurrent layers keep states instead of rows",
            hint="use --draft auto, MODEL or mtp",
        )
    lower = _lower_quants(target)
    found = tuple(copy for copy in copies if copy.quant in lower)
    if not found:
        raise UsageError(
            f"--draft self needs a copy in a lower precision than {target.name} has ({target.quant})",
            hint="use --quant none, or leave out --draft-quant",
        )
    return found


def open_copies(
    request: PlanRequest, inputs: PlanInputs, target: ModelSpec, dtype: Dtype, vram_bytes: int
) -> tuple[ModelSpec, ...]:
    """Return the copies that the planner may choose by itself: of targets that stream, if the disk has room.

    Args:
        request: models and choices.
        inputs: machine, rates, sizes and statistics.
        target: sizes of the target in the precision that it runs in.
        dtype: dtype of weights and activations.
        vram_bytes: device memory budget in bytes.
    """
    if request.copy is None or not request.draft_is_open or _is_recurrent(target):
        return ()
    if weight_bytes(target, dtype) <= vram_bytes or target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return ()
    copies = (
        as_copy(inputs.target(quant), request.copy.name) for quant in _lower_quants(target) if quant in AUTO_QUANTS
    )
    return tuple(copy for copy in copies if weight_bytes(copy, dtype) <= inputs.free_disk_bytes)


def _is_recurrent(target: ModelSpec) -> bool:
    return any(shape.state for shape in target.kv_shapes)


def _lower_quants(target: ModelSpec) -> tuple[Quant, ...]:
    """Return the precisions below the target's; none for pre-quantized targets."""
    quant = next((quant for quant in QUANTS if quant == target.quant), None)
    return () if quant is None else QUANTS[QUANTS.index(quant) + 1 :]
