"""Memory of the running states of recurrent layers, by the shapes that the engine allocates."""

from specchat.records.limits import RESTORE_POINTS
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec, StateShape
from specchat.records.plan import LedgerItem


def state_items(spec: ModelSpec, dtype: Dtype, tree_rows: int) -> tuple[LedgerItem, ...]:
    """Return the items of a target's recurrent layers: committed and working states, and the rows of one tree.

    The layers share the workspace of a tree, because each computes the whole tree before the next layer runs.
    """
    shapes = _shapes(spec)
    rows = sum(shape.stash_bytes(DTYPE_BYTES[dtype]) for shape in shapes)
    rows += sum(shape.update_bytes() for shape in set(shapes))
    items = (
        LedgerItem("recurrent states", 2 * _state_bytes(spec, dtype)),
        LedgerItem("stashed tree rows", tree_rows * rows),
    )
    return tuple(item for item in items if item.bytes)


def draft_state_bytes(spec: ModelSpec, dtype: Dtype, tree_rows: int) -> int:
    """Return the bytes of a draft's recurrent layers, whose trees grow over several passes."""
    row = sum(shape.stash_bytes(DTYPE_BYTES[dtype]) + shape.update_bytes() for shape in _shapes(spec))
    return 2 * _state_bytes(spec, dtype) + tree_rows * row


def restore_items(target: ModelSpec, draft: ModelSpec | None, dtype: Dtype) -> tuple[LedgerItem, ...]:
    """Return the item of restore points, which lie in host memory; none without recurrent layers."""
    nbytes = RESTORE_POINTS * sum(_state_bytes(spec, dtype) for spec in (target, draft) if spec is not None)
    return (LedgerItem("restore points", nbytes),) if nbytes else ()


def _state_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    return sum(shape.state_bytes(DTYPE_BYTES[dtype]) for shape in _shapes(spec))


def _shapes(spec: ModelSpec) -> list[StateShape]:
    return [shape.state for shape in spec.kv_shapes if shape.state is not None]
