"""Matrices in the order that oneDNN's kernels read, for layers that stay in memory.

torch gives oneDNN a matrix as it is stored, and oneDNN reorders parts of it in every call. A matrix that is packed once
is read at the speed of the memory, and packing does not change its numbers. GB/s of a 7168 x 2048 matrix on one core of
an AMD EPYC (Zen 5) at 1, 8 and 16 rows: bfloat16 18, 16 and 13 as stored and 37, 26 and 19 packed; float32 25, 17 and
13 as stored and 38, 25 and 19 packed.

oneDNN computes a single row by another kernel, which sums in another order. Packed matrices compute fewer than four
rows as four, so the bits of a row do not depend on the number of rows beside it. Two rows would do, but one core of a
Zen 4 takes 2.0 ms for 2 rows and 1.4 for 4 (bfloat16, the matrix above); a Zen 5 reads 36 and 33 GB/s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specchat.models.quant.kernels.matmul import MIN_NUMBERS, padded, padded_count

# Packed matrices of these dimensions take the bytes of plain ones; oneDNN pads others.
_BLOCK = 64
_ROWS_HINT = 8  # with a hint of one row, oneDNN keeps float32 matrices as they are
_LEAST_ROWS = 4
_DTYPES = (torch.bfloat16, torch.float32)
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_nbytes")


class PackedMatrix:
    """A matrix W [rows, cols] in oneDNN's order.

    Args:
        packed: result of torch's private operator that reorders a matrix.
        shape: (rows, cols) of the matrix.

    Attributes:
        nbytes: bytes of the packed matrix.
    """

    def __init__(self, packed: Tensor, shape: tuple[int, int]) -> None:
        self._packed = packed
        self._rows, self._cols = shape
        self.nbytes = int(_operators()._nbytes(packed))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x W^T + bias: [..., cols] -> [..., rows], in the dtype of the matrix."""
        rows = x.reshape(-1, self._cols)
        num_rows = rows.shape[0]
        rows = padded(rows, max(padded_count(num_rows), _LEAST_ROWS))
        out: Tensor = _operators()._linear_pointwise(rows, self._packed, bias, "none", [], "")
        return out[:num_rows].view(*x.shape[:-1], self._rows)


def can_pack(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Return whether `pack` accepts matrices of a shape (rows, cols) and a dtype, with this installation of torch."""
    fits = dtype in _DTYPES and all(size % _BLOCK == 0 for size in shape) and shape[0] * shape[1] >= MIN_NUMBERS
    return fits and torch.backends.mkldnn.is_available() and all(hasattr(_operators(), name) for name in _OPERATORS)


def pack(weight: Tensor) -> PackedMatrix | None:
    """Return a packed copy of a matrix [rows, cols]; None if oneDNN refuses, or would take more memory.

    Args:
        weight: matrix in host memory that `can_pack` accepts.
    """
    rows, cols = weight.shape
    try:
        packed = PackedMatrix(_operators()._reorder_linear_weight(weight.detach(), _ROWS_HINT), (rows, cols))
    except RuntimeError:  # processors without kernels for the dtype
        return None
    return packed if packed.nbytes <= weight.nbytes else None


def _operators() -> Any:
    """Return torch's private operators of oneDNN, which torch's own compiler uses for frozen weights."""
    return torch.ops.mkldnn
