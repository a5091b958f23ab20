"""Products of rows with the matrices of their experts, all in one kernel on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from specchat.compiler import can_build_modules
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.triton import CAPABILITY


@dataclass(frozen=True)
class Grouping:
    """Pairs of a row and one of its experts, grouped by expert.

    Attributes:
        order: pairs, int64 [pairs]; pair p is the expert p % k of row p // k.
        starts: place in `order` of each expert's first pair, and after the last one's, int64 [experts + 1].
    """

    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, ids: Tensor, num_experts: int) -> Grouping:
        """Group pairs by expert; the host waits for nothing.

        Args:
            ids: expert of each pair, int64 [pairs]; `num_experts` stands for none.
            num_experts: number of experts.
        """
        ordered, order = ids.sort(stable=True)
        experts = torch.arange(num_experts + 1, device=ids.device)
        return cls(order, torch.searchsorted(ordered, experts))


def has_grouped(device: torch.device) -> bool:
    """Return whether a device has the kernel."""
    is_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY
    return is_gpu and _kernels() is not None


def multiply_grouped(
    x: Tensor,
    grouping: Grouping,
    addresses: Tensor,
    form: TileForm,
    shape: tuple[int, int],
    out: Tensor,
    *,
    first: int,
    per_row: int,
) -> bool:
    """Fill columns of `out` with x W^T, for each pair with the W of its expert; pairs without an expert stay.

    Args:
        x: activations [rows, cols], contiguous; pair p has row p // per_row.
        grouping: pairs of row and expert.
        addresses: addresses on the GPU of each segment of each expert's matrix, int64 [segments, experts].
        form: format of the matrices.
        shape: (rows, cols) of a matrix.
        out: products [pairs, width] in the dtype of x, contiguous.
        first: first column of `out` to fill.
        per_row: pairs of a row of x.

    Returns:
        Whether `out` was filled; the kernel may not compile.
    """
    filled: bool = _kernels().multiply(
        x, grouping.order, grouping.starts, addresses, _values(form.values, x.device), out, shape, first, per_row, form
    )
    return filled


@cache
def _values(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values or (0.0,), dtype=torch.float32, device=device)


@cache
def _kernels() -> Any:
    """Import the module with the kernel; None where Triton cannot be used. The import is slow."""
    if not can_build_modules():
        return None
    try:
        from specchat.models.quant.kernels import triton_experts
    except ImportError:
        return None
    return triton_experts
