"""Affine integers of 4 or 8 bits with a scale, and optionally a zero point, per group of columns of a row.

W = (q - zero) * scale, rounded to the dtype of the scale and then cast. The libraries that write such checkpoints
(GPTQ, AWQ, compressed-tensors) compute it this way, so the values equal theirs bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import PIECE_NUMBERS
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Multiply, Segments
from specchat.models.quant.kernels.matmul import product
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.triton import triton_kernels

# Zero point of 4-bit numbers (0 .. 15) if none is stored. 8-bit numbers are signed and need none.
MIDDLE = 8


@dataclass(frozen=True)
class Affine(WeightFormat):
    """Integers with a scale per group of columns.

    Segments: `codes`, uint8 [rows, cols / 2] (two columns a byte, the first in the low half) or int8 [rows, cols];
    `scales` [rows, groups]; `zeros`, int8 [rows, groups], if there are zero points; `order`, int32 [cols], if columns
    are
    reordered: the column of W that each stored column holds.

    Attributes:
        bits: 4 or 8.
        group: stored columns per scale, the last group may be smaller; None for one scale per row.
        scale_dtype: dtype of the scales, to which the scaled values are rounded.
        zeros: whether there are zero points; else W = (q - 8) * scale (4 bits) or q * scale (8 bits).
        reordered: whether the columns are stored in another order (GPTQ's act-order).
    """

    name: ClassVar[str] = "affine"

    bits: int
    group: int | None
    scale_dtype: torch.dtype
    zeros: bool = False
    reordered: bool = False

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        groups = num_groups(cols, self.group)
        packed = (
            ("codes", (rows, -(-cols // 2)), torch.uint8) if self.bits == 4 else ("codes", (rows, cols), torch.int8)
        )
        segments = [Segment(*packed), Segment("scales", (rows, groups), self.scale_dtype)]
        if self.zeros:
            segments.append(Segment("zeros", (rows, groups), torch.int8))
        if self.reordered:
            segments.append(Segment("order", (cols,), torch.int32))
        return tuple(segments)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W, with its columns in original order."""
        for piece in row_pieces(out):
            rows = slice(begin + piece.start, begin + piece.stop)
            numbers = self._steps(segments, rows, out.shape[1])
            scale_groups(numbers, segments["scales"][rows].float(), self.group)
            numbers = rounded(numbers, self.scale_dtype, out.dtype)
            if self.reordered:
                out[piece].index_copy_(1, segments["order"].long(), numbers.to(out.dtype))
            else:
                out[piece] = numbers
        return out

    def _steps(self, segments: Segments, rows: slice, cols: int) -> Tensor:
        """Return q - zero as float32 [rows, cols], in stored column order."""
        codes = segments["codes"][rows]
        zeros = segments["zeros"][rows] if self.zeros else None
        if self.bits == 8:
            numbers = codes.float()  # differences of two bytes need nine bits
            return numbers if zeros is None else _subtract(numbers, zeros.float(), self.group)
        q = unpack_nibbles(codes, cols)
        return (q.sub_(MIDDLE) if zeros is None else _subtract(q, zeros, self.group)).float()

    def linear(
        self,
        x: Tensor,
        segments: Segments,
        shape: tuple[int, int],
        scratch: Tensor,
        bias: Tensor | None = None,
        *,
        multiply: Multiply = product,
    ) -> Tensor:
        """Compute as `WeightFormat.linear`; reorder x instead of W, which is far larger."""
        if not self.reordered:
            return super().linear(x, segments, shape, scratch, bias, multiply=multiply)
        in_order = partial(replace(self, reordered=False).linear, multiply=multiply)
        return _in_order(in_order, x, segments, shape, scratch, bias)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """Return the kernels of `WeightFormat.kernels` and the Triton kernels."""
        if self.reordered:
            in_order = replace(self, reordered=False).kernels(shape, num_rows, dtype, device)
            return {name: partial(_in_order, way) for name, way in in_order.items()}
        bits, group = self.bits, self.group
        own = triton_kernels(
            self.dequantize, bits, group, rounds=True, shape=shape, num_rows=num_rows, dtype=dtype, device=device
        )
        return super().kernels(shape, num_rows, dtype, device) | own

    def tile_form(self, shape: tuple[int, int]) -> TileForm | None:
        """Return the format as the kernel for many experts reads it; None if columns are reordered."""
        if self.reordered:
            return None
        middle = MIDDLE if self.bits == 4 and not self.zeros else 0
        return TileForm("affine", self.bits, self.group or 0, 1, middle, self.zeros, self.scale_dtype, rounds=True)


def _in_order(
    linear: Linear, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None
) -> Tensor:
    """Call `linear` with x in stored column order."""
    return linear(x.index_select(-1, segments["order"]), segments, shape, scratch, bias)


def num_groups(cols: int, group: int | None) -> int:
    """Return the number of scales per row."""
    return 1 if group is None else -(-cols // group)


def by_group(matrix: Tensor, per_group: Tensor, group: int | None) -> list[tuple[Tensor, Tensor]]:
    """Split a matrix into views for one broadcast operation each: the whole groups, and a smaller last group.

    Args:
        matrix: contiguous matrix [rows, cols].
        per_group: values per group [rows, groups].
        group: columns per group; None for all.

    Returns:
        Pairs of views [rows, g, columns per group] and [rows, g, 1].
    """
    cols = matrix.shape[1]
    size = cols if group is None else min(group, cols)
    whole = cols // size
    parts = []
    if whole:
        view = matrix[:, : whole * size].unflatten(1, (whole, size))
        parts.append((view, per_group[:, :whole].unsqueeze(2)))
    if whole * size < cols:
        parts.append((matrix[:, whole * size :].unsqueeze(1), per_group[:, whole:].unsqueeze(2)))
    return parts


def scale_groups(matrix: Tensor, scale: Tensor, group: int | None) -> None:
    """Multiply a matrix [rows, cols] in place by scales [rows, groups] of its dtype."""
    for part, per_group in by_group(matrix, scale, group):
        part.mul_(per_group)


def _subtract(matrix: Tensor, zeros: Tensor, group: int | None) -> Tensor:
    """Subtract zero points [rows, groups] from a matrix [rows, cols] of their dtype, in place."""
    for part, per_group in by_group(matrix, zeros, group):
        part.sub_(per_group)
    return matrix


def rounded(numbers: Tensor, dtype: torch.dtype, wanted: torch.dtype) -> Tensor:
    """Round float32 values in place to `dtype`, before a cast to `wanted`.

    A few bits times a scale is exact in float32, so one rounding equals arithmetic in `dtype`. Casts go through
    float32: torch has no fast casts between float16 and integers or bfloat16 on a CPU.
    """
    return numbers if dtype in {torch.float32, wanted} else numbers.copy_(numbers.to(dtype))


def row_pieces(out: Tensor) -> Iterator[slice]:
    """Yield ranges of rows that are dequantized at a time."""
    rows, cols = out.shape
    step = max(PIECE_NUMBERS[out.device.type] // cols, 1)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def unpack_nibbles(packed: Tensor, cols: int) -> Tensor:
    """Unpack uint8 [rows, cols / 2], low half first, into new memory: int8 [rows, cols]."""
    pairs = packed.to(torch.int16)
    spread = pairs.mul(16).bitwise_or_(pairs).bitwise_and_(0x0F0F)  # one byte each; little-endian
    numbers = spread.view(torch.int8)
    return numbers if numbers.shape[1] == cols else numbers[:, :cols].contiguous()


def pack_nibbles(numbers: Tensor, out: Tensor) -> None:
    """Pack uint8 [rows, cols] of values 0 .. 15 into uint8 [rows, cols / 2]; an odd last column is paired with 0."""
    cols = numbers.shape[1]
    out.copy_(numbers[:, 0::2])
    out[:, : cols // 2].bitwise_or_(numbers[:, 1::2] << 4)
