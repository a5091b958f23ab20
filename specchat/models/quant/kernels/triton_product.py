"""Products of few rows with scaled integers on a GPU by Triton, in one pass over the codes. Not yet measured on a GPU.

Dequantizing a matrix of bytes to 16 bits moves five bytes for each weight: it reads one, writes two, and reads two.
This kernel moves one. Codes are scaled and rounded in registers, and multiplied by tensor cores. This module imports
Triton, so only GPU code imports it.

A program multiplies 16 rows of x with a block of rows of W, column by column. Its sizes depend on W alone, so the bits
of a row do not depend on the rows beside it. Programs of the same rows of W start next to each other, so that all but
the first find the codes in the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from specchat.models.quant.kernels.triton_start import start

TILE = 16  # rows of x in a program, the least that tensor cores multiply
_STAGES = 4  # blocks of codes that are read ahead
# Rows of W in a program, and from how many rows of W on. A GPU has 28 to 170 processors, and each needs a program.
_BLOCK_ROWS = ((32768, 64), (8192, 32), (0, 16))
# Warps of a program: each multiplies 16 rows of W, and two share the columns of x where there are no more.
_WARPS = {64: 4, 32: 2, 16: 2}


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int | None,
    rounds: bool,
    width: int,
    out: Tensor,
) -> bool:
    """Fill `out` with x W^T for W = (q - zero) * scale, rounded to the dtype of x.

    The values are those of `triton_affine.fill`; sums are float32. All tensors are contiguous.

    Args:
        x: activations [m, cols] in 16 bits.
        codes: codes, uint8 [rows, cols / 2] with the first column in the low half, or int8 [rows, cols].
        scales: scales [rows, groups] of any float dtype.
        zeros: zero points, int8 [rows, groups]; None for 8 (4 bits) or 0 (8 bits).
        bits: 4 or 8.
        group: columns per scale; None for one scale per row.
        rounds: whether scaled values are rounded to the dtype of the scales before the cast.
        width: columns of W that a program multiplies at a time, all with one scale.
        out: output [m, rows] in the dtype of x.

    Returns:
        Whether `out` was filled. The kernel may not compile; a device on which it failed is not tried again.
    """
    (m, rows), cols = out.shape, x.shape[1]
    height = next(size for least, size in _BLOCK_ROWS if rows >= least)

    def call() -> None:
        _kernel[triton.cdiv(m, TILE), triton.cdiv(rows, height)](
            x,
            codes,
            scales,
            scales if zeros is None else zeros,
            out,
            m,
            rows,
            cols,
            codes.shape[1],
            scales.shape[1],
            bits=bits,
            group=group or 0,
            has_zeros=zeros is not None,
            rounds=rounds,
            is_whole=cols % width == 0,
            tile=TILE,
            block_rows=height,
            block_cols=width,
            num_warps=_WARPS[height],
            num_stages=_STAGES,
            enable_fp_fusion=False,
        )

    return start("affine product", out, call)


@triton.jit(do_not_specialize=["m", "num_groups"])  # type: ignore[untyped-decorator]
def _kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    code_cols: tl.tensor,
    num_groups: tl.tensor,
    bits: tl.constexpr,
    group: tl.constexpr,
    has_zeros: tl.constexpr,
    rounds: tl.constexpr,
    is_whole: tl.constexpr,
    tile: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
) -> None:
    """Multiply a tile of x with a block of rows of W."""
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    given = tl.program_id(0) * tile + tl.arange(0, tile)
    # Rows past the end read the last one again, and are not stored.
    own_row, own_given = tl.minimum(row, rows - 1).to(tl.int64), tl.minimum(given, m - 1).to(tl.int64)
    sums = tl.zeros([block_rows, tile], dtype=tl.float32)
    for first in range(0, cols, block_cols):
        column = first + tl.arange(0, block_cols)
        if bits == 4:
            byte = first // 2 + tl.arange(0, block_cols // 2)
            place = codes + own_row[:, None] * code_cols + byte[None, :]
            pairs = tl.load(place) if is_whole else tl.load(place, mask=(byte < code_cols)[None, :], other=0)
            pairs = pairs.to(tl.int32)
            q = tl.interleave(pairs & 15, pairs >> 4)
        else:
            place = codes + own_row[:, None] * code_cols + column[None, :]
            q = tl.load(place) if is_whole else tl.load(place, mask=(column < cols)[None, :], other=0)
            q = q.to(tl.int32)
        at = own_row * num_groups + (0 if group == 0 else first // group)
        if has_zeros:
            q -= tl.load(zeros + at).to(tl.int32)[:, None]
        elif bits == 4:
            q -= 8
        values = q.to(tl.float32) * tl.load(scales + at).to(tl.float32)[:, None]
        if rounds:
            values = values.to(scales.dtype.element_ty).to(tl.float32)
        place = x + own_given[None, :] * cols + column[:, None]
        rows_of_x = tl.load(place) if is_whole else tl.load(place, mask=(column < cols)[:, None], other=0)
        sums = tl.dot(values.to(x.dtype.element_ty), rows_of_x, sums)
    place = out + given.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(given < m)[None, :] & (row < rows)[:, None])
