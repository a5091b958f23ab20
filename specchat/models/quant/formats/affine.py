"""Whole numbers of 4 or 8 bits with a scale, and perhaps a zero point, for every few columns of a row.

W = (q - zero) * scale, rounded to the dtype of the scale and then cast. That is how the libraries compute it that
checkpoints of this kind come from (GPTQ, AWQ, compressed-tensors), so the numbers are theirs, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import PIECE_NUMBERS
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.models.quant.kernels.triton import triton_kernels

# What a stored number of 0 .. 15 stands for without a zero point: 8 less. Bytes are signed and stand for themselves.
MIDDLE = 8


@dataclass(frozen=True)
class Affine(WeightFormat):
    """Grouped whole numbers.

    Segments: `codes`, uint8 [rows, cols / 2] (two columns a byte, the first in the low half) or int8 [rows, cols];
    `scales` [rows, groups]; `zeros`, int8 [rows, groups], where there are zero points; `order`, int32 [cols], where the
    columns are stored in another order: which column of W each stored one is.

    Attributes:
        bits: 4 or 8.
        group: stored columns per scale, the last group may be smaller; None: one scale for a whole row.
        scale_dtype: of the scales, to which the products are rounded.
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
        """See the class."""
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
        """Rows of W, its columns in their own order."""
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
        """q - zero as float32 [rows, cols], in the order of stored columns."""
        codes = segments["codes"][rows]
        zeros = segments["zeros"][rows] if self.zeros else None
        if self.bits == 8:
            numbers = codes.float()  # differences of two bytes need nine bits
            return numbers if zeros is None else _subtract(numbers, zeros.float(), self.group)
        q = unpack_nibbles(codes, cols)
        return (q.sub_(MIDDLE) if zeros is None else _subtract(q, zeros, self.group)).float()

    def linear(
        self, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """As the protocol has it; it is x that is brought into the order of stored columns, which is far smaller."""
        if not self.reordered:
            return super().linear(x, segments, shape, scratch, bias)
        return _in_order(replace(self, reordered=False).linear, x, segments, shape, scratch, bias)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """As the protocol has it, and by Triton."""
        if self.reordered:
            in_order = replace(self, reordered=False).kernels(shape, num_rows, dtype, device)
            return {name: partial(_in_order, way) for name, way in in_order.items()}
        ways = super().kernels(shape, num_rows, dtype, device)
        return ways | triton_kernels(self.dequantize, self.bits, self.group, rounds=True, device=device)


def _in_order(
    linear: Linear, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None
) -> Tensor:
    """`linear` of columns in the order of the stored ones."""
    return linear(x.index_select(-1, segments["order"]), segments, shape, scratch, bias)


def num_groups(cols: int, group: int | None) -> int:
    """Scales per row."""
    return 1 if group is None else -(-cols // group)


def by_group(matrix: Tensor, per_group: Tensor, group: int | None) -> list[tuple[Tensor, Tensor]]:
    """Views of a matrix that take part in one broadcast operation each: whole groups, and the last if it is smaller.

    Args:
        matrix: [rows, cols], contiguous.
        per_group: [rows, groups].
        group: columns per group; None for all.

    Returns:
        Pairs of [rows, g, columns per group] and [rows, g, 1].
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
    """Multiplies a matrix [rows, cols], in place, by scales [rows, groups] of its dtype."""
    for part, per_group in by_group(matrix, scale, group):
        part.mul_(per_group)


def _subtract(matrix: Tensor, zeros: Tensor, group: int | None) -> Tensor:
    """`matrix` [rows, cols], less zero points [rows, groups] of its dtype, in place."""
    for part, per_group in by_group(matrix, zeros, group):
        part.sub_(per_group)
    return matrix


def rounded(numbers: Tensor, dtype: torch.dtype, wanted: torch.dtype) -> Tensor:
    """float32 products, in place, as arithmetic in `dtype` would have given them, about to be cast to `wanted`.

    Products of a few bits by a scale are exact in float32, so rounding them once is what `dtype` would do. The casts
    go by way of float32, since torch has no fast ones between float16 and integers or bfloat16 on a CPU.
    """
    return numbers if dtype in {torch.float32, wanted} else numbers.copy_(numbers.to(dtype))


def row_pieces(out: Tensor) -> Iterator[slice]:
    """Rows of a matrix that are dequantized at a time."""
    rows, cols = out.shape
    step = max(PIECE_NUMBERS[out.device.type] // cols, 1)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def unpack_nibbles(packed: Tensor, cols: int) -> Tensor:
    """int8 [rows, cols] of uint8 [rows, cols / 2], the low half of a byte first; new memory."""
    pairs = packed.to(torch.int16)
    spread = pairs.mul(16).bitwise_or_(pairs).bitwise_and_(0x0F0F)  # one byte each; little-endian
    numbers = spread.view(torch.int8)
    return numbers if numbers.shape[1] == cols else numbers[:, :cols].contiguous()


def pack_nibbles(numbers: Tensor, out: Tensor) -> None:
    """The reverse: uint8 [rows, cols] of 0 .. 15 into uint8 [rows, cols / 2]; an odd last column is paired with 0."""
    cols = numbers.shape[1]
    out.copy_(numbers[:, 0::2])
    out[:, : cols // 2].bitwise_or_(numbers[:, 1::2] << 4)
