"""Alignment and order of a layer's tensors in its contiguous blob, and the pieces in which matrices are dequantized.

Nothing here imports torch.
"""

from collections.abc import Iterable

from specchat.units import MIB

# Tensors start at multiples of this within a layer's blob, as matrix kernels like it; layers at multiples of a page.
TENSOR_ALIGNMENT = 256
LAYER_ALIGNMENT = 4096
# Rows that are dequantized at a time. On a CPU the piece stays in the cache until the product has read it; from 2 to
# 8 MiB all are alike (Zen 4), smaller ones cost calls, and turned products (`kernels.matmul`) with 4096 columns want
# less than 1024 rows. Products are computed in blocks of rows. A GPU wants large products.
_CHUNK_ROWS = 896
_ROW_BLOCK = 64
_CHUNK_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
# Numbers of checkpoints that come quantized, between two looks at memory: few enough for a CPU's cache; on a GPU, for
# its memory. While they are computed they take, beside where they go to, a float32 and its rounding to 16 bits each.
PIECE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 22}


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
