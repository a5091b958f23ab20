"""Sizes in bytes that follow from a model's description: layers, weights and scratch memory.

Nothing here imports torch.
"""

from functools import lru_cache

from specchat.models.checkpoint.layout import PIECE_NUMBERS, blob_offsets, dequantized_rows
from specchat.records.model import DTYPE_BYTES, QUANTS, Dtype, ModelSpec, RoutedExperts

_PIECE_ITEM_BYTES = 6


def layer_bytes(spec: ModelSpec, layer: int, dtype: Dtype) -> int:
    """Return the bytes of one decoder layer's blob: its size in device memory, in a slot and over the link."""
    return layer_sizes(spec, dtype)[layer]


@lru_cache(maxsize=512)
def layer_sizes(spec: ModelSpec, dtype: Dtype) -> tuple[int, ...]:
    """Return `layer_bytes` of all layers; cached, because a plan search needs it often."""
    known: dict[int, int] = {}
    for params in spec.layer_params:
        if id(params) not in known:
            known[id(params)] = blob_offsets(size.nbytes(dtype) for size in params)[1]
    return tuple(known[id(params)] for params in spec.layer_params)


@lru_cache(maxsize=512)
def sizes_beside_experts(spec: ModelSpec, dtype: Dtype) -> tuple[int, ...]:
    """Return the bytes of each layer's blob without the experts that can be read one by one."""
    sizes = list(layer_sizes(spec, dtype))
    if spec.experts is not None:
        for layer in spec.experts.layers:
            beside = spec.experts.beside(spec.layer_params[layer])
            sizes[layer] = blob_offsets(size.nbytes(dtype) for size in beside)[1]
    return tuple(sizes)


def slot_bytes(experts: RoutedExperts, dtype: Dtype) -> int:
    """Return the bytes of a slot for one expert."""
    return blob_offsets(size.nbytes(dtype) for size in experts.params)[1]


def read_bytes(experts: RoutedExperts, dtype: Dtype) -> int:
    """Return the bytes that are read for one expert: all except those that stay in memory."""
    return sum(size.nbytes(dtype) for size in experts.params if not experts.is_held(size, dtype))


def held_bytes(experts: RoutedExperts, dtype: Dtype) -> int:
    """Return the bytes of the small parameters of all experts, which stay in memory."""
    each = sum(size.nbytes(dtype) for size in experts.params if experts.is_held(size, dtype))
    return len(experts.layers) * experts.num_experts * each


def weight_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Return the bytes of all weights and buffers."""
    rest = sum(size.nbytes(dtype) for size in (*spec.other_params, *spec.shared_params)) + spec.buffer_bytes
    return rest + sum(layer_sizes(spec, dtype))


def dequantize_bytes(spec: ModelSpec, dtype: Dtype, device: str) -> int:
    """Return the bytes of scratch memory for dequantizing one matrix at a time, including intermediate values."""
    item_bytes, kind = DTYPE_BYTES[dtype], device.partition(":")[0]
    numbers = max((dequantized_rows(*shape, item_bytes, kind) * shape[1] for shape in spec.quant_shapes), default=0)
    # The formats of `QUANTS` dequantize straight into the scratch memory, without intermediate values.
    at_once = 0 if spec.quant in QUANTS else min(numbers, PIECE_NUMBERS[kind])
    return numbers * item_bytes + at_once * _PIECE_ITEM_BYTES
