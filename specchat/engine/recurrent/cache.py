"""The states of all recurrent layers of a model, seat by seat, and the points to which they can return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.recurrent.restore import RestorePoints
from specchat.engine.recurrent.rows import PassRows
from specchat.engine.recurrent.state import LayerState, TreeUpdates
from specchat.records.model import StateShape


class LayerStates:
    """The states of one recurrent layer, one per seat, as the layer's mixer calls them.

    Args:
        seats: state of each seat.
    """

    def __init__(self, seats: Sequence[LayerState]) -> None:
        self.seats = seats
        self.layout: PassLayout | None = None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve the rows of the current chunk, each part by itself; see `LayerState.convolve`."""
        return self._by_part(lambda state, rows: state.convolve(x[rows], weight, bias))

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, delta: bool) -> Tensor:
        """Run the recurrence over the rows of the current chunk, each part by itself; see `LayerState.scan`."""
        return self._by_part(
            lambda state, rows: state.scan(q[rows], k[rows], v[rows], g[rows], beta[rows], delta=delta)
        )

    def scan_channels(self, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, rates: Tensor) -> Tensor:
        """Run the recurrence of Mamba 1, each part by itself; see `LayerState.scan_channels`."""
        return self._by_part(lambda state, rows: state.scan_channels(q[rows], k[rows], v[rows], steps[rows], rates))

    def _by_part(self, compute: Callable[[LayerState, slice], Tensor]) -> Tensor:
        assert self.layout is not None, "a recurrent layer ran outside of a pass"
        outputs = [compute(self.seats[part.seat], rows) for part, rows in self.layout.current]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class SequenceStates:
    """The states of all recurrent layers for one sequence; all have equal length between passes.

    Args:
        states: state of each recurrent layer.
        points: restore points of the sequence.
    """

    def __init__(self, states: Sequence[LayerState], points: RestorePoints) -> None:
        self.states = states
        self.points = points
        self._devices = {state.device for state in states}
        self._wanted: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of rows read, stashed tree rows included."""
        return self.states[0].length

    def mark(self, lengths: Iterable[int]) -> None:
        """Set the lengths at which the next pass with rows in sequence saves restore points."""
        self._wanted = tuple(lengths)

    def begin(self, layout: RowLayout) -> None:
        """Begin a pass over the rows of a layout."""
        rows = {device: PassRows(layout, device) for device in self._devices}
        begin, end = layout.prefix, layout.prefix + layout.num_linear
        marks = self.points.reserve(mark for mark in self._wanted if begin < mark <= end)
        if layout.num_linear:
            self._wanted = ()
        for index, state in enumerate(self.states):
            state.begin(rows[state.device], {mark: copies[index] for mark, copies in marks.items()})

    def save(self) -> None:
        """Save a restore point at the current length."""
        for copies in self.points.reserve([self.length] if self.length else []).values():
            for state, copy in zip(self.states, copies, strict=True):
                state.save(copy)
        self.points.commit()

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Fold a path of tree rows (cache rows from `base` on) into the states, and drop all others."""
        path = {device: torch.tensor(rows, dtype=torch.int64, device=device) for device in self._devices}
        for state in self.states:
            state.keep(base, path[state.device])

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
            for state, copy in zip(self.states, self.points[point], strict=True):
                state.load(copy)
            return point
        for state in self.states:
            state.truncate(reached)
        return reached

    def _reachable(self, length: int) -> int:
        """Return the greatest length up to `length` that all layers still hold."""
        while True:
            lengths = {state.reachable(length) for state in self.states}
            if len(lengths) == 1:
                return lengths.pop()
            length = min(lengths)


class RecurrentCache:
    """The states of all recurrent layers, for each seat.

    Args:
        shapes: shape of each layer's state; None for layers without a state.
        tree_rows: most rows of a tree.
        seats: number of sequences.
        grows: whether trees grow over several passes, as a draft's trees do.
        num_points: most restore points of a seat.
        dtype: dtype of the model.
        devices: device of each layer's states and stashes.

    Attributes:
        layers: states of each layer; None for layers without a state.
        seats: states of each seat.
    """

    def __init__(
        self,
        shapes: Sequence[StateShape | None],
        tree_rows: int,
        *,
        seats: int = 1,
        grows: bool,
        num_points: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
    ) -> None:
        placed = [(shape, there) for shape, there in zip(shapes, devices, strict=True) if shape is not None]
        found = [shape for shape, _ in placed]
        # Trees that one pass computes whole can share a workspace: a layer ends before the next one begins, and the
        # parts of a pass follow one after another.
        shared = {} if grows else {each: TreeUpdates(each[0], tree_rows, each[1]) for each in dict.fromkeys(placed)}
        self._updates = list(shared.values())
        self.seats = []
        for _ in range(seats):
            states = []
            for shape, device in placed:
                updates = shared.get((shape, device)) or TreeUpdates(shape, tree_rows, device)
                if grows:
                    self._updates.append(updates)
                states.append(LayerState(shape, tree_rows, updates, dtype, device))
            self.seats.append(SequenceStates(states, RestorePoints(found, num_points, dtype)))
        by_layer = (LayerStates(states) for states in zip(*(seat.states for seat in self.seats), strict=True))
        self.layers = [None if shape is None else next(by_layer) for shape in shapes]

    @property
    def lengths(self) -> list[int]:
        """Number of rows read in each seat, stashed tree rows included."""
        return [seat.length for seat in self.seats]

    @property
    def nbytes(self) -> int:
        """Bytes of states, stashes and workspaces on the device."""
        states = sum(state.nbytes for seat in self.seats for state in seat.states)
        return states + sum(updates.nbytes for updates in self._updates)

    @property
    def point_bytes(self) -> int:
        """Bytes of restore points in host memory."""
        return sum(seat.points.nbytes for seat in self.seats)

    def begin(self, layout: PassLayout) -> None:
        """Begin a pass over the rows of a layout."""
        for layer in self.layers:
            if layer is not None:
                layer.layout = layout
        for part in layout.parts:
            self.seats[part.seat].begin(part.layout)

    def end(self) -> None:
        """End a pass that has computed all layers."""
        for seat in self.seats:
            seat.points.commit()

    def mark(self, seat: int, lengths: Iterable[int]) -> None:
        """Set the lengths at which a seat's next rows in sequence leave restore points."""
        self.seats[seat].mark(lengths)

    def save(self, seat: int) -> None:
        """Save a restore point at a seat's current length."""
        self.seats[seat].save()

    def keep(self, seat: int, base: int, rows: Sequence[int]) -> None:
        """Fold a path of a seat's tree rows (cache rows from `base` on) into its states, and drop all others."""
        self.seats[seat].keep(base, rows)

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on; see `SequenceStates.truncate`."""
        return self.seats[seat].truncate(length)
