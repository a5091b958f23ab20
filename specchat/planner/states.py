"""Memory of the running states of recurrent layers, by the shapes that the engine allocates."""

from specchat.records.limits import LEAST_RESTORE_POINTS, MOST_RESTORE_POINTS
from specchat.records.model import DTYPE_BYTES, ModelSpec, StateShape
from specchat.records.plan import LedgerItem, StateMemory, Workload

# Part of the host memory that restore points may take from streamed layers: without a layer in host memory, every step
# reads it from disk; without a point, a turn computes rows again in a pass that runs anyway.
_SHARE_OF_POINTS = 8
# Trees whose stash a plan shows.
_SHOWN_NODES = (64, 256)


def state_items(spec: ModelSpec, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the items of a target's recurrent layers: committed and working states, and the rows of trees.

    Each seat has its own states, and room for the nodes of a pass. All layers share the workspace of a tree, because
    each computes the whole tree before the next layer runs.
    """
    shapes = _shapes(spec)
    stashed = work.seats * sum(shape.stash_bytes(DTYPE_BYTES[work.dtype]) for shape in shapes)
    shared = sum(shape.update_bytes() for shape in set(shapes))
    items = (
        LedgerItem("recurrent states", work.seats * _held_bytes(spec, work)),
        LedgerItem("stashed tree rows", work.tree_budget * (stashed + shared)),
    )
    return tuple(item for item in items if item.bytes)


def draft_state_bytes(spec: ModelSpec, work: Workload) -> int:
    """Return the bytes of a draft's recurrent layers, whose trees grow over several passes."""
    row = sum(shape.stash_bytes(DTYPE_BYTES[work.dtype]) + shape.update_bytes() for shape in _shapes(spec))
    return work.seats * (_held_bytes(spec, work) + work.draft_rows * row)


def restore_items(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the item of restore points, which lie in host memory; none without recurrent layers."""
    nbytes = work.restore_points * point_bytes(target, draft, work)
    return (LedgerItem("restore points", nbytes),) if nbytes else ()


def point_bytes(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> int:
    """Return the bytes of one restore point of target and draft; 0 without recurrent layers."""
    return sum(_state_bytes(spec, work) for spec in (target, draft) if spec is not None)


def num_points(one_point: int, host_bytes: int, layer_bytes: int) -> int:
    """Return how many restore points to keep: all if they fit beside the streamed layers, else fewer.

    Args:
        one_point: bytes of a point.
        host_bytes: host memory for points and streamed layers.
        layer_bytes: bytes of all streamed layers.
    """
    room = max(host_bytes - layer_bytes, host_bytes // _SHARE_OF_POINTS)
    least = min(LEAST_RESTORE_POINTS, host_bytes // one_point)
    return min(max(room // one_point, least), MOST_RESTORE_POINTS)


def state_memory(target: ModelSpec, draft: ModelSpec | None, work: Workload, kv_bytes: int) -> StateMemory | None:
    """Return the memory of a target's recurrent layers, part by part; None without any.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, or None.
        work: device, dtype, context and trees.
        kv_bytes: bytes of the target's KV cache.
    """
    shapes, state = _shapes(target), work.seats * _state_bytes(target, work)
    if not shapes:
        return None
    node = work.seats * sum(shape.stash_bytes(DTYPE_BYTES[work.dtype]) for shape in shapes)
    return StateMemory(
        num_recurrent=len(shapes),
        num_attention=sum(shape.heads > 0 for shape in target.kv_shapes),
        state_bytes=state,
        working_bytes=state,
        stash_bytes=tuple((nodes, nodes * node) for nodes in _SHOWN_NODES),
        num_points=work.restore_points,
        point_bytes=point_bytes(target, draft, work),
        kv_bytes=kv_bytes,
    )


def _held_bytes(spec: ModelSpec, work: Workload) -> int:
    """Return the bytes of one seat's committed and working states, and of constant rates of decay."""
    return 2 * _state_bytes(spec, work) + sum(shape.rate_bytes() for shape in _shapes(spec))


def _state_bytes(spec: ModelSpec, work: Workload) -> int:
    return sum(shape.state_bytes(DTYPE_BYTES[work.dtype]) for shape in _shapes(spec))


def _shapes(spec: ModelSpec) -> list[StateShape]:
    return [shape.state for shape in spec.kv_shapes if shape.state is not None]
