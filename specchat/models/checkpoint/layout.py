"""The layout of a layer's tensors in its contiguous blob, and the chunk sizes for dequantizing matrices.

Nothing here imports torch.
"""

from collections.abc import Iterable

from specchat.units import MIB

# Within a layer's blob, tensors start at multiples of 256 bytes, which suits matmul kernels. Layers are page-aligned.
TENSOR_ALIGNMENT = 256
LAYER_ALIGNMENT = 4096
# Matrices are dequantized in chunks of rows. On a CPU, a chunk should stay in the cache until the matmul has read it.
# Sizes from 2 to 8 MiB are equally fast (Zen 4), and smaller ones need more calls. Transposed matmuls
# (`kernels.matmul`) with 4096 columns need less than 1024 rows. Matmuls run in blocks of rows. A GPU needs large
# matmuls.
_CHUNK_ROWS = 896
_ROW_BLOCK = 64
_CHUNK_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
# Values of a pre-quantized matrix that are dequantized at a time: few enough for a CPU's cache, or for a GPU's memory.
# Beside the result, each value temporarily takes a float32 and its 16-bit rounding.
PIECE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 22}


def aligned(num_bytes: int, alignment: int) -> int:
    """Return `num_bytes` rounded up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


def blob_offsets(tensor_bytes: Iterable[int]) -> tuple[list[int], int]:
    """Return the offset of each tensor in a layer's contiguous blob, and the blob's length, in bytes."""
    offsets, end = [], 0
    for nbytes in tensor_bytes:
        offsets.append(aligned(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + nbytes
    return offsets, aligned(end, LAYER_ALIGNMENT)


def dequantized_rows(rows: int, cols: int, item_bytes: int, device_type: str) -> int:
    """Return how many rows of a matrix [rows, cols] are dequantized at a time.

    Args:
        rows: rows of the matrix.
        cols: columns of the matrix.
        item_bytes: bytes per dequantized value.
        device_type: "cpu" or "cuda".
    """
    limit = max(_CHUNK_BYTES[device_type] // (cols * item_bytes), 1)
    if device_type != "cpu":  # rows of results that are no multiples of 16 bytes would take slower matmul kernels
        return min(rows, limit // _ROW_BLOCK * _ROW_BLOCK or limit)
    limit = min(limit, _CHUNK_ROWS)
    num_pieces = -(-rows // limit)
    return min(rows, limit, aligned(-(-rows // num_pieces), _ROW_BLOCK))  # chunks of similar size
