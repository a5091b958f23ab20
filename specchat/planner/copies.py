"""The target's own low-bit copies that may draft for a target."""

from collections.abc import Sequence

from specchat.errors import UsageError
from specchat.records.model import LOWER_QUANTS, ModelSpec, own_quant


def smaller_copies(target: ModelSpec, copies: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return the copies that have a lower precision than the target.

    Args:
        target: sizes of the target in the precision that it runs in.
        copies: sizes of its copies.

    Raises:
        UsageError: no copy can draft.
    """
    if any(shape.state for shape in target.kv_shapes):
        raise UsageError(
            f"--draft self does not work with {target.name}: its recurrent layers keep states instead of rows",
            hint="use --draft auto, MODEL or mtp",
        )
    lower = LOWER_QUANTS if target.quant == "none" else LOWER_QUANTS[LOWER_QUANTS.index(own_quant(target.quant)) + 1 :]
    found = tuple(copy for copy in copies if copy.quant in lower)
    if not found:
        raise UsageError(
            f"--draft self needs a copy in a lower precision than {target.name} has ({target.quant})",
            hint="use --quant none, or leave out --draft-quant",
        )
    return found
