"""Floating point numbers of 8 bits (e4m3) with a scale per matrix, per row, per group of columns or per block."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.formats.affine import num_groups, scale_groups
from specchat.models.formats.checks import fail_contents
from specchat.models.formats.protocol import Segment, Segments, WeightFormat

# e4m3 numbers as bits of a wider dtype, exponent and mantissa moved up against its own: smaller by a power of two that
# follows from the two exponents' biases, which multiplication makes good exactly (subnormal numbers included). torch
# converts number by number and takes six times as long.
_WIDER: dict[torch.dtype, tuple[torch.dtype, int, int, float]] = {
    # integers of that width, places to move, mask of the bits that stay after the sign was extended, factor
    torch.bfloat16: (torch.int16, 4, 0x87F0, 2.0**120),
    torch.float16: (torch.int16, 7, 0xBF80, 2.0**8),
    torch.float32: (torch.int32, 20, 0x87F00000, 2.0**120),
}

_CHECKED_ROWS = 1024  # at a time


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """W = q * scale, computed in the dtype of the scale and then cast.

    Segments: `codes`, float8_e4m3fn [rows, cols]; `scales` [rows / block_rows, cols / block_cols], rounded up.

    Attributes:
        block_rows: rows per scale, the last block may be smaller; None for all.
        block_cols: columns per scale, likewise.
        scale_dtype: of the scales, and of the arithmetic.
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
        work = out if out.dtype == self.scale_dtype else torch.empty_like(out, dtype=self.scale_dtype)
        widen(segments["codes"][begin:end], work)
        scale_groups(work, self._row_scales(segments["scales"], begin, end), self.block_cols)
        return out if work is out else out.copy_(work)

    def _row_scales(self, scale: Tensor, begin: int, end: int) -> Tensor:
        """The scales of each row: [end - begin, groups of columns]."""
        if self.block_rows is None:
            return scale.expand(end - begin, -1)
        blocks = torch.arange(begin, end, device=scale.device) // self.block_rows
        return scale.index_select(0, blocks)


def widen(q: Tensor, out: Tensor) -> None:
    """Writes float8_e4m3fn numbers [rows, cols], none of them NaN, into `out` of a wider dtype."""
    integer, places, mask, factor = _WIDER[out.dtype]
    bits = q.view(torch.int8).to(integer)
    bits.bitwise_left_shift_(places).bitwise_and_(mask - (1 << 8 * integer.itemsize))
    torch.mul(bits.view(out.dtype), factor, out=out)


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
