"""How large a model is, from its configuration alone: bytes per layer and per token, before any weight is read.

Nothing here imports torch, nor does a model need it that was described before: so a plan can be shown at once.
"""

from collections.abc import Iterable
from functools import lru_cache

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec, Quant
from specchat.models import spec_cache
from specchat.units import MIB

# Tensors start at multiples of this within a layer's blob, as matrix kernels like it; layers at multiples of a page.
TENSOR_ALIGNMENT = 256
LAYER_ALIGNMENT = 4096

# Rows that are dequantized at a time. On a CPU the piece stays in the cache until the product has read it; from 2 to
# 8 MiB all are alike (Zen 4), smaller ones cost calls, and turned products (`models.products`) with 4096 columns want
# less than 1024 rows. Products are computed in blocks of rows. A GPU wants large products.
_CHUNK_ROWS = 896
_ROW_BLOCK = 64
_CHUNK_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
# Numbers of checkpoints that come quantized, between two looks at memory: few enough for a CPU's cache; on a GPU, for
# its memory. While they are computed they take, beside where they go to, a float32 and its rounding to 16 bits each.
PIECE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 22}
_PIECE_ITEM_BYTES = 6
_WITHOUT_PIECES = ("none", "int8", "int4")  # ours are computed where they go to


def aligned(num_bytes: int, alignment: int) -> int:
    """`num_bytes` rounded up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


def blob_offsets(tensor_bytes: Iterable[int]) -> tuple[list[int], int]:
    """Where each tensor starts in a layer's contiguous blob, and the blob's length, in bytes."""
    offsets, end = [], 0
    for nbytes in tensor_bytes:
        offsets.append(aligned(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + nbytes
    return offsets, aligned(end, LAYER_ALIGNMENT)


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
    at_once = 0 if spec.quant in _WITHOUT_PIECES else min(numbers, PIECE_NUMBERS[kind])
    return numbers * item_bytes + at_once * _PIECE_ITEM_BYTES


def dequantized_rows(rows: int, cols: int, item_bytes: int, device_type: str) -> int:
    """Rows of a matrix [rows, cols] that are dequantized at a time.

    Args:
        rows: of the matrix.
        cols: likewise.
        item_bytes: of a number that comes out.
        device_type: "cpu" or "cuda".
    """
    limit = max(_CHUNK_BYTES[device_type] // (cols * item_bytes), 1)
    if device_type != "cpu":
        return min(rows, limit)
    limit = min(limit, _CHUNK_ROWS)
    num_pieces = -(-rows // limit)
    return min(rows, limit, aligned(-(-rows // num_pieces), _ROW_BLOCK))  # pieces of about one size


def describe(source: ModelSource, quant: Quant = "none") -> ModelSpec:
    """The sizes of a model; remembered, since finding them out takes seconds.

    Args:
        source: local files.
        quant: what its matrices are to be stored in.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: as `hf_compat.load_config`; UsageError: as `choose_recipe`.
    """
    key = spec_cache.key_of(source, quant)
    known = spec_cache.load(key, source.name)
    if known is not None:
        return known
    from specchat.models.describing import describe_anew  # with torch and transformers

    spec = describe_anew(source, quant)
    spec_cache.save(key, spec)
    return spec
