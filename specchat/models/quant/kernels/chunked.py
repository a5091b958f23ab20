"""Matmul with a matrix that is dequantized a few rows at a time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import dequantized_rows
from specchat.models.quant.kernels.matmul import product

Segments = Mapping[str, Tensor]


# The signatures of `WeightFormat.dequantize` and `WeightFormat.linear`.
Dequantize = Callable[[Segments, int, int, Tensor], Tensor]


# The signature of `matmul.product`.
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


Linear = Callable[[Tensor, Segments, tuple[int, int], Tensor, Tensor | None], Tensor]


def matmul_in_chunks(
    dequantize: Dequantize,
    x: Tensor,
    segments: Segments,
    shape: tuple[int, int],
    scratch: Tensor,
    bias: Tensor | None = None,
    *,
    multiply: Multiply = product,
) -> Tensor:
    """Compute `WeightFormat.linear` with rows of W from `dequantize`."""
    rows, cols = shape
    step = chunk_rows(rows, cols, x.dtype, x.device)
    y = x.new_empty(*x.shape[:-1], rows) if step < rows else None
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        weight = dequantize(segments, begin, end, view_scratch(scratch, end - begin, cols, x.dtype))
        part = multiply(x, weight, None if bias is None else bias[begin:end])
        if y is None:
            return part.contiguous()  # callers take views of the result
        y[..., begin:end] = part
    assert y is not None
    return y


def chunk_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the rows of a matrix that are dequantized at a time."""
    return dequantized_rows(rows, cols, dtype.itemsize, device.type)


def scratch_bytes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of scratch memory that `linear` needs for a matrix (rows, cols)."""
    return chunk_rows(*shape, dtype, device) * shape[1] * dtype.itemsize


def view_scratch(scratch: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """View the start of uint8 memory as a matrix [rows, cols]."""
    return scratch[: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)
