"""The ledger: device memory of a configuration, item by item, before any of it is taken.

Weights and caches are exact. A pass, the walk down the tree and the growth of the next tree take turns in the same
memory, so workspaces are listed as a pass needs them, and the others with what they need beyond that.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from specchat.models.sizes.geometry import dequantize_bytes, layer_sizes
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

# What a process holds that has imported torch and transformers and checked a model; measured with builds for CPUs.
RUNTIME_BYTES = 400 * 2**20

_CHUNK_STEP = 64
_RESERVE = "library reserve"
MAPPED_EMBEDDINGS = "embeddings in the page cache"
_INDEX_BYTES = 8  # token ids and positions are int64
_FLOAT_BYTES = 4  # scores are float32, whatever the model computes in


def build_ledger(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: Placement
) -> tuple[LedgerItem, ...]:
    """Every item that lives in device memory while chatting.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, if there is one.
        work: device, dtype, context and trees.
        placement: where the target's layers lie.

    Returns:
        Items in the order a person would ask for them. Weights, slots and caches are exact; workspaces are the most
        that a conversation of `ctx` tokens can need.
    """
    sizes = layer_sizes(target, work.dtype)
    slot_bytes = max((sizes[i] for i in placement.streamed), default=0)
    items = [
        LedgerItem("resident layers", sum(sizes[i] for i in placement.resident)),
        LedgerItem("slots", placement.slots * slot_bytes),
        _outside_layers(target, work),
        LedgerItem("KV cache", _kv_bytes(target, work.dtype, work.ctx + work.tree_budget)),
    ]
    if draft is not None:
        layers = sum(layer_sizes(draft, work.dtype))
        items.append(LedgerItem("draft", layers + _other_bytes(draft, work.dtype)))
        items.append(LedgerItem("draft KV cache", _kv_bytes(draft, work.dtype, work.ctx + work.draft_rows)))
    models = [target] if draft is None else [target, draft]
    if dequantized := sum(dequantize_bytes(spec, work.dtype, work.device) for spec in models):
        items.append(LedgerItem("dequantized pieces", dequantized))
    items += _workspaces(target, draft, work)
    if work.reserve_bytes:
        items.append(LedgerItem(_RESERVE, work.reserve_bytes))
    return tuple(items)


def bytes_beside_layers(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> int:
    """The sum of a ledger apart from resident layers and slots, in a fraction of its time: a search asks for hundreds.

    It never shrinks with a longer context or a larger tree.
    """
    kept, first, later = _target_needs(target, work)
    if draft is not None:
        draft_kept, drafting, growing = _draft_needs(draft, work)
        kept, first, later = kept + draft_kept, max(first, drafting), max(later, growing)
    noise = _noise_bytes(target, min(NOISE_ROWS, 1 + work.tree_budget))
    return kept + work.reserve_bytes + max(first + noise, later + _noise_bytes(target, NOISE_ROWS))


@lru_cache(maxsize=4096)
def _target_needs(target: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """What is always there, and what takes turns: in the longest first step of an answer, and in later steps."""
    rows = work.ctx + work.tree_budget
    kept = _outside_layers(target, work).bytes + _kv_bytes(target, work.dtype, rows)
    first = _pass(target, work, rows, rows)
    later = _pass(target, work, 1 + work.tree_budget, rows)
    ancestors = _ancestors_bytes(work)
    walking = _walking_bytes(target, work)
    return (
        kept + dequantize_bytes(target, work.dtype, work.device),
        ancestors + max(first.total, first.hidden + walking),
        ancestors + max(later.total, later.hidden + walking),
    )


@lru_cache(maxsize=4096)
def _draft_needs(draft: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """Likewise; one model drafts for many."""
    layers = sum(layer_sizes(draft, work.dtype))
    kept = layers + _other_bytes(draft, work.dtype) + _kv_bytes(draft, work.dtype, work.ctx + work.draft_rows)
    return (
        kept + dequantize_bytes(draft, work.dtype, work.device),
        _drafting_bytes(draft, work, reading=work.ctx),
        _drafting_bytes(draft, work, reading=1 + work.tree_budget),
    )


def build_host_ledger(
    sizes: Mapping[int, int], in_ram: Sequence[int], slots: int, device: str, embeddings: Sequence[LedgerItem] = ()
) -> tuple[LedgerItem, ...]:
    """Every item that lives in host memory beside the ledger's.

    Args:
        sizes: bytes of the streamed layers, by index.
        in_ram: those of them that stay in host memory between passes.
        slots: staging buffers.
        device: where passes run.
        embeddings: `host_embeddings`.

    Returns:
        Items; those of the page cache, which the system takes back where it needs them, say so.
    """
    kept = sum(sizes[i] for i in in_ram)
    read = [size for i, size in sizes.items() if i not in in_ram]
    items = [LedgerItem("Python and libraries", RUNTIME_BYTES)]
    if device == "cpu":
        items.append(LedgerItem("layers in the page cache", kept))
    else:
        items.append(LedgerItem("pinned layers", kept))
        items.append(LedgerItem("pinned slots", min(slots, len(read)) * max(read, default=0)))
    items += embeddings
    if read:
        items.append(LedgerItem("reading", NUM_READERS * READ_WINDOW_BYTES))
    return tuple(item for item in items if item.bytes)


def lookup_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Embeddings that the head does not share, which need not be where it is."""
    return spec.lookup_params * DTYPE_BYTES[dtype]


def host_embeddings(target: ModelSpec, work: Workload) -> tuple[LedgerItem, ...]:
    """Embeddings that are kept in host memory, and the rows of a chunk, which some models scale.

    Those that are computed in what they are saved in stay in the pages of their file, which the system may take back.
    """
    if not work.host_embeddings:
        return ()
    name = MAPPED_EMBEDDINGS if target.dtype == work.dtype else "input embeddings"
    rows_bytes = 2 * work.chunk_rows * target.hidden_size * DTYPE_BYTES[work.dtype]
    return LedgerItem(name, lookup_bytes(target, work.dtype)), LedgerItem("rows of embeddings", rows_bytes)


def host_embedding_bytes(target: ModelSpec, work: Workload) -> int:
    """What of `host_embeddings` has to be there."""
    return sum(item.bytes for item in host_embeddings(target, work) if item.item != MAPPED_EMBEDDINGS)


def with_trees(
    plan: Plan, target: ModelSpec, draft: ModelSpec, tree_budget: int, head_rows: int = HEAD_BLOCK_ROWS
) -> Plan:
    """The same layers in the same places, with trees of another size; what they leave free stays free.

    A layer then computes no more rows at a time than a pass over the tree has, in steps that matrix products like.

    Args:
        plan: with a draft.
        target: sizes of the target.
        draft: sizes of the draft.
        tree_budget: nodes of every tree.
        head_rows: nodes that are scored at a time; 1 + tree_budget are all of them, as without a lazy head.

    Returns:
        A plan whose budget is raised to what it needs, if that is more.
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
    """Bytes of one pass: `hidden` outlives it, `masks` live as long as it does, `rest` at its fullest moment."""

    hidden: int
    masks: int
    rest: int

    @property
    def total(self) -> int:
        return self.hidden + self.masks + self.rest


def _workspaces(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> list[LedgerItem]:
    rows = work.ctx + work.tree_budget  # the longest pass: a prompt that fills the context, and a tree
    first = _pass(target, work, rows, rows)
    # Only a prompt's first step is so long, and there the noise has no more rows than the tree is deep.
    later = _pass(target, work, 1 + work.tree_budget, rows)
    ancestors = _ancestors_bytes(work)
    walking = _walking_bytes(target, work) + ancestors
    passing = first.total + ancestors
    drafting = 0 if draft is None else _drafting_bytes(draft, work, reading=work.ctx)
    growing = 0 if draft is None else _drafting_bytes(draft, work, reading=1 + work.tree_budget)
    most = max(passing, first.hidden + walking, drafting)
    most_later = max(later.total + ancestors, later.hidden + walking, growing)
    noise = _noise_bytes(target, min(NOISE_ROWS, 1 + work.tree_budget))
    return [
        LedgerItem("hidden rows", first.hidden),
        LedgerItem("tree mask", first.masks + ancestors),
        LedgerItem("activations", first.rest),
        LedgerItem("head blocks", max(first.hidden + walking - passing, 0)),
        LedgerItem("drafting", max(drafting - max(passing, first.hidden + walking), 0)),
        LedgerItem("sampling noise", max(noise, _noise_bytes(target, NOISE_ROWS) - (most - most_later))),
    ]


def _pass(spec: ModelSpec, work: Workload, rows: int, keys: int) -> _Pass:
    """A pass of so many new rows, at the end of which the cache has so many keys."""
    element, costs = DTYPE_BYTES[work.dtype], _activations(spec, work.dtype)
    chunk, keys = min(rows, work.chunk_rows), padded_rows(keys)
    hidden = rows * spec.hidden_size * element
    masks = costs.num_masks * chunk * keys * element
    indices = 2 * _INDEX_BYTES * rows
    in_layer = _most(costs.entry, rows, keys) + _most(costs.layer, chunk, keys)
    if rows > chunk:
        in_layer += hidden  # chunks are gathered in the layer's output
    return _Pass(hidden, masks, max(max(in_layer, _most(costs.outside, rows, keys)) + indices - hidden, 0))


def _ancestors_bytes(work: Workload) -> int:
    """Which nodes of a tree see which others: a matrix of bytes, and its copy for the device."""
    return 2 * work.tree_budget**2


def _head_bytes(spec: ModelSpec, work: Workload, rows: int) -> int:
    """Scores of so many rows in float32, and what computing them takes."""
    hidden = rows * spec.hidden_size * DTYPE_BYTES[work.dtype]
    return hidden + _most(_activations(spec, work.dtype).head, rows, 0)


def _walking_bytes(target: ModelSpec, work: Workload) -> int:
    """One block of scores, and one row of them on its way through the processors."""
    processing = PROCESSING_BYTES * target.vocab_size + 2 * _INDEX_BYTES * work.ctx
    return _head_bytes(target, work, work.head_rows) + processing


def _drafting_bytes(draft: ModelSpec, work: Workload, *, reading: int) -> int:
    """The draft reads so many rows that are new in the context, then grows a tree a batch of nodes at a time."""
    width = draft_width(work.tree_budget)
    read = _pass(draft, work, reading, work.ctx).total + _head_bytes(draft, work, 1)
    keys = work.ctx + work.draft_rows
    scoring = _head_bytes(draft, work, width) + WEIGHING_COPIES * width * draft.vocab_size * _FLOAT_BYTES
    grown = max(_pass(draft, work, width, keys).total, scoring)
    paths = PATH_BYTES * (work.tree_budget + width * DRAFT_BRANCH)
    return max(read, grown + paths + work.draft_rows * (2 * width + work.draft_rows + 2 * _INDEX_BYTES))


def _noise_bytes(target: ModelSpec, rows: int) -> int:
    return target.vocab_size * (rows * _FLOAT_BYTES + _INDEX_BYTES + DRAWING_BYTES)


def _most(costs: Iterable[RowCost], rows: int, keys: int) -> int:
    return max(cost.at(rows, keys) for cost in costs)


def _activations(spec: ModelSpec, dtype: Dtype) -> Activations:
    """As rehearsed, or else as the widest architectures have them."""
    return spec.activations.get(DTYPE_BYTES[dtype]) or _assumed(spec, DTYPE_BYTES[dtype])


def _assumed(spec: ModelSpec, element: int) -> Activations:
    """For models that could not be rehearsed: textbook attention that keeps all scores, and no operation in place."""
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
