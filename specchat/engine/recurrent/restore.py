"""Restore points: copies of all states at a few lengths, so that a text can be cut there and continued.

Cutting a text between two points reads the rows after the earlier point again. In a streamed model, the rows join a
pass that runs anyway, so only their computation counts. Points are dense near the end of the text, where most texts are
cut, and sparse far from the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from specchat.engine.recurrent.state import StateBuffer
from specchat.records.model import StateShape

# Distance from the end of a prompt of the nearest point within the prompt; the distances of further points double.
NEAREST_ROWS = 512


class RestorePoints:
    """Copies of the states of all recurrent layers in host memory, whose buffers are allocated once and used again.

    Args:
        shapes: shape of each layer's state.
        capacity: most points to hold.
        dtype: dtype of the model.
    """

    def __init__(self, shapes: Sequence[StateShape], capacity: int, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._capacity = capacity
        self._dtype = dtype
        self._points: dict[int, list[StateBuffer]] = {}
        self._reserved: dict[int, list[StateBuffer]] = {}
        self._unused: list[list[StateBuffer]] = []

    @property
    def lengths(self) -> list[int]:
        """Lengths of the texts at which there is a point, ascending."""
        return sorted(self._points)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = (*self._points.values(), *self._reserved.values(), *self._unused)
        return sum(copy.nbytes for copies in held for copy in copies)

    def __getitem__(self, length: int) -> list[StateBuffer]:
        return self._points[length]

    def nearest(self, length: int) -> int:
        """Return the greatest length of a point that is at most `length`; 0 without a point."""
        return max((point for point in self._points if point <= length), default=0)

    def reserve(self, lengths: Iterable[int]) -> dict[int, list[StateBuffer]]:
        """Return buffers for points at new lengths, which replace the points that are worth least.

        Returns:
            A buffer per layer, by length. `commit` makes points of them.
        """
        self.discard()
        new = sorted(set(lengths) - self._points.keys())[-self._capacity :] if self._capacity else []
        for length in new:
            self._reserved[length] = self._take_buffers(new[-1])
        return self._reserved

    def commit(self) -> None:
        """Turn the reserved buffers into points."""
        self._points |= self._reserved
        self._reserved = {}

    def discard(self) -> None:
        """Give the reserved buffers back."""
        self._unused += self._reserved.values()
        self._reserved = {}

    def drop_after(self, length: int) -> None:
        """Drop the points of longer texts."""
        for point in [point for point in self._points if point > length]:
            self._unused.append(self._points.pop(point))

    def _take_buffers(self, end: int) -> list[StateBuffer]:
        if self._unused:
            return self._unused.pop()
        if len(self._points) + len(self._reserved) < self._capacity:
            cpu = torch.device("cpu")
            with torch.inference_mode(mode=False):  # passes make points, and so do callers outside of passes
                return [StateBuffer.zeros(shape, self._dtype, cpu) for shape in self._shapes]
        return self._points.pop(cheapest(self.lengths, end))


def cheapest(points: Sequence[int], end: int) -> int:
    """Return the point that is missed least: few rows lie between its neighbours, compared to their distance to `end`.

    The points that remain are spaced like a geometric series from the end.

    Args:
        points: lengths of the points, ascending; at least one.
        end: length of the text.
    """
    before, after = [0, *points[:-1]], [*points[1:], end]
    costs = {point: (right - left) / (1 + end - left) for point, left, right in zip(points, before, after, strict=True)}
    return min(points, key=costs.__getitem__)


def marks_of_prompt(begin: int, end: int, others: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the lengths at which states are saved while rows begin..end of a prompt are read.

    The last row of a prompt is always computed again, so the state before the last row counts most.

    Args:
        begin: first row to read.
        end: length of the prompt.
        others: further lengths that the caller wants.
    """
    marks = {end - 1, *others}
    distance = NEAREST_ROWS
    while end - 1 - distance > begin:
        marks.add(end - 1 - distance)
        distance *= 2
    return tuple(sorted(mark for mark in marks if begin < mark <= end))
