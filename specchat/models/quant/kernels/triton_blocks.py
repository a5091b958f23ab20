"""Kernels for ggml's blocks and for int3 on a GPU by Triton: dequantization, and products of few rows of x.

One function per type turns the place of a value in its block into the value. It multiplies in ggml's order, without
fused multiply-adds, so values have the bits of `formats.ggml` and `formats.int3`. Both kernels call it. Not yet
measured on a GPU. This module imports Triton, so only GPU code imports it.
"""

from collections.abc import Callable, Mapping
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from specchat.models.quant.kernels.triton_start import start
from specchat.models.quant.kernels.unpacked import Unpacked

FILL_BLOCK = 1024  # columns of one program
PRODUCT_BLOCK = 512  # columns that a program of the product reads at a time


def fill(weights: Unpacked, out: Tensor) -> bool:
    """Fill `out` with the values of rows, each rounded once.

    Args:
        weights: rows of a matrix.
        out: contiguous output [rows, cols] of any float dtype.

    Returns:
        Whether `out` was filled. The kernel may not compile; a device on which it failed is not tried again.
    """
    rows, cols = out.shape
    grid = rows, triton.cdiv(cols, FILL_BLOCK)
    sizes = cols, *(tensor.shape[1] for tensor in weights.tensors)
    return _launched(_fill_kernel[grid], weights, (out, *sizes), {"block": FILL_BLOCK}, out)


def multiply(weights: Unpacked, x: Tensor, out: Tensor) -> bool:
    """Fill `out` with x W^T.

    Values are rounded to the dtype of x and multiplied in float32. Column c is added to the partial sum c %
    `PRODUCT_BLOCK`, in order of columns; at the end the partial sums are added up.

    Args:
        weights: all rows of W.
        x: contiguous activations [m, cols].
        out: contiguous output [m, rows] in the dtype of x.

    Returns:
        Whether `out` was filled, as in `fill`.
    """
    m, rows = out.shape
    sizes = rows, x.shape[1], *(tensor.shape[1] for tensor in weights.tensors), m
    steps = triton.cdiv(x.shape[1], PRODUCT_BLOCK)
    shape = {"block": PRODUCT_BLOCK, "padded": triton.next_power_of_2(m), "steps": steps}
    return _launched(_product_kernel[rows,], weights, (x, out, *sizes), shape, out)


def _launched(
    run: Callable[..., object],
    weights: Unpacked,
    arguments: tuple[object, ...],
    shape: Mapping[str, int],
    out: Tensor,
) -> bool:
    """Return whether a kernel ran."""
    constants = {"kind": weights.kind, "numbers": weights.numbers, "nbytes": weights.nbytes, **shape}
    call = partial(run, *weights.tensors, weights.book, *arguments, **constants, enable_fp_fusion=False)
    return start("blocks", out, call)


# --- bytes ---------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _byte(blocks: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(blocks + at, mask=inside, other=0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _word(blocks: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Return a little-endian word of two bytes."""
    return _byte(blocks, at, inside) | (_byte(blocks, at + 1, inside) << 8)


@triton.jit  # type: ignore[untyped-decorator]
def _half(blocks: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Return a float16 value as float32."""
    return _word(blocks, at, inside).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _signed(byte: tl.tensor) -> tl.tensor:
    return byte - ((byte & 128) << 1)


@triton.jit  # type: ignore[untyped-decorator]
def _nibble(blocks: tl.tensor, at: tl.tensor, is_high: tl.tensor, inside: tl.tensor) -> tl.tensor:
    byte = _byte(blocks, at, inside)
    return tl.where(is_high, byte >> 4, byte & 15)


# --- types: `at` is the first byte of a value's block, `j` its place in the block ------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _k_scale(
    blocks: tl.tensor, at: tl.tensor, group: tl.tensor, is_minimum: tl.constexpr, inside: tl.tensor
) -> tl.tensor:
    """Return a 6-bit scale or minimum of Q4_K and Q5_K, eight each in 12 bytes."""
    early = group < 4
    own = _byte(blocks, at + 4 + 4 * is_minimum + group % 4, inside)
    third = _byte(blocks, at + 12 + group % 4, inside)
    low = (third >> 4) if is_minimum else (third & 15)
    return tl.where(early, own & 63, low | (own >> 6 << 4))


@triton.jit  # type: ignore[untyped-decorator]
def _of_k(blocks: tl.tensor, at: tl.tensor, j: tl.tensor, kind: tl.constexpr, inside: tl.tensor) -> tl.tensor:
    if kind == "Q6_K":
        half, quarter, rest = j // 128, j % 128 // 32, j % 32
        low = _nibble(blocks, at + half * 64 + quarter % 2 * 32 + rest, quarter >= 2, inside)
        high = _byte(blocks, at + 128 + half * 32 + rest, inside) >> 2 * quarter & 3
        scale = _signed(_byte(blocks, at + 192 + j // 16, inside)).to(tl.float32) * _half(blocks, at + 208, inside)
        return ((low | high << 4) - 32).to(tl.float32) * scale
    group = j // 32
    first = 48 if kind == "Q5_K" else 16
    q = _nibble(blocks, at + first + j // 64 * 32 + j % 32, group % 2 == 1, inside)
    if kind == "Q5_K":
        q |= (_byte(blocks, at + 16 + j % 32, inside) >> group & 1) << 4
    scale = _k_scale(blocks, at, group, False, inside).to(tl.float32) * _half(blocks, at, inside)
    minimum = _k_scale(blocks, at, group, True, inside).to(tl.float32) * _half(blocks, at + 2, inside)
    return q.to(tl.float32) * scale - minimum


@triton.jit  # type: ignore[untyped-decorator]
def _of_iq3(
    blocks: tl.tensor, book: tl.tensor, at: tl.tensor, j: tl.tensor, kind: tl.constexpr, inside: tl.tensor
) -> tl.tensor:
    entry, bit = _byte(blocks, at + 2 + j // 4, inside), j % 8
    if kind == "IQ3_S":
        entry |= (_byte(blocks, at + 66 + j // 32, inside) >> (j // 4 % 8) & 1) << 8
        is_minus = _byte(blocks, at + 74 + j // 8, inside) >> bit & 1
        steps = 1 + 2 * _nibble(blocks, at + 106 + j // 64, j // 32 % 2 == 1, inside)
        scale = _half(blocks, at, inside) * steps.to(tl.float32)
    else:
        low, high = _word(blocks, at + 66 + j // 32 * 4, inside), _word(blocks, at + 68 + j // 32 * 4, inside)
        signs = ((low | high << 16) >> (j // 8 % 4 * 7)) & 127
        odd = signs ^ signs >> 4
        odd ^= odd >> 2
        odd = (odd ^ odd >> 1) & 1
        is_minus = tl.where(bit == 7, odd, signs >> bit & 1)
        scale = _half(blocks, at, inside) * (0.5 + (high >> 12).to(tl.float32)) * 0.5
    value = tl.load(book + entry * 4 + j % 4, mask=inside, other=0)
    return tl.where(is_minus == 1, -value, value) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _of_fp4(
    blocks: tl.tensor, book: tl.tensor, at: tl.tensor, j: tl.tensor, kind: tl.constexpr, inside: tl.tensor
) -> tl.tensor:
    if kind == "NVFP4":
        code = _nibble(blocks, at + 4 + j // 16 * 8 + j % 8, j % 16 >= 8, inside)
        scale = tl.load(book + 16 + _byte(blocks, at + j // 16, inside), mask=inside, other=0)
    else:
        code = _nibble(blocks, at + 1 + j % 16, j >= 16, inside)
        exponent = _byte(blocks, at, inside)
        # 2^(exponent - 128); the two smallest are subnormal.
        bits = tl.where(exponent >= 2, (exponent - 1) << 23, (1 << 21) << (exponent & 1))
        scale = bits.to(tl.float32, bitcast=True)
    return tl.load(book + code, mask=inside, other=0) * scale


@triton.jit  # type: ignore[untyped-decorator]
def _of_nibbles(
    blocks: tl.tensor, book: tl.tensor, at: tl.tensor, j: tl.tensor, kind: tl.constexpr, inside: tl.tensor
) -> tl.tensor:
    if kind == "IQ4_XS":
        group = j // 32
        low = _nibble(blocks, at + 4 + group // 2, group % 2 == 1, inside)
        high = _word(blocks, at + 2, inside) >> 2 * group & 3
        code = _nibble(blocks, at + 8 + group * 16 + j % 16, j % 32 >= 16, inside)
        scale = _half(blocks, at, inside) * ((low | high << 4) - 32).to(tl.float32)
        return tl.load(book + code, mask=inside, other=0) * scale
    code = _nibble(blocks, at + 2 + j % 16, j >= 16, inside)
    if kind == "IQ4_NL":
        return tl.load(book + code, mask=inside, other=0) * _half(blocks, at, inside)
    return (code - 8).to(tl.float32) * _half(blocks, at, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _of_int3(
    codes: tl.tensor,
    signs: tl.tensor,
    ninths: tl.tensor,
    scales: tl.tensor,
    book: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    quad = column // 4
    entry = _byte(codes, quad, inside) | ((_byte(ninths, quad // 8, inside) >> quad % 8 & 1) << 8)
    is_minus = _byte(signs, column // 8, inside) >> column % 8 & 1
    value = tl.load(book + entry * 4 + column % 4, mask=inside, other=0)
    scale = tl.load(book + 2048 + _byte(scales, column // 128, inside), mask=inside, other=0)
    return tl.where(is_minus == 1, -value, value) * scale


@triton.jit  # type: ignore[untyped-decorator]
def unpacked_values(
    codes: tl.tensor,
    signs: tl.tensor,
    ninths: tl.tensor,
    scales: tl.tensor,
    book: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    kind: tl.constexpr,
    numbers: tl.constexpr,
    nbytes: tl.constexpr,
) -> tl.tensor:
    """Return values of a row, float32, given pointers to the row's segments; blocks are `codes`."""
    if kind == "INT3":
        return _of_int3(codes, signs, ninths, scales, book, column, inside)
    at, j = column // numbers * nbytes, column % numbers
    if kind == "Q8_0":
        return _signed(_byte(codes, at + 2 + j, inside)).to(tl.float32) * _half(codes, at, inside)
    if kind == "Q4_K" or kind == "Q5_K" or kind == "Q6_K":  # noqa: PLR1714  # Triton knows no `in`
        return _of_k(codes, at, j, kind, inside)
    if kind == "IQ3_XXS" or kind == "IQ3_S":  # noqa: PLR1714
        return _of_iq3(codes, book, at, j, kind, inside)
    if kind == "MXFP4" or kind == "NVFP4":  # noqa: PLR1714
        return _of_fp4(codes, book, at, j, kind, inside)
    return _of_nibbles(codes, book, at, j, kind, inside)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _fill_kernel(
    codes: tl.tensor,
    signs: tl.tensor,
    ninths: tl.tensor,
    scales: tl.tensor,
    book: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    code_cols: tl.tensor,
    sign_cols: tl.tensor,
    ninth_cols: tl.tensor,
    scale_cols: tl.tensor,
    kind: tl.constexpr,
    numbers: tl.constexpr,
    nbytes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Dequantize a block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < cols
    values = unpacked_values(
        codes + row * code_cols,
        signs + row * sign_cols,
        ninths + row * ninth_cols,
        scales + row * scale_cols,
        book,
        column,
        inside,
        kind,
        numbers,
        nbytes,
    )
    tl.store(out + row * cols + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _product_kernel(
    codes: tl.tensor,
    signs: tl.tensor,
    ninths: tl.tensor,
    scales: tl.tensor,
    book: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    code_cols: tl.tensor,
    sign_cols: tl.tensor,
    ninth_cols: tl.tensor,
    scale_cols: tl.tensor,
    m: tl.tensor,
    kind: tl.constexpr,
    numbers: tl.constexpr,
    nbytes: tl.constexpr,
    block: tl.constexpr,
    padded: tl.constexpr,
    steps: tl.constexpr,
) -> None:
    """Multiply all rows of x with one row of W."""
    row = tl.program_id(0).to(tl.int64)
    given = tl.arange(0, padded)
    sums = tl.zeros([padded, block], dtype=tl.float32)
    for step in range(steps):
        column = step * block + tl.arange(0, block)
        inside = column < cols
        values = unpacked_values(
            codes + row * code_cols,
            signs + row * sign_cols,
            ninths + row * ninth_cols,
            scales + row * scale_cols,
            book,
            column,
            inside,
            kind,
            numbers,
            nbytes,
        )
        rounded = values.to(x.dtype.element_ty).to(tl.float32)
        place = given[:, None].to(tl.int64) * cols + column[None, :]
        mask = (given < m)[:, None] & inside[None, :]
        sums += tl.load(x + place, mask=mask, other=0).to(tl.float32) * rounded[None, :]
    result = tl.sum(sums, 1)
    tl.store(out + given.to(tl.int64) * rows + row, result.to(out.dtype.element_ty), mask=given < m)
