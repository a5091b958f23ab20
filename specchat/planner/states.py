"""Memory of the running states of recurrent layers, by the shapes that the engine allocates."""

from specchat.records.limits import restore_points
from specchat.records.model import DTYPE_BYTES, ModelSpec, StateShape
from specchat.records.plan import LedgerItem, Workload


def state_items(spec: ModelSpec, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the items of a target's recurrent layers: committed and working states, and the rows of trees.

    Each seat has its own states, and room for the nodes of a pass. All layers share the workspace of a tree, because
    each computes the whole tree before the next layer runs.
    """
    shapes = _shapes(spec)
    stashed = work.seats * sum(shape.stash_bytes(DTYPE_BYTES[work.dtype]) for shape in shapes)
    shared = sum(shape.update_bytes() for shape in set(shapes))
    items = (
        LedgerItem("recurrent states", work.seats * 2 * _state_bytes(spec, work)),
        LedgerItem("stashed tree rows", work.tree_budget * (stashed + shared)),
    )
    return tuple(item for item in items if item.bytes)


def draft_state_bytes(spec: ModelSpec, work: Workload) -> int:
    """Return the bytes of a draft's recurrent layers, whose trees grow over several passes."""
    row = sum(shape.stash_bytes(DTYPE_BYTES[work.dtype]) + shape.update_bytes() for shape in _shapes(spec))
    return work.seats * (2 * _state_bytes(spec, work) + work.draft_rows * row)


def restore_items(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the item of restore points, which lie in host memory; none without recurrent layers."""
    states = sum(_state_bytes(spec, work) for spec in (target, draft) if spec is not None)
    nbytes = restore_points(work.seats) * states
    return (LedgerItem("restore points", nbytes),) if nbytes else ()


def _state_bytes(spec: ModelSpec, work: Workload) -> int:
    return sum(shape.state_bytes(DTYPE_BYTES[work.dtype]) for shape in _shapes(spec))


def _shapes(spec: ModelSpec) -> list[StateShape]:
    return [shape.state for shape in spec.kv_shapes if shape.state is not None]
