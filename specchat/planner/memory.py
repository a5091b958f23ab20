"""The ledger: device memory of a configuration, item by item, computed before any of it is allocated.

Weights and caches are exact. A pass, the walk down the tree and the growth of the next tree reuse the same memory. So
the ledger lists the workspaces of a pass in full, and for the others only what exceeds them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from specchat.models.sizes.geometry import dequantize_bytes, layer_sizes
from specchat.planner.states import draft_state_bytes, state_items
from specchat.records.limits import (
    DRAFT_BRANCH,
    DRAWING_BYTES,
    HEAD_BLOCK_ROWS,
    NOISE_ROWS,
    NUM_READERS,
    PATH_BYTES,
    PROCESSING_BYTES,
    READ_WINDOW_BYTES,
    WEIGHING_COPIES,
    draft_width,
    padded_rows,
)
from specchat.records.model import DTYPE_BYTES, Activations, Dtype, ModelSpec, RowCost
from specchat.records.plan import LedgerItem, Placement, Plan, Workload

# Memory of a process that has imported torch and transformers and checked a model; measured with CPU builds.
RUNTIME_BYTES = 400 * 2**20

_CHUNK_STEP = 64
_RESERVE = "library reserve"
MAPPED_EMBEDDINGS = "embeddings in the page cache"
_INDEX_BYTES = 8  # token ids and positions are int64
_FLOAT_BYTES = 4  # scores are float32 in every compute dtype


def build_ledger(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: Placement
) -> tuple[LedgerItem, ...]:
    """Return every item that occupies device memory during a chat.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, or None.
        work: device, dtype, context and trees.
        placement: places of the target's layers.

    Returns:
        Items, most important first. Weights, slots and caches are exact; workspaces are the maximum for a
        conversation of `ctx` tokens.
    """
    sizes = layer_sizes(target, work.dtype)
    slot_bytes = max((sizes[i] for i in placement.streamed), default=0)
    items = [
        LedgerItem("resident layers", sum(sizes[i] for i in placement.resident)),
        LedgerItem("slots", placement.slots * slot_bytes),
        _outside_layers(target, work),
        LedgerItem("KV cache", _kv_bytes(target, work.dtype, work.ctx + work.tree_budget)),
        *state_items(target, work.dtype, work.tree_budget),
    ]
    if draft is not None:
        layers = sum(layer_sizes(draft, work.dtype))
        items.append(LedgerItem("draft", layers + _other_bytes(draft, work.dtype)))
        items.append(LedgerItem("draft KV cache", _kv_bytes(draft, work.dtype, work.ctx + work.draft_rows)))
        if states := draft_state_bytes(draft, work.dtype, work.draft_rows):
            items.append(LedgerItem("draft states", states))
    models = [target] if draft is None else [target, draft]
    if dequantized := sum(dequantize_bytes(spec, work.dtype, work.device) for spec in models):
        items.append(LedgerItem("dequantized pieces", dequantized))
    items += _workspaces(target, draft, work)
    if work.reserve_bytes:
        items.append(LedgerItem(_RESERVE, work.reserve_bytes))
    return tuple(items)


def bytes_beside_layers(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> int:
    """Return the sum of a ledger without resident layers and slots, faster than `build_ledger`.

    A search needs hundreds of these sums. The sum never shrinks with a longer context or a larger tree.
    """
    kept, first, later = _target_needs(target, work)
    if draft is not None:
        draft_kept, drafting, later_drafting = _draft_needs(draft, work)
        kept, first, later = kept + draft_kept, max(first, drafting), max(later, later_drafting)
    noise = _noise_bytes(target, min(NOISE_ROWS, 1 + work.tree_budget))
    return kept + work.reserve_bytes + max(first + noise, later + _noise_bytes(target, NOISE_ROWS))


@lru_cache(maxsize=4096)
def _target_needs(target: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """Return permanent bytes, and peak workspace bytes of the longest first step and of later steps."""
    rows = work.ctx + work.tree_budget
    kept = _outside_layers(target, work).bytes + _kv_bytes(target, work.dtype, rows)
    kept += sum(item.bytes for item in state_items(target, work.dtype, work.tree_budget))
    first = _pass(target, work, rows, rows)
    later = _pass(target, work, 1 + work.tree_budget, rows)
    ancestors = _ancestors_bytes(work)
    walk_bytes = _walking_bytes(target, work)
    return (
        kept + dequantize_bytes(target, work.dtype, work.device),
        ancestors + max(first.total, first.hidden + walk_bytes),
        ancestors + max(later.total, later.hidden + walk_bytes),
    )


@lru_cache(maxsize=4096)
def _draft_needs(draft: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """Return the figures of `_target_needs` for a draft; cached separately, because one draft serves many targets."""
    layers = sum(layer_sizes(draft, work.dtype))
    kept = layers + _other_bytes(draft, work.dtype) + _kv_bytes(draft, work.dtype, work.ctx + work.draft_rows)
    kept += draft_state_bytes(draft, work.dtype, work.draft_rows)
    return (
        kept + dequantize_bytes(draft, work.dtype, work.device),
        _drafting_bytes(draft, work, reading=work.ctx),
        _drafting_bytes(draft, work, reading=1 + work.tree_budget),
    )


def build_host_ledger(
    sizes: Mapping[int, int], in_ram: Sequence[int], slots: int, device: str, others: Sequence[LedgerItem] = ()
) -> tuple[LedgerItem, ...]:
    """Return every item that occupies host memory besides the device ledger.

    Args:
        sizes: bytes of the streamed layers, by index.
        in_ram: indices of the streamed layers that stay in host memory between passes.
        slots: number of staging buffers.
        device: device that passes run on.
        others: items of `host_embeddings` and `restore_items`.

    Returns:
        Items; names contain "page cache" where the system may reclaim the memory.
    """
    kept = sum(sizes[i] for i in in_ram)
    read = [size for i, size in sizes.items() if i not in in_ram]
    items = [LedgerItem("Python and libraries", RUNTIME_BYTES)]
    if device == "cpu":
        items.append(LedgerItem("layers in the page cache", kept))
    else:
        items.append(LedgerItem("pinned layers", kept))
        items.append(LedgerItem("pinned slots", min(slots, len(read)) * max(read, default=0)))
    items += others
    if read:
        items.append(LedgerItem("reading", NUM_READERS * READ_WINDOW_BYTES))
    return tuple(item for item in items if item.bytes)


def lookup_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Return the bytes of an untied input embedding, which may live in host memory."""
    return spec.lookup_params * DTYPE_BYTES[dtype]


def host_embeddings(target: ModelSpec, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the items of input embeddings in host memory: the table, and the rows of one chunk.

    Some models scale these rows, so two copies count. A table that needs no conversion is mapped from its file; the
    system may reclaim its pages.
    """
    if not work.host_embeddings:
        return ()
    name = MAPPED_EMBEDDINGS if target.dtype == work.dtype else "input embeddings"
    rows_bytes = 2 * work.chunk_rows * target.hidden_size * DTYPE_BYTES[work.dtype]
    return LedgerItem(name, lookup_bytes(target, work.dtype)), LedgerItem("rows of embeddings", rows_bytes)


def host_embedding_bytes(target: ModelSpec, work: Workload) -> int:
    """Return the bytes of `host_embeddings` that the system cannot reclaim."""
    return sum(item.bytes for item in host_embeddings(target, work) if item.item != MAPPED_EMBEDDINGS)


def with_trees(
    plan: Plan, target: ModelSpec, draft: ModelSpec, tree_budget: int, head_rows: int = HEAD_BLOCK_ROWS
) -> Plan:
    """Return the plan with another tree budget, and with the same placement of layers.

    Chunks shrink to the rows of a pass over the tree, rounded up to a multiple of 64 that suits matmul kernels.

    Args:
        plan: plan with a draft.
        target: sizes of the target.
        draft: sizes of the draft.
        tree_budget: nodes of every tree.
        head_rows: nodes scored per block; 1 + tree_budget scores all at once, as without a lazy head.

    Returns:
        A plan whose memory budget is raised if the new trees need more.
    """
    assert plan.work.tree_budget, "a plan without a draft has no trees"
    work = replace(
        plan.work,
        tree_budget=tree_budget,
        draft_rows=plan.work.draft_rows // plan.work.tree_budget * tree_budget,
        chunk_rows=min(plan.work.chunk_rows, -(-(1 + tree_budget) // _CHUNK_STEP) * _CHUNK_STEP),
        head_rows=head_rows,
    )
    changed = replace(plan, work=work, adaptive=False, ledger=build_ledger(target, draft, work, plan.placement))
    return replace(changed, vram_bytes=max(plan.vram_bytes, changed.device_bytes))


def _outside_layers(target: ModelSpec, work: Workload) -> LedgerItem:
    other = _other_bytes(target, work.dtype)
    if work.host_embeddings:
        return LedgerItem("head", other - lookup_bytes(target, work.dtype))
    return LedgerItem("embeddings and head", other)


def _other_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    narrowed = spec.narrowed_bytes if DTYPE_BYTES[dtype] == 2 else 0
    return sum(size.nbytes(dtype) for size in spec.other_params) + spec.buffer_bytes - narrowed


def _kv_bytes(spec: ModelSpec, dtype: Dtype, rows: int) -> int:
    return padded_rows(rows) * spec.kv_numbers_per_row * DTYPE_BYTES[dtype]


# --- workspaces --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """Peak bytes of one pass: `hidden` outlives the pass, `masks` last for the pass, `rest` is the peak of all else."""

    hidden: int
    masks: int
    rest: int

    @property
    def total(self) -> int:
        return self.hidden + self.masks + self.rest


def _workspaces(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> list[LedgerItem]:
    rows = work.ctx + work.tree_budget  # longest pass: a prompt that fills the context, and a tree
    first = _pass(target, work, rows, rows)
    # Only the first step reads a whole prompt; its sampling noise has at most one row per tree node and the root.
    later = _pass(target, work, 1 + work.tree_budget, rows)
    ancestors = _ancestors_bytes(work)
    walk_bytes = _walking_bytes(target, work) + ancestors
    pass_bytes = first.total + ancestors
    drafting = 0 if draft is None else _drafting_bytes(draft, work, reading=work.ctx)
    later_drafting = 0 if draft is None else _drafting_bytes(draft, work, reading=1 + work.tree_budget)
    most = max(pass_bytes, first.hidden + walk_bytes, drafting)
    most_later = max(later.total + ancestors, later.hidden + walk_bytes, later_drafting)
    noise = _noise_bytes(target, min(NOISE_ROWS, 1 + work.tree_budget))
    return [
        LedgerItem("hidden rows", first.hidden),
        LedgerItem("tree mask", first.masks + ancestors),
        LedgerItem("activations", first.rest),
        LedgerItem("head blocks", max(first.hidden + walk_bytes - pass_bytes, 0)),
        LedgerItem("drafting", max(drafting - max(pass_bytes, first.hidden + walk_bytes), 0)),
        LedgerItem("sampling noise", max(noise, _noise_bytes(target, NOISE_ROWS) - (most - most_later))),
    ]


def _pass(spec: ModelSpec, work: Workload, rows: int, keys: int) -> _Pass:
    """Return the bytes of a pass over `rows` new rows, with `keys` keys in the cache at its end."""
    element, costs = DTYPE_BYTES[work.dtype], _activations(spec, work.dtype)
    chunk, keys = min(rows, work.chunk_rows), padded_rows(keys)
    hidden = rows * spec.hidden_size * element
    masks = costs.num_masks * chunk * keys * element
    indices = 2 * _INDEX_BYTES * rows
    in_layer = _max_bytes(costs.entry, rows, keys) + _max_bytes(costs.layer, chunk, keys)
    if rows > chunk:
        in_layer += hidden  # the layer's output collects all chunks
    return _Pass(hidden, masks, max(max(in_layer, _max_bytes(costs.outside, rows, keys)) + indices - hidden, 0))


def _ancestors_bytes(work: Workload) -> int:
    """Return the bytes of the ancestor matrix of a tree, one byte an entry, and of its device copy."""
    return 2 * work.tree_budget**2


def _head_bytes(spec: ModelSpec, work: Workload, rows: int) -> int:
    """Return the bytes of float32 scores of `rows` rows, and of the workspace to compute them."""
    hidden = rows * spec.hidden_size * DTYPE_BYTES[work.dtype]
    return hidden + _max_bytes(_activations(spec, work.dtype).head, rows, 0)


def _walking_bytes(target: ModelSpec, work: Workload) -> int:
    """Return the bytes of one block of scores, and of one score row in the logits processors."""
    processing = PROCESSING_BYTES * target.vocab_size + 2 * _INDEX_BYTES * work.ctx
    return _head_bytes(target, work, work.head_rows) + processing


def _drafting_bytes(draft: ModelSpec, work: Workload, *, reading: int) -> int:
    """Return the peak bytes of drafting: reading new context rows, then growing a tree in batches of nodes."""
    width = draft_width(work.tree_budget)
    read = _pass(draft, work, reading, work.ctx).total + _head_bytes(draft, work, 1)
    keys = work.ctx + work.draft_rows
    scoring = _head_bytes(draft, work, width) + WEIGHING_COPIES * width * draft.vocab_size * _FLOAT_BYTES
    grown = max(_pass(draft, work, width, keys).total, scoring)
    paths = PATH_BYTES * (work.tree_budget + width * DRAFT_BRANCH)
    return max(read, grown + paths + work.draft_rows * (2 * width + work.draft_rows + 2 * _INDEX_BYTES))


def _noise_bytes(target: ModelSpec, rows: int) -> int:
    return target.vocab_size * (rows * _FLOAT_BYTES + _INDEX_BYTES + DRAWING_BYTES)


def _max_bytes(costs: Iterable[RowCost], rows: int, keys: int) -> int:
    return max(cost.at(rows, keys) for cost in costs)


def _activations(spec: ModelSpec, dtype: Dtype) -> Activations:
    """Return the profiled activation sizes, or a cautious estimate for a model without a profile."""
    return spec.activations.get(DTYPE_BYTES[dtype]) or _estimated_activations(spec, DTYPE_BYTES[dtype])


def _estimated_activations(spec: ModelSpec, element: int) -> Activations:
    """Estimate activation sizes: attention that keeps all scores, and no operation in place."""
    attention = spec.num_heads * max(shape.key_dim for shape in spec.kv_shapes)
    rows = 4 * spec.hidden_size + 6 * attention + 4 * spec.mlp_size
    scores = spec.num_heads * (2 * element + _FLOAT_BYTES)
    head = spec.vocab_size * (3 * element + _FLOAT_BYTES)
    norm = 3 * spec.hidden_size * _FLOAT_BYTES
    return Activations(
        outside=(RowCost(per_row=3 * spec.hidden_size * element + norm),),
        entry=(RowCost(per_row=2 * spec.hidden_size * element + norm),),
        layer=(RowCost(per_row=rows * element, per_row_key=scores),),
        head=(RowCost(per_row=head),),
        num_masks=2,
    )
