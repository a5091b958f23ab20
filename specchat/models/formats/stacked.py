"""Matrices that were quantized apart and are one in the model: the gate and up projections of an expert, say."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from specchat.models.formats.protocol import Segment, Segments, WeightFormat


@dataclass(frozen=True)
class Stacked(WeightFormat):
    """Matrices of equal shape, one above the other.

    Segments: the inner format's, each with a leading dimension `count`.

    Attributes:
        inner: how each of them is stored.
        count: how many there are.
        rows: of each.
    """

    name: ClassVar[str] = "stacked"

    inner: WeightFormat
    count: int
    rows: int

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """See the class."""
        assert rows == self.count * self.rows
        inner = self.inner.segments(self.rows, cols)
        return tuple(Segment(each.name, (self.count, *each.shape), each.dtype) for each in inner)

    def part(self, segments: Segments, index: int) -> dict[str, Tensor]:
        """The segments of one of the matrices, as the inner format has them."""
        return {name: tensor[index] for name, tensor in segments.items()}

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Rows of the whole."""
        for index in range(begin // self.rows, -(-end // self.rows)):
            above = index * self.rows
            first, last = max(begin, above), min(end, above + self.rows)
            piece = out[first - begin : last - begin]
            numbers = self.inner.dequantize(self.part(segments, index), first - above, last - above, piece)
            if numbers.data_ptr() != piece.data_ptr():
                piece.copy_(numbers)
        return out
