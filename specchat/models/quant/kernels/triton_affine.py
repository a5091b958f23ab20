"""Dequantization of scaled integers on a GPU by Triton, in one pass over memory. Not yet measured on a GPU.

torch needs a kernel each for unpacking, subtracting, scaling and casting, with float32 in memory in between. This
module imports Triton, so only GPU code imports it.
"""

import triton
import triton.language as tl
from torch import Tensor

from specchat.models.quant.kernels.triton_start import start

_BLOCK = 1024  # columns of one program: with Triton's four warps a thread has eight, 16 bytes of a 16-bit type


def fill(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int | None, rounds: bool, out: Tensor
) -> bool:
    """Fill `out` with (q - zero) * scale, computed in float32: the values of `Affine` and `Int8`, bit for bit.

    An integer difference and one multiplication leave nothing for a compiler to reorder. All tensors are contiguous.

    Args:
        codes: codes, uint8 [rows, cols / 2] with the first column in the low half, or int8 [rows, cols].
        scales: scales [rows, groups] of any float dtype.
        zeros: zero points, int8 [rows, groups]; None for 8 (4 bits) or 0 (8 bits).
        bits: 4 or 8.
        group: columns per scale, the last group may be smaller; None for one scale per row.
        rounds: whether scaled values are rounded to the dtype of the scales before the cast.
        out: output [rows, cols] of any float dtype.

    Returns:
        Whether `out` was filled. The kernel may not compile; a device on which it failed is not tried again.
    """
    rows, cols = out.shape

    def call() -> None:
        _kernel[rows, triton.cdiv(cols, _BLOCK)](
            codes,
            scales,
            scales if zeros is None else zeros,
            out,
            cols,
            codes.shape[1],
            scales.shape[1],
            bits=bits,
            group=group or 0,
            has_zeros=zeros is not None,
            rounds=rounds,
            block=_BLOCK,
            enable_fp_fusion=False,
        )

    return start("affine", out, call)


@triton.jit(do_not_specialize=["num_groups"])  # type: ignore[untyped-decorator]
def _kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    code_cols: tl.tensor,
    num_groups: tl.tensor,
    bits: tl.constexpr,
    group: tl.constexpr,
    has_zeros: tl.constexpr,
    rounds: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Dequantize a block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < cols
    if bits == 4:
        byte = tl.program_id(1) * (block // 2) + tl.arange(0, block // 2)
        pairs = tl.load(codes + row * code_cols + byte, mask=byte < code_cols, other=0).to(tl.int32)
        q = tl.interleave(pairs & 15, pairs >> 4)
    else:
        q = tl.load(codes + row * code_cols + column, mask=inside, other=0).to(tl.int32)
    place = row * num_groups + (column * 0 if group == 0 else column // group)
    if has_zeros:
        q -= tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
    elif bits == 4:
        q -= 8
    numbers = q.to(tl.float32) * tl.load(scales + place, mask=inside, other=0).to(tl.float32)
    if rounds:
        numbers = numbers.to(scales.dtype.element_ty).to(tl.float32)
    tl.store(out + row * cols + column, numbers.to(out.dtype.element_ty), mask=inside)
