"""Matrices that stay numbers beside others, of the same fused experts, that are quantized."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Segments


@dataclass(frozen=True)
class Plain(WeightFormat):
    """Numbers as they are.

    Segments: `weight` [rows, cols].

    Attributes:
        dtype: of the numbers.
    """

    name: ClassVar[str] = "plain"

    dtype: torch.dtype

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """See the class."""
        return (Segment("weight", (rows, cols), self.dtype),)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Rows, cast; in their own memory if they need not be."""
        rows = segments["weight"][begin:end]
        return rows if rows.dtype == out.dtype else out.copy_(rows)
