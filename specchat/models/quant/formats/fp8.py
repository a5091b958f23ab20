"""8-bit floats (e4m3) with a scale per matrix, per row, per group of columns or per block."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.quant.formats.affine import num_groups, rounded, row_pieces, scale_groups
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.kernels.tiles import TileForm

_PLACES = 23 - 3  # shift from an e4m3 mantissa to a float32 mantissa
_MASK = ~0x78000000  # clears the copies of the sign bit after the shift
_FACTOR = 2.0 ** (127 - 7)
_CHECKED_ROWS = 1024  # rows searched for NaN at a time


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """W = q * scale, rounded to the dtype of the scale and then cast.

    Segments: `codes`, float8_e4m3fn [rows, cols]; `scales` [rows / block_rows, cols / block_cols], rounded up.

    Attributes:
        block_rows: rows per scale, the last block may be smaller; None for all.
        block_cols: columns per scale, the last block may be smaller; None for all.
        scale_dtype: dtype of the scales, to which the scaled values are rounded.
    """

    name: ClassVar[str] = "fp8"

    block_rows: int | None
    block_cols: int | None
    scale_dtype: torch.dtype

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        blocks = (num_groups(rows, self.block_rows), num_groups(cols, self.block_cols))
        return (Segment("codes", (rows, cols), torch.float8_e4m3fn), Segment("scales", blocks, self.scale_dtype))

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W."""
        for piece in row_pieces(out):
            first, last = begin + piece.start, begin + piece.stop
            numbers = widen(segments["codes"][first:last])
            scale_groups(numbers, self._row_scales(segments["scales"], first, last), self.block_cols)
            out[piece] = rounded(numbers, self.scale_dtype, out.dtype)
        return out

    def tile_form(self, shape: tuple[int, int]) -> TileForm:
        """Return the format as the kernel for many experts reads it."""
        group, rows = self.block_cols or 0, self.block_rows or 0
        return TileForm("fp8", group=group, group_rows=rows, scale_dtype=self.scale_dtype, rounds=True)

    def _row_scales(self, scale: Tensor, begin: int, end: int) -> Tensor:
        """Return the scales of each row: float32 [end - begin, groups of columns]."""
        if self.block_rows is None:
            return scale.float().expand(end - begin, -1)
        blocks = torch.arange(begin, end, device=scale.device) // self.block_rows
        return scale.index_select(0, blocks).float()


def widen(codes: Tensor) -> Tensor:
    """Convert float8_e4m3fn values without NaN to float32.

    Shifting exponent and mantissa into place leaves a factor, the difference of the exponent biases. One multiplication
    corrects it, for subnormals too. torch converts value by value and takes 10 times as long.
    """
    bits = codes.view(torch.int8).to(torch.int32)
    bits.bitwise_left_shift_(_PLACES).bitwise_and_(_MASK)
    return bits.view(torch.float32).mul_(_FACTOR)


def has_nan(codes: Tensor) -> bool:
    """Return whether any of the values, float8_e4m3fn [rows, cols], is NaN, which `widen` cannot convert."""
    chunks = codes.view(torch.uint8).split(_CHECKED_ROWS)
    return any(bool(((bits & 0x7F) == 0x7F).any()) for bits in chunks)
