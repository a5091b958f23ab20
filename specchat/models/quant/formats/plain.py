"""Unquantized matrices next to quantized ones in the same fused experts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.kernels.tiles import TileForm


@dataclass(frozen=True)
class Plain(WeightFormat):
    """Unquantized weights.

    Segments: `weight` [rows, cols].

    Attributes:
        dtype: dtype of the weights.
    """

    name: ClassVar[str] = "plain"

    dtype: torch.dtype

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segment that the class describes."""
        return (Segment("weight", (rows, cols), self.dtype),)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Return rows cast to the dtype of `out`; a view if no cast is needed."""
        rows = segments["weight"][begin:end]
        return rows if rows.dtype == out.dtype else out.copy_(rows)

    def tile_form(self, shape: tuple[int, int]) -> TileForm:
        """Return the format as the kernel for many experts reads it."""
        return TileForm("plain", scale_dtype=self.dtype)
