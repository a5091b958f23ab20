"""The ledger: device memory of a configuration, item by item, before any of it is taken."""

from collections.abc import Sequence
from dataclasses import dataclass

from specchat.config import DTYPE_BYTES, Dtype, LedgerItem, ModelSpec
from specchat.models.geometry import dequantize_bytes, layer_bytes

_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Workload:
    """The choices that the ledger prices.

    Attributes:
        dtype: of weights, activations and caches.
        ctx: committed tokens.
        tree_budget: draft nodes per tree.
        draft_rows: rows that one growing tree may take in the draft's cache.
        chunk_rows: rows that one layer computes at a time.
        slots: staging buffers.
        device: where passes run.
    """

    dtype: Dtype
    ctx: int
    tree_budget: int
    draft_rows: int
    chunk_rows: int
    slots: int
    device: str = "cpu"


def build_ledger(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, resident: Sequence[int]
) -> tuple[LedgerItem, ...]:
    """Every item that lives in device memory while chatting.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, if there is one.
        work: the choices.
        resident: indices of the target's layers that stay.

    Returns:
        Items in the order a person would ask for them. Weights, slots and caches are exact; activations are a bound.
    """
    streamed = set(range(target.num_layers)) - set(resident)
    slot_bytes = max((layer_bytes(target, i, work.dtype) for i in streamed), default=0)
    items = [
        LedgerItem("resident layers", sum(layer_bytes(target, i, work.dtype) for i in resident)),
        LedgerItem("slots", work.slots * slot_bytes if streamed else 0),
        LedgerItem("embeddings and head", _other_bytes(target, work.dtype)),
        LedgerItem("KV cache", _kv_bytes(target, work.dtype, work.ctx + work.tree_budget)),
    ]
    if draft is not None:
        layers = sum(layer_bytes(draft, i, work.dtype) for i in range(draft.num_layers))
        items.append(LedgerItem("draft", layers + _other_bytes(draft, work.dtype)))
        items.append(LedgerItem("draft KV cache", _kv_bytes(draft, work.dtype, work.ctx + work.draft_rows)))
    models = [target] if draft is None else [target, draft]
    if dequantized := sum(dequantize_bytes(spec, work.dtype, work.device) for spec in models):
        items.append(LedgerItem("dequantized pieces", dequantized))
    items.append(LedgerItem("workspace", _workspace_bytes(target, work)))
    return tuple(items)


def _other_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    return sum(size.nbytes(dtype) for size in spec.other_params) + spec.buffer_bytes


def _kv_bytes(spec: ModelSpec, dtype: Dtype, rows: int) -> int:
    padded = -(-rows // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    return padded * spec.kv_numbers_per_row * DTYPE_BYTES[dtype]


def _workspace_bytes(spec: ModelSpec, work: Workload) -> int:
    """Hidden rows of the longest pass (before and after a layer), one chunk's activations and mask, head and noise."""
    rows = work.ctx + work.tree_budget
    element = DTYPE_BYTES[work.dtype]
    hidden = 2 * rows * spec.hidden_size
    attention_width = spec.num_heads * max(shape.key_dim for shape in spec.kv_shapes)
    chunk = work.chunk_rows * (4 * spec.hidden_size + 4 * attention_width + 3 * spec.mlp_size)
    masks = 2 * work.chunk_rows * rows
    head = 16 * spec.vocab_size * 4
    noise = 64 * spec.vocab_size * 4
    ancestors = work.tree_budget**2 + work.draft_rows**2
    return (hidden + chunk + masks) * element + head + noise + ancestors
