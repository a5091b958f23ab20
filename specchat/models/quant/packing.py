"""Choice of a stored or a packed matrix, measured once per installation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specchat.models.quant.autotune import autotuner
from specchat.models.quant.kernels.matmul import has_own_row_kernel, product, product_of_one_row
from specchat.models.quant.kernels.packed import PackedMatrix, can_pack, pack

_CPU = torch.device("cpu")
_MEASURED_ROWS = (1, 1, 1, 1, 4, 4, 16)  # plain decoding counts most, then small trees; the memory bounds both
_PACKED = "packed"


def pack_if_faster(weight: Tensor) -> PackedMatrix | None:
    """Return the packed matrix; None if it cannot be packed, or if few rows are computed faster with the stored one.

    Args:
        weight: matrix [rows, cols] in host memory.
    """
    rows, cols = weight.shape
    if not can_pack((rows, cols), weight.dtype) or (packed := pack(weight)) is None:
        return None
    inputs = [torch.ones(num_rows, cols, dtype=weight.dtype) for num_rows in _MEASURED_ROWS]

    def each(multiply: Callable[[Tensor], Tensor]) -> None:
        for x in inputs:
            multiply(x)

    calls = {_PACKED: partial(each, packed.linear), "stored": partial(each, lambda x: product(x, weight))}
    if has_own_row_kernel(weight):
        of_rows = {True: product_of_one_row, False: product}
        calls["stored, one row by torch"] = partial(each, lambda x: of_rows[len(x) == 1](x, weight))
    fastest = autotuner().fastest(f"packing {rows}x{cols} {weight.dtype}", calls, _CPU)
    return packed if fastest == _PACKED else None
