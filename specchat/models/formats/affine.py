"""Whole numbers of 4 or 8 bits with a scale, and perhaps a zero point, for every few columns of a row.

W = (q - zero) * scale, computed in the dtype of the scale and then cast. That is how the libraries compute it that
checkpoints of this kind come from (GPTQ, AWQ, compressed-tensors), so the numbers are theirs, bit for bit.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.formats.protocol import Segment, Segments, WeightFormat

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
        scale_dtype: of the scales, and of the arithmetic.
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
        scale = segments["scales"][begin:end]
        in_place = out.dtype == self.scale_dtype and not self.reordered
        work = out if in_place else torch.empty_like(out, dtype=self.scale_dtype)
        zero = segments["zeros"][begin:end] if self.zeros else None
        q = segments["codes"][begin:end]
        if self.bits == 4:
            q = unpack_nibbles(q, out.shape[1])
            _subtract_from(q, zero, self.group)
            work.copy_(q)
        else:
            work.copy_(q)
            if zero is not None:  # differences of two bytes need nine bits: exact in every dtype of scales
                for part, per_group in by_group(work, zero.to(self.scale_dtype), self.group):
                    part.sub_(per_group)
        scale_groups(work, scale, self.group)
        if in_place:
            return out
        return out.index_copy_(1, segments["order"].long(), work.to(out.dtype)) if self.reordered else out.copy_(work)

    def linear(
        self, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """As the protocol has it; it is x that is brought into the order of stored columns, which is far smaller."""
        if not self.reordered:
            return super().linear(x, segments, shape, scratch, bias)
        in_order = replace(self, reordered=False)
        return in_order.linear(x.index_select(-1, segments["order"]), segments, shape, scratch, bias)


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


def _subtract_from(q: Tensor, zero: Tensor | None, group: int | None) -> None:
    """Makes numbers of 0 .. 15 signed, in place."""
    if zero is None:
        q.sub_(MIDDLE)
        return
    for part, per_group in by_group(q, zero, group):
        part.sub_(per_group)


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
