"""Matmul by specchat's Triton kernels for the formats that they support, and by torch where they fail."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specchat.compiler import can_build_modules
from specchat.models.quant.kernels.chunked import Dequantize, Linear, Segments, matmul_in_chunks
from specchat.models.quant.kernels.unpacked import Order, Unpack

CAPABILITY = (8, 0)  # the lowest compute capability that Triton supports
_FUSED_ROWS = 16  # more partial sums do not fit into the registers
# Rows of x up to which integers are multiplied as they are stored. Then each of four programs scales the same codes.
PRODUCT_ROWS = 64
# Columns of W that a program of this product multiplies at a time, all with one scale.
_PRODUCT_COLS = (128, 64, 32)


def triton_kernels(
    eager: Dequantize,
    bits: int,
    group: int | None,
    *,
    rounds: bool,
    shape: tuple[int, int],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Linear]:
    """Return the Triton kernels for a format with `codes`, `scales` and perhaps `zeros`, by name; empty without Triton.

    The fused kernel multiplies by the same values as the other one and sums in another order, which can tip a near-tie
    between one row and many. So float32 does not use it.

    Args:
        eager: fallback with the same values, in case a kernel does not compile.
        bits: bits of a code, as in `triton_affine.fill`.
        group: columns per scale, as in `triton_affine.fill`.
        rounds: whether to round to the dtype of the scales, as in `triton_affine.fill`.
        shape: (rows, cols) of W.
        num_rows: maximum rows of x.
        dtype: dtype of x.
        device: device of the matmul.
    """
    if device.type != "cuda" or _kernels() is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return {}
    ways: dict[str, Linear] = {
        "triton": partial(matmul_in_chunks, partial(dequantize_by_triton, eager, bits, group, rounds)),
    }
    width = _product_cols(shape[1], group)
    if dtype != torch.float32 and num_rows <= PRODUCT_ROWS and width is not None:
        ways["fused"] = partial(multiply_by_triton, eager, bits, group, rounds, width)
    return ways


def _product_cols(cols: int, group: int | None) -> int | None:
    """Return the columns that the fused kernel multiplies at a time; None where groups are too small for it."""
    if group is None or group >= cols:
        return _PRODUCT_COLS[0]
    return next((size for size in _PRODUCT_COLS if group % size == 0), None)


def multiply_by_triton(
    eager: Dequantize,
    bits: int,
    group: int | None,
    rounds: bool,
    width: int,
    x: Tensor,
    segments: Segments,
    shape: tuple[int, int],
    scratch: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute `WeightFormat.linear`; the first arguments are those of `triton_kernels` and `_product_cols`."""
    rows, cols = shape
    given = x.reshape(-1, cols).contiguous()
    y = x.new_empty(len(given), rows)
    codes, scales, zeros = segments["codes"], segments["scales"], segments.get("zeros")
    if not _product_kernel().multiply(given, codes, scales, zeros, bits, group, rounds, width, y):
        return matmul_in_chunks(eager, x, segments, shape, scratch, bias)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], rows)


def dequantize_by_triton(
    eager: Dequantize,
    bits: int,
    group: int | None,
    rounds: bool,
    segments: Segments,
    begin: int,
    end: int,
    out: Tensor,
) -> Tensor:
    """Dequantize rows as `WeightFormat.dequantize`; the first arguments are those of `triton_kernels`."""
    rows, zeros = slice(begin, end), segments.get("zeros")
    filled = _kernels().fill(
        segments["codes"][rows],
        segments["scales"][rows],
        None if zeros is None else zeros[rows],
        bits,
        group,
        rounds,
        out,
    )
    return out if filled else eager(segments, begin, end, out)


def unpacking_kernels(
    eager: Dequantize, unpack: Unpack, order: Order, num_rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Linear]:
    """Return the Triton kernels for a format, by name; empty without Triton.

    The fused kernel multiplies by the same values as the other one and sums in another order, which can tip a near-tie
    between one row and many. So float32 does not use it.

    Args:
        eager: fallback with the same values, in case a kernel does not compile.
        unpack: function that returns rows for the kernels.
        order: function that returns the order of the rows.
        num_rows: maximum rows of x.
        dtype: dtype of x.
        device: device of the matmul.
    """
    if device.type != "cuda" or _block_kernels() is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return {}
    ways: dict[str, Linear] = {
        "triton": partial(matmul_in_chunks, partial(dequantize_unpacked, eager, unpack, order)),
    }
    if dtype != torch.float32 and num_rows <= _FUSED_ROWS:
        ways["fused"] = partial(multiply_unpacked, eager, unpack, order)
    return ways


def dequantize_unpacked(
    eager: Dequantize, unpack: Unpack, order: Order, segments: Segments, begin: int, end: int, out: Tensor
) -> Tensor:
    """Dequantize rows as `WeightFormat.dequantize`; the first arguments are those of `unpacking_kernels`."""
    stored = order(segments)
    if stored is None:
        filled = _block_kernels().fill(unpack(segments, begin, end), out)
    else:
        gathered = {name: segment.index_select(0, stored[begin:end]) for name, segment in segments.items()}
        filled = _block_kernels().fill(unpack(gathered, 0, end - begin), out)
    return out if filled else eager(segments, begin, end, out)


def multiply_unpacked(
    eager: Dequantize,
    unpack: Unpack,
    order: Order,
    x: Tensor,
    segments: Segments,
    shape: tuple[int, int],
    scratch: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute `WeightFormat.linear`; the first arguments are those of `unpacking_kernels`."""
    rows, cols = shape
    given = x.reshape(-1, cols).contiguous()
    y = x.new_empty(len(given), rows)
    if not _block_kernels().multiply(unpack(segments, 0, rows), given, y):
        return matmul_in_chunks(eager, x, segments, shape, scratch, bias)
    stored = order(segments)
    if stored is not None:
        y = y.index_select(1, stored)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], rows)


@cache
def _kernels() -> Any:
    """Import the module with the kernel; None where Triton cannot be used. The import is slow."""
    if not can_build_modules():
        return None
    try:
        from specchat.models.quant.kernels import triton_affine
    except ImportError:
        return None
    return triton_affine


@cache
def _block_kernels() -> Any:
    """Import the module with the kernels of blocks and int3; None where Triton cannot be used."""
    if not can_build_modules():
        return None
    try:
        from specchat.models.quant.kernels import triton_blocks
    except ImportError:
        return None
    return triton_blocks


@cache
def _product_kernel() -> Any:
    """Import the module with the fused kernel of scaled integers; only where `_kernels` found Triton."""
    from specchat.models.quant.kernels import triton_product

    return triton_product
