"""Sizes of a model from its description alone: bytes per layer and per token, before any weight is read.

Nothing here imports torch.
"""

from functools import lru_cache

from specchat.models.checkpoint.layout import PIECE_NUMBERS, blob_offsets, dequantized_rows
from specchat.records.model import DTYPE_BYTES, QUANTS, Dtype, ModelSpec

_PIECE_ITEM_BYTES = 6


def layer_bytes(spec: ModelSpec, layer: int, dtype: Dtype) -> int:
    """Bytes of one decoder layer's blob, which is what it takes in device memory, in a slot and over the link."""
    return layer_sizes(spec, dtype)[layer]


@lru_cache(maxsize=512)
def layer_sizes(spec: ModelSpec, dtype: Dtype) -> tuple[int, ...]:
    """`layer_bytes` of all layers; the same ones are worked out once, since a search asks for them all the time."""
    known: dict[int, int] = {}
    for params in spec.layer_params:
        if id(params) not in known:
            known[id(params)] = blob_offsets(size.nbytes(dtype) for size in params)[1]
    return tuple(known[id(params)] for params in spec.layer_params)


def weight_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Bytes of all layers, and of everything beside them."""
    rest = sum(size.nbytes(dtype) for size in spec.other_params) + spec.buffer_bytes
    return rest + sum(layer_sizes(spec, dtype))


def dequantize_bytes(spec: ModelSpec, dtype: Dtype, device: str) -> int:
    """Memory that one quantized matrix after the other is dequantized into, and what computing its numbers takes."""
    item_bytes, kind = DTYPE_BYTES[dtype], device.partition(":")[0]
    numbers = max((dequantized_rows(*shape, item_bytes, kind) * shape[1] for shape in spec.quant_shapes), default=0)
    # what specchat quantizes itself is computed where it goes to
    at_once = 0 if spec.quant in QUANTS else min(numbers, PIECE_NUMBERS[kind])
    return numbers * item_bytes + at_once * _PIECE_ITEM_BYTES
