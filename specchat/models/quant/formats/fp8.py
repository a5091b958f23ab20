"""Floating point numbers of 8 bits (e4m3) with a scale per matrix, per row, per group of columns or per block."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.quant.formats.affine import num_groups, rounded, row_pieces, scale_groups
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import fail_contents

_PLACES = 23 - 3  # from the mantissa of an e4m3 number to that of a float32
_MASK = ~0x78000000  # the bits that are the sign's copies after that
_FACTOR = 2.0 ** (127 - 7)
_CHECKED_ROWS = 1024  # at a time


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """W = q * scale, rounded to the dtype of the scale and then cast.

    Segments: `codes`, float8_e4m3fn [rows, cols]; `scales` [rows / block_rows, cols / block_cols], rounded up.

    Attributes:
        block_rows: rows per scale, the last block may be smaller; None for all.
        block_cols: columns per scale, likewise.
        scale_dtype: of the scales, to which the products are rounded.
    """

    name: ClassVar[str] = "fp8"

    block_rows: int | None
    block_cols: int | None
    scale_dtype: torch.dtype

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """See the class."""
        blocks = (num_groups(rows, self.block_rows), num_groups(cols, self.block_cols))
        return (Segment("codes", (rows, cols), torch.float8_e4m3fn), Segment("scales", blocks, self.scale_dtype))

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Rows of W."""
        for piece in row_pieces(out):
            first, last = begin + piece.start, begin + piece.stop
            numbers = widen(segments["codes"][first:last])
            scale_groups(numbers, self._row_scales(segments["scales"], first, last), self.block_cols)
            out[piece] = rounded(numbers, self.scale_dtype, out.dtype)
        return out

    def _row_scales(self, scale: Tensor, begin: int, end: int) -> Tensor:
        """The scales of each row: float32 [end - begin, groups of columns]."""
        if self.block_rows is None:
            return scale.float().expand(end - begin, -1)
        blocks = torch.arange(begin, end, device=scale.device) // self.block_rows
        return scale.index_select(0, blocks).float()


def widen(codes: Tensor) -> Tensor:
    """float32 of float8_e4m3fn numbers, none of them NaN.

    Their exponent and mantissa are moved to where a float32 has them. That is smaller than they are by the difference
    of the two exponents' biases, for subnormal numbers too, which multiplying makes good. torch's own conversion goes
    number by number and takes ten times as long.
    """
    bits = codes.view(torch.int8).to(torch.int32)
    bits.bitwise_left_shift_(_PLACES).bitwise_and_(_MASK)
    return bits.view(torch.float32).mul_(_FACTOR)


def check_numbers(module: str, codes: Tensor) -> None:
    """Makes sure that no number is NaN: none ever is, and `widen` does not know them.

    Args:
        module: whose `weight` it is, for the message.
        codes: float8_e4m3fn [rows, cols].

    Raises:
        CorruptCheckpointError: one is.
    """
    bits = codes.view(torch.uint8)
    for begin in range(0, len(bits), _CHECKED_ROWS):
        if bool(((bits[begin : begin + _CHECKED_ROWS] & 0x7F) == 0x7F).any()):
            fail_contents(module, "weight", "has numbers that are NaN")
