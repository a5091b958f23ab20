"""The ledger: device memory of a configuration, item by item, computed before any of it is allocated.

Weights and caches are exact. A pass, the walk down the trees and the growth of the next trees reuse the same memory. So
the ledger lists the workspaces of a pass in full, and for the others only what exceeds them.

With several seats, each has caches for a whole context. The largest pass reads a prompt that fills the context, or
several that fill a chunk, besides the last token of each other sequence and all trees.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from specchat.models.sizes.geometry import dequantize_bytes, held_bytes, layer_sizes, sizes_beside_experts, slot_bytes
from specchat.planner.pass_memory import FLOAT_BYTES, INDEX_BYTES, PassBytes, head_bytes, memory_of_pass
from specchat.planner.states import draft_state_bytes, state_items
from specchat.records.kv_slabs import allocated_bytes
from specchat.records.limits import (
    COPY_PROMPT_ROWS,
    DRAFT_BRANCH,
    DRAWING_BYTES,
    FREQUENT_TOKEN_BYTES,
    FREQUENT_TOKENS,
    HEAD_BLOCK_ROWS,
    MOST_BLOCK_ROWS,
    MOST_CHECKED_ROWS,
    NUM_READERS,
    PATH_BYTES,
    PROCESSING_BYTES,
    READ_WINDOW_BYTES,
    RECYCLED_RUN_BYTES,
    RECYCLED_RUNS,
    RETRIEVAL_PAST_TOKENS,
    RETRIEVAL_TOKEN_BYTES,
    RUNTIME_BYTES,
    UNREAD_STATES,
    WEIGHING_COPIES,
    draft_width,
    head_block_rows,
    noise_rows,
    padded_rows,
)
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec
from specchat.records.plan import LedgerItem, Placement, Plan, Workload

_CHUNK_STEP = 64
_RESERVE = "library reserve"
MAPPED_EMBEDDINGS = "embeddings in the page cache"


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
    items = [
        *layer_items(target, work.dtype, placement),
        *_outside_layers(target, work),
        *([LedgerItem("copy of the head", placement.head_copy_bytes)] if placement.head_copy_bytes else []),
        LedgerItem("KV cache", kv_bytes(target, work, work.tree_rows)),
        *state_items(target, work),
    ]
    if draft is not None:
        layers = layer_sizes(draft, work.dtype)
        held = sum(layers[i] for i in placement.streamed) if draft.is_copy else sum(layers)
        items.append(LedgerItem("draft", held + _other_bytes(draft, work.dtype) + _shared_bytes(draft, work.dtype)))
        if kv := _draft_kv_bytes(draft, work):
            items.append(LedgerItem("draft KV cache", kv))
        if graphs := _graph_bytes(draft, work):
            items.append(LedgerItem("draft graphs", graphs))
        if states := draft_state_bytes(draft, work) + _unread_bytes(draft, work):
            items.append(LedgerItem("draft states", states))
    models = [target] if draft is None else [target, draft]
    if dequantized := sum(dequantize_bytes(spec, work.dtype, work.device) for spec in models):
        items.append(LedgerItem("dequantized pieces", dequantized))
    items += _workspaces(target, draft, work)
    if work.reserve_bytes:
        items.append(LedgerItem(_RESERVE, work.reserve_bytes))
    return tuple(items)


def layer_items(target: ModelSpec, dtype: Dtype, placement: Placement) -> list[LedgerItem]:
    """Return the items of layers and experts."""
    sizes, experts = layer_sizes(target, dtype), placement.experts
    if experts is None:
        slot = max((sizes[i] for i in placement.streamed), default=0)
        resident = sum(sizes[i] for i in placement.resident) + placement.expanded_bytes
        return [LedgerItem("resident layers", resident), LedgerItem("slots", placement.slots * slot)]
    routed, sizes = target.experts, sizes_beside_experts(target, dtype)
    assert routed is not None
    slot, held = slot_bytes(routed, dtype), held_bytes(routed, dtype)
    items = [
        LedgerItem("resident layers", sum(sizes[i] for i in placement.resident)),
        LedgerItem("expert pool", len(routed.layers) * experts.quota * slot),
        LedgerItem("expert slots", experts.shared * slot),
    ]
    return [*items, LedgerItem("small tensors of experts", held)] if held else items


def bytes_beside_layers(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> int:
    """Return the sum of a ledger without resident layers, slots and copies of layers, faster than `build_ledger`.

    A search needs hundreds of these sums. The sum never shrinks with a longer context or a larger tree.
    """
    kept, first, later = _target_needs(target, work)
    if draft is not None:
        draft_kept, drafting, later_drafting = _draft_needs(draft, work)
        kept, first, later = kept + draft_kept, max(first, drafting), max(later, later_drafting)
    first_noise, later_noise = _noise_needs(target, work)
    return kept + work.reserve_bytes + max(first + first_noise, later + later_noise)


@lru_cache(maxsize=4096)
def _target_needs(target: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """Return permanent bytes, and peak workspace bytes of the longest first step and of later steps."""
    kept = kv_bytes(target, work, work.tree_rows)
    kept += sum(item.bytes for item in (*_outside_layers(target, work), *state_items(target, work)))
    first, later = target_passes(target, work)
    ancestors = ancestors_bytes(work)
    walk_bytes = _walking_bytes(target, work)
    return (
        kept + dequantize_bytes(target, work.dtype, work.device),
        ancestors + max(first.total, first.hidden + walk_bytes),
        ancestors + max(later.total, later.hidden + walk_bytes),
    )


@lru_cache(maxsize=4096)
def _draft_needs(draft: ModelSpec, work: Workload) -> tuple[int, int, int]:
    """Return the figures of `_target_needs` for a draft; cached separately, because one draft serves many targets."""
    layers = 0 if draft.is_copy else sum(layer_sizes(draft, work.dtype))  # copies count with the placement
    kept = layers + _other_bytes(draft, work.dtype) + _shared_bytes(draft, work.dtype)
    kept += _draft_kv_bytes(draft, work) + draft_state_bytes(draft, work) + _unread_bytes(draft, work)
    kept += _graph_bytes(draft, work)
    first, later = work.prompt_rows + work.seats - 1, work.seats + work.tree_budget
    if draft.is_copy:
        first = min(work.seats * COPY_PROMPT_ROWS[work.device.partition(":")[0]], first)
    return (
        kept + dequantize_bytes(draft, work.dtype, work.device),
        _drafting_bytes(draft, work, reading=first),
        _drafting_bytes(draft, work, reading=later),
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
        others: items of `host_embeddings`, `restore_items` and `retrieval_items`.

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


def kv_bytes(spec: ModelSpec, work: Workload, tree_rows: int) -> int:
    """Return the bytes of a cache whose seats hold a context and rows of trees."""
    rows = work.seats * padded_rows(work.ctx + tree_rows)
    return allocated_bytes(spec.kv_shapes, rows, DTYPE_BYTES[work.dtype], work.device.partition(":")[0])


def _draft_kv_bytes(draft: ModelSpec, work: Workload) -> int:
    """Return the bytes of the draft's own cache; a copy uses the target's."""
    return 0 if draft.is_copy else kv_bytes(draft, work, work.draft_rows)


def _graph_bytes(draft: ModelSpec, work: Workload) -> int:
    """Return the bytes that recorded passes of a draft model hold on a GPU: a pass's workspaces, masks, and scores."""
    if work.device == "cpu" or work.seats > 1 or draft.is_head or draft.is_copy:
        return 0
    width, keys = draft_width(work.tree_budget), work.ctx + work.draft_rows
    workspaces = memory_of_pass(draft, work, width, keys).total + head_bytes(draft, work, width)
    # Sizes of keys double, so those of all sizes are twice the largest: masks and positions.
    return workspaces + width * draft.vocab_size * FLOAT_BYTES + 2 * keys * (width + INDEX_BYTES)


def lookup_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Return the bytes of an untied input embedding, which may live in host memory."""
    return spec.lookup_params * (spec.lookup_item_bytes or DTYPE_BYTES[dtype])


def host_embeddings(target: ModelSpec, work: Workload) -> tuple[LedgerItem, ...]:
    """Return the items of input embeddings in host memory: the table, and the rows of one chunk.

    Some models scale these rows, so two copies count. A table that needs no conversion is mapped from its file; the
    system may reclaim its pages.
    """
    if not work.host_embeddings:
        return ()
    is_mapped = target.dtype == work.dtype and target.lookup_item_bytes is None
    name = MAPPED_EMBEDDINGS if is_mapped else "input embeddings"
    rows_bytes = 2 * work.chunk_rows * target.hidden_size * DTYPE_BYTES[work.dtype]
    return LedgerItem(name, lookup_bytes(target, work.dtype)), LedgerItem("rows of embeddings", rows_bytes)


def host_embedding_bytes(target: ModelSpec, work: Workload) -> int:
    """Return the bytes of `host_embeddings` that the system cannot reclaim."""
    return sum(item.bytes for item in host_embeddings(target, work) if item.item != MAPPED_EMBEDDINGS)


def retrieval_items(work: Workload, *, used: bool) -> tuple[LedgerItem, ...]:
    """Return the items of texts, scores and counts that drafts are looked up in, as large as they may become."""
    if not used:
        return ()
    num_tokens = work.seats * work.ctx + RETRIEVAL_PAST_TOKENS
    size = RETRIEVAL_TOKEN_BYTES * num_tokens + RECYCLED_RUN_BYTES * RECYCLED_RUNS
    frequent = LedgerItem("frequent tokens to draft", FREQUENT_TOKEN_BYTES * FREQUENT_TOKENS)
    return LedgerItem("text to draft from", size), frequent


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
        chunk_rows=min(plan.work.chunk_rows, -(-(plan.work.seats + tree_budget) // _CHUNK_STEP) * _CHUNK_STEP),
        head_rows=head_rows,
    )
    ledger = build_ledger(target, draft, work, plan.placement)
    changed = replace(plan, work=work, adaptive=False, ledger=ledger, stages=())
    return replace(changed, vram_bytes=max(plan.vram_bytes, changed.device_bytes))


def _outside_layers(target: ModelSpec, work: Workload) -> Iterable[LedgerItem]:
    """Yield the items of weights outside the layers; blocks that layers share are used by every pass, so they stay."""
    if shared := _shared_bytes(target, work.dtype):
        yield LedgerItem("shared blocks", shared)
    other = _other_bytes(target, work.dtype)
    if work.host_embeddings:
        yield LedgerItem("head", other - lookup_bytes(target, work.dtype))
    else:
        yield LedgerItem("embeddings and head", other)


def _shared_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    return sum(size.nbytes(dtype) for size in spec.shared_params)


def _other_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    narrowed = spec.narrowed_bytes if DTYPE_BYTES[dtype] == 2 else 0
    return sum(size.nbytes(dtype) for size in spec.other_params) + spec.buffer_bytes - narrowed


# --- workspaces --------------------------------------------------------------------------------------------------


def _workspaces(target: ModelSpec, draft: ModelSpec | None, work: Workload) -> list[LedgerItem]:
    first, later = target_passes(target, work)
    ancestors = ancestors_bytes(work)
    walk_bytes = _walking_bytes(target, work) + ancestors
    pass_bytes = first.total + ancestors
    drafting, later_drafting = (0, 0) if draft is None else _draft_needs(draft, work)[1:]
    most = max(pass_bytes, first.hidden + walk_bytes, drafting)
    most_later = max(later.total + ancestors, later.hidden + walk_bytes, later_drafting)
    first_noise, later_noise = _noise_needs(target, work)
    return [
        LedgerItem("hidden rows", first.hidden),
        LedgerItem("tree mask", first.masks + ancestors),
        LedgerItem("activations", first.rest),
        LedgerItem("head blocks", max(first.hidden + walk_bytes - pass_bytes, 0)),
        LedgerItem("drafting", max(drafting - max(pass_bytes, first.hidden + walk_bytes), 0)),
        LedgerItem("sampling noise", max(first_noise, later_noise - (most - most_later))),
    ]


def target_passes(target: ModelSpec, work: Workload) -> tuple[PassBytes, PassBytes]:
    """Return the bytes of the largest pass, which reads as many prompts as it may, and of later passes."""
    keys = work.ctx + work.tree_budget
    largest = memory_of_pass(
        target, work, work.prompt_rows + work.seats - 1 + work.tree_budget, keys, work.tapped_width
    )
    return largest, memory_of_pass(target, work, work.seats + work.tree_budget, keys, work.tapped_width)


def ancestors_bytes(work: Workload) -> int:
    """Return the bytes of the ancestor matrices of all trees, one byte an entry, and of their device copies."""
    return 2 * work.tree_budget**2


def _walking_bytes(target: ModelSpec, work: Workload) -> int:
    """Return the bytes of one block of scores for each walk, and of one score row in the logits processors."""
    processing = PROCESSING_BYTES * target.vocab_size + 2 * INDEX_BYTES * work.ctx
    rows = max(walks * head_block_rows(work.head_rows, walks) for walks in range(1, work.seats + 1))
    return head_bytes(target, work, rows) + processing


def _drafting_bytes(draft: ModelSpec, work: Workload, *, reading: int) -> int:
    """Return the peak bytes of drafting: reading new context rows, then growing trees in batches of nodes."""
    if draft.is_block:
        return _block_drafting_bytes(draft, work, reading)
    if draft.is_assistant:
        return _assistant_bytes(draft, work)
    width, seats = draft_width(work.tree_budget, work.seats), work.seats
    read = memory_of_pass(draft, work, reading, work.ctx).total + head_bytes(draft, work, seats)
    scoring = _scoring_bytes(draft, work, width)
    grown = max(memory_of_pass(draft, work, width, work.ctx + work.draft_rows).total, scoring)
    if seats > 1:
        read = max(read, _scoring_bytes(draft, work, seats))
    paths = PATH_BYTES * (2 * work.tree_budget + width * DRAFT_BRANCH)
    rows = work.draft_rows * (2 * width + seats * (work.draft_rows + 2 * INDEX_BYTES))
    row_bytes = draft.hidden_size * DTYPE_BYTES[work.dtype]
    if draft.is_head:
        # While a chunk is joined: embeddings, their norms, both halves side by side, and a norm's float32 copies.
        joining = min(reading, work.chunk_rows) * (4 * row_bytes + 2 * draft.hidden_size * FLOAT_BYTES)
        read = max(read, joining) + 2 * reading * row_bytes  # the target's states, and the layer's input
        # Outputs, which children read: of each layer of several. Those of a text are handed on from layer to layer.
        rows += draft.num_layers * (seats * (1 + work.draft_rows) + 2 * width) * row_bytes
        if draft.num_layers > 1:
            read += 2 * reading * row_bytes
            rows += 2 * width * row_bytes
    if draft.tapped_width:
        # Rows of the layer hold embeddings, too: the input, the output, and the norms of both.
        read += (2 * reading + min(reading, work.chunk_rows)) * row_bytes
        rows += 3 * width * row_bytes
    return max(read, grown + paths + rows)


def _block_drafting_bytes(draft: ModelSpec, work: Workload, reading: int) -> int:
    """Return the peak bytes of a head that guesses in blocks: keys and values of new rows; blocks and their scores."""
    element, seats = DTYPE_BYTES[work.dtype], work.seats
    chunk, width = min(reading, work.chunk_rows), draft_width(work.tree_budget, work.seats)
    most_numbers = max(shape.numbers_per_row for shape in draft.kv_shapes)
    in_chunk = draft.hidden_size * (2 * element + 2 * FLOAT_BYTES) + 3 * most_numbers * element
    stored = reading * draft.hidden_size * element + chunk * in_chunk
    rows = seats * min(MOST_BLOCK_ROWS, work.draft_rows)
    guessed = memory_of_pass(draft, work, rows, work.ctx + work.draft_rows).total + rows * draft.hidden_size * element
    levels = rows * (draft.vocab_size * FLOAT_BYTES + draft.hidden_size * element)  # scores and states
    paths = PATH_BYTES * (2 * work.tree_budget + width * DRAFT_BRANCH)
    scored = max(head_bytes(draft, work, rows), _scoring_bytes(draft, work, max(width, seats)))
    return max(stored, guessed, levels + scored + paths)


def _assistant_bytes(draft: ModelSpec, work: Workload) -> int:
    """Return the peak bytes of drafting with an assistant, which reads no prompts: growing trees, or the check."""
    element, width = DTYPE_BYTES[work.dtype], max(draft_width(work.tree_budget, work.seats), work.seats)
    rows = max(width, MOST_CHECKED_ROWS)
    joined = rows * (4 * draft.target_size + draft.hidden_size) * element  # embeddings, states, both, and the input
    outputs = work.seats * (1 + work.draft_rows) * draft.target_size * element
    computed = memory_of_pass(draft, work, rows, work.ctx + work.draft_rows).total + joined
    # Scores of an assistant with clusters are chosen from copies of the scores.
    scored = _scoring_bytes(draft, work, width) + width * draft.vocab_size * FLOAT_BYTES
    paths = PATH_BYTES * (2 * work.tree_budget + width * DRAFT_BRANCH)
    return outputs + paths + max(computed, scored)


def _unread_bytes(draft: ModelSpec, work: Workload) -> int:
    """Return the bytes of the target's states that a head keeps unread; none for other drafts."""
    if draft.is_assistant:
        return work.seats * (MOST_CHECKED_ROWS + 1) * draft.target_size * DTYPE_BYTES[work.dtype]
    rows = work.seats * (UNREAD_STATES + 1) if draft.is_head and not draft.is_block else 0
    return rows * draft.hidden_size * DTYPE_BYTES[work.dtype]


def _scoring_bytes(draft: ModelSpec, work: Workload, rows: int) -> int:
    """Return the bytes of the draft's scores of `rows` nodes, and of the weights of their children."""
    return head_bytes(draft, work, rows) + WEIGHING_COPIES * rows * draft.vocab_size * FLOAT_BYTES


def _noise_needs(target: ModelSpec, work: Workload) -> tuple[int, int]:
    """Return the bytes of noise during the largest pass and during later passes."""
    rows = noise_rows(work.seats)
    # A single sequence reads its prompt in the first step, whose noise has at most one row per tree node and the root.
    # With several sequences, some are far into their answers while another prompt is read.
    later = _noise_bytes(target, work.seats * rows)
    return later if work.seats > 1 else _noise_bytes(target, min(rows, 1 + work.tree_budget)), later


def _noise_bytes(target: ModelSpec, rows: int) -> int:
    return target.vocab_size * (rows * FLOAT_BYTES + INDEX_BYTES + DRAWING_BYTES)
