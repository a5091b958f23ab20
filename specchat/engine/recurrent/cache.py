"""The states of all recurrent layers of a model for one sequence, and the points to which they can return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specchat.engine.attention import RowLayout
from specchat.engine.recurrent.restore import RestorePoints
from specchat.engine.recurrent.rows import PassRows
from specchat.engine.recurrent.state import LayerState, TreeUpdates
from specchat.records.model import StateShape


class RecurrentCache:
    """The states of all recurrent layers for one sequence; all have equal length between passes.

    Args:
        shapes: shape of each layer's state; None for layers without a state.
        tree_rows: most rows of a tree.
        grows: whether trees grow over several passes, as a draft's trees do.
        num_points: most restore points to hold.
        dtype: dtype of the model.
        device: device of states and stashes.
    """

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        tree_rows: int,
        *,
        grows: bool,
        num_points: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        found = [shape for shape in shapes if shape is not None]
        make = {shape: TreeUpdates(shape, tree_rows, device) for shape in set(found)}
        updates = [TreeUpdates(shape, tree_rows, device) if grows else make[shape] for shape in found]
        states = [LayerState(shape, tree_rows, own, dtype, device) for shape, own in zip(found, updates, strict=True)]
        in_order = iter(states)
        self.layers = [None if shape is None else next(in_order) for shape in shapes]
        self.points = RestorePoints(found, num_points, dtype)
        self._states = states
        self._updates = list({id(each): each for each in updates}.values())
        self._wanted: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of rows read, stashed tree rows included."""
        return self._states[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of states, stashes and workspaces on the device."""
        return sum(state.nbytes for state in self._states) + sum(updates.nbytes for updates in self._updates)

    def mark(self, lengths: Iterable[int]) -> None:
        """Set the lengths at which the next pass with rows in sequence saves restore points."""
        self._wanted = tuple(lengths)

    def begin(self, layout: RowLayout) -> None:
        """Begin a pass over the rows of a layout."""
        rows = PassRows(layout)
        begin, end = rows.prefix, rows.prefix + rows.num_linear
        marks = self.points.reserve(mark for mark in self._wanted if begin < mark <= end)
        if rows.num_linear:
            self._wanted = ()
        for index, state in enumerate(self._states):
            state.begin(rows, {mark: copies[index] for mark, copies in marks.items()})

    def end(self) -> None:
        """End a pass that has computed all layers."""
        self.points.commit()

    def save(self) -> None:
        """Save a restore point at the current length."""
        for copies in self.points.reserve([self.length] if self.length else []).values():
            for state, copy in zip(self._states, copies, strict=True):
                state.save(copy)
        self.points.commit()

    def keep(self, base: int, rows: Tensor) -> None:
        """Fold a path of tree rows (int64 [n], cache rows from `base` on) into the states, and drop all others."""
        for state in self._states:
            state.keep(base, rows)

    def truncate(self, length: int) -> int:
        """Drop rows from `length` on, including rows of a pass that stopped between layers.

        Returns:
            The length reached: `length`, or less where no longer state is held.
        """
        self.points.discard()
        self.points.drop_after(length)
        reached = self._reachable(length)
        point = self.points.nearest(length)
        if point > reached:
            for state, copy in zip(self._states, self.points[point], strict=True):
                state.load(copy)
            return point
        for state in self._states:
            state.truncate(reached)
        self.points.drop_after(reached)
        return reached

    def _reachable(self, length: int) -> int:
        """Return the greatest length up to `length` that all layers still hold."""
        while True:
            lengths = {state.reachable(length) for state in self._states}
            if len(lengths) == 1:
                return lengths.pop()
            length = min(lengths)
