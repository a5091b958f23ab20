"""The running state of one recurrent layer for one sequence, in buffers allocated once.

A state cannot be cropped like rows of keys and values. So a pass folds its rows in sequence into a working state, and
stashes its tree rows: what the layer's convolution and recurrence were given. `keep` replays the accepted path from the
stash, without weights, which may have been streamed away. The state before the last change stays in a second buffer,
so that a cancelled pass and an answer that is cut by a few tokens cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from specchat.engine.recurrent.channels import ChannelRows, advance_channels, scan_channels, scan_tree_channels
from specchat.engine.recurrent.convolution import convolve_sequence, convolve_tree
from specchat.engine.recurrent.rows import PassRows
from specchat.engine.recurrent.scan import ScanRows, Seen, advance, path_sums, scan_sequence, scan_tree
from specchat.records.limits import SCAN_BLOCK_ROWS
from specchat.records.model import StateShape

_NO_LENGTH = -1  # of a buffer without a state


@dataclass
class StateBuffer:
    """A state in memory of its own.

    Attributes:
        window: last inputs of the convolution, [taps - 1, C].
        memory: state of the recurrence, float32 [H, D, D_v].
        length: number of rows that the state has read; -1 if the buffer holds no state.
    """

    window: Tensor
    memory: Tensor
    length: int = _NO_LENGTH

    @classmethod
    def zeros(cls, shape: StateShape, dtype: torch.dtype, device: torch.device) -> StateBuffer:
        """Allocate the state before the first row."""
        window = torch.zeros(shape.taps - 1, shape.channels, dtype=dtype, device=device)
        memory = torch.zeros(shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32, device=device)
        return cls(window, memory, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.window.nbytes + self.memory.nbytes

    def copy_from(self, other: StateBuffer) -> None:
        """Overwrite this state with another one."""
        self.window.copy_(other.window)
        self.memory.copy_(other.memory)
        self.length = other.length

    def clear(self) -> None:
        """Return to the state before the first row."""
        self.window.zero_()
        self.memory.zero_()
        self.length = 0


class TreeUpdates:
    """Keys, updates and sums of decays of tree rows, or their states, which later rows of the same tree need.

    Layers may share a workspace if each layer computes whole trees before the next layer runs.

    Args:
        shape: shape of the layer's state.
        capacity: number of tree rows.
        device: device of the buffers.

    Attributes:
        states: states of tree rows [m, H, D] of layers whose heads have rates of decay; else none.
    """

    def __init__(self, shape: StateShape, capacity: int, device: torch.device) -> None:
        rows, rows_with_states = (0, capacity) if shape.rates else (capacity, 0)
        self._k = torch.zeros(shape.key_heads, rows, shape.key_dim, dtype=torch.float32, device=device)
        self._u = torch.zeros(shape.heads, rows, shape.value_dim, dtype=torch.float32, device=device)
        self._sums = torch.zeros(_decays_shape(shape, rows), dtype=torch.float64, device=device)
        self.states = torch.zeros(rows_with_states, shape.heads, shape.key_dim, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace."""
        return self._k.nbytes + self._u.nbytes + self._sums.nbytes + self.states.nbytes

    def before(self, row: int) -> Seen:
        """Return the tree rows before a row."""
        return Seen(self._k[:, :row], self._sums[:, :row], self._u[:, :row])

    def store(self, first: int, k: Tensor, sums: Tensor, u: Tensor) -> None:
        """Store tree rows from `first` on."""
        last = first + u.shape[1]
        self._k[:, first:last], self._sums[:, first:last], self._u[:, first:last] = k, sums, u


class LayerState:
    """The state of one recurrent layer for one sequence.

    Args:
        shape: shape of the state.
        tree_rows: number of tree rows that the stash holds.
        updates: workspace for trees.
        dtype: dtype of the model.
        device: device of the buffers.
    """

    def __init__(
        self, shape: StateShape, tree_rows: int, updates: TreeUpdates, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.device = device
        self.num_stashed = 0
        self._work, self._previous = (StateBuffer.zeros(shape, dtype, device) for _ in range(2))
        self._previous.length = _NO_LENGTH
        self._path: Tensor | None = None  # stashed rows between the previous state and the working state
        self._updates = updates
        self._inputs = torch.zeros(tree_rows, shape.channels, dtype=dtype, device=device)
        self._k = torch.zeros(shape.key_heads, tree_rows, shape.key_dim, dtype=dtype, device=device)
        self._v = torch.zeros(shape.heads, tree_rows, shape.value_dim, dtype=dtype, device=device)
        self._g = torch.zeros(_decays_shape(shape, tree_rows), dtype=torch.float32, device=device)
        self._beta = torch.zeros(0 if shape.rates else shape.heads, tree_rows, dtype=torch.float32, device=device)
        self._rates = torch.zeros(shape.heads, shape.rates, dtype=torch.float32, device=device)
        self._delta = False
        self._rows: PassRows | None = None
        self._marks: Mapping[int, StateBuffer] = {}

    @property
    def length(self) -> int:
        """Number of rows read, stashed tree rows included."""
        return self._work.length + self.num_stashed

    @property
    def nbytes(self) -> int:
        """Bytes of both states and of the stash."""
        stash = (self._inputs, self._k, self._v, self._g, self._beta, self._rates)
        return self._work.nbytes + self._previous.nbytes + sum(tensor.nbytes for tensor in stash)

    # --- the cache's protocol ----------------------------------------------------------------------------------------

    def begin(self, rows: PassRows, marks: Mapping[int, StateBuffer]) -> None:
        """Begin a pass.

        Args:
            rows: rows of the pass.
            marks: buffers for copies of the state at lengths within the pass's rows in sequence.
        """
        assert rows.prefix == self._work.length, f"a pass at row {rows.prefix} of a state of {self._work.length} rows"
        assert rows.num_earlier == self.num_stashed, "tree rows follow on each other"
        self._rows, self._marks = rows, marks
        self._path = None
        if rows.num_linear:
            self._previous.copy_from(self._work)

    def keep(self, base: int, rows: Tensor) -> None:
        """Fold a path of tree rows (int64 [n], cache rows from `base` on) into the state, and drop all others."""
        assert base == self._work.length, f"a path from row {base} of a state of {self._work.length} rows"
        self.num_stashed = 0
        self._path = None
        if rows.shape[0]:
            self._path = rows - base
            self._previous.copy_from(self._work)
            self._replay(self._path)

    def reachable(self, length: int) -> int:
        """Return the longest state of at most `length` rows that this layer still holds; 0 can always be reached."""
        if length >= self._work.length:
            return min(length, self.length)
        if not 0 <= self._previous.length <= length:
            return 0
        return self._previous.length if self._path is None else length

    def truncate(self, length: int) -> None:
        """Go back to a length that `reachable` has returned."""
        if length >= self._work.length:
            self.num_stashed = min(self.num_stashed, length - self._work.length)
            return
        self.num_stashed = 0
        if not 0 <= self._previous.length <= length:
            self._restart()
            return
        path, self._path = self._path, None
        if length == self._previous.length:
            self._work, self._previous = self._previous, self._work
            self._previous.length = _NO_LENGTH
            return
        assert path is not None, "only the last path can be cut"
        self._work.copy_from(self._previous)
        self._path = path[: length - self._previous.length]
        self._replay(self._path)

    def save(self, copy: StateBuffer) -> None:
        """Copy the state into a buffer."""
        assert not self.num_stashed, "only committed rows are saved"
        copy.copy_from(self._work)

    def load(self, copy: StateBuffer) -> None:
        """Replace the state by a copy."""
        self._restart()
        self._work.copy_from(copy)

    # --- called by the layer's mixer ---------------------------------------------------------------------------------

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve the rows of the current chunk; must come before `scan`.

        Args:
            x: inputs [rows, C].
            weight: weights [C, taps].
            bias: bias [C], or None.

        Returns:
            Outputs [rows, C], float32.
        """
        rows = self._pass
        num_linear = rows.num_chunk_linear
        out = x.new_empty(x.shape, dtype=torch.float32)
        if num_linear:
            inputs = torch.cat([self._work.window.to(x.dtype), x[:num_linear]])
            out[:num_linear] = convolve_sequence(inputs, weight, bias)
            self._append_window(inputs, num_linear)
        if num_linear < len(x):
            first, last = rows.tree
            self._inputs[first:last] = x[num_linear:]
            self.num_stashed = last
            inputs = torch.cat([self._work.window, self._inputs[:last]])
            out[num_linear:] = convolve_tree(inputs, rows.taps(self.shape.taps), weight, bias)
        return out

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, delta: bool) -> Tensor:
        """Run the recurrence over the rows of the current chunk.

        Args:
            q: queries [rows, H_k, D].
            k: keys [rows, H_k, D].
            v: values [rows, H, D_v].
            g: logarithms of the decays [rows, H] or [rows, H, D], never positive.
            beta: strengths of the updates [rows, H].
            delta: whether updates follow the delta rule, which normalizes queries and keys.

        Returns:
            Outputs [rows, H, D_v], float32.
        """
        rows = self._pass
        self._delta = delta
        q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
        num_linear = rows.num_chunk_linear
        q = _unit(q.float()) * q.shape[-1] ** -0.5 if delta else q.float()
        out = v.new_empty(v.shape, dtype=torch.float32)
        if num_linear:
            given = self._scan_rows(*(x[:, :num_linear] for x in (k, v, g, beta)))
            out[:, :num_linear] = self._scan_sequence(q[:, :num_linear], given)
        if num_linear < v.shape[1]:
            first, last = rows.tree
            stash = (self._k, self._v, self._g, self._beta)
            for kept, new in zip(stash, (k, v, g, beta), strict=True):
                kept[:, first:last] = new[:, num_linear:]
            out[:, num_linear:] = self._scan_tree(q[:, num_linear:], first, last)
        return out.transpose(0, 1)

    def scan_channels(self, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, rates: Tensor) -> Tensor:
        """Run the recurrence of Mamba 1 over the rows of the current chunk.

        Args:
            q: queries [rows, D].
            k: keys [rows, D].
            v: values [rows, H].
            steps: time steps [rows, H], float32.
            rates: rates of decay per unit of time [H, D], never positive.

        Returns:
            Outputs [rows, H], float32.
        """
        rows = self._pass
        self._rates.copy_(rates)
        num_linear, queries = rows.num_chunk_linear, q.float()
        given = _channel_rows(k.to(self._k.dtype), v.T.to(self._v.dtype), steps.T)
        out = given.v.new_empty(given.v.shape)
        if num_linear:
            out[:, :num_linear] = self._scan_channels(queries[:num_linear], given.cut(0, num_linear))
        if num_linear < len(given):
            first, last = rows.tree
            tree = given.cut(num_linear, len(given))
            self._k[0, first:last], self._v[:, first:last, 0], self._g[:, first:last] = tree.k, tree.v, tree.steps
            state, states = self._work.memory[..., 0], self._updates.states
            out[:, num_linear:] = scan_tree_channels(
                queries[num_linear:], tree, self._rates, state, states, first, rows.parents
            )
        return out.T

    # --- internals ---------------------------------------------------------------------------------------------------

    @property
    def _pass(self) -> PassRows:
        assert self._rows is not None, "a recurrent layer ran outside of a pass"
        return self._rows

    def _restart(self) -> None:
        self._work.clear()
        self._previous.length = _NO_LENGTH
        self._path, self.num_stashed = None, 0

    def _append_window(self, inputs: Tensor, num_rows: int) -> None:
        """Move the window behind `num_rows` rows whose inputs follow on the window in `inputs`."""
        size = self.shape.taps - 1
        for mark, copy in self._marks.items():
            row = mark - self._work.length
            if 0 < row <= num_rows:
                copy.window.copy_(inputs[row : row + size])
                copy.length = mark
        self._work.window.copy_(inputs[num_rows : num_rows + size])
        self._work.length += num_rows

    def _scan_sequence(self, q: Tensor, rows: ScanRows) -> Tensor:
        """Scan rows in sequence, whose inputs `convolve` has appended already, and copy the state at the marks."""
        outputs = []
        for first, last in self._pieces(len(rows)):
            outputs.append(scan_sequence(q[:, first:last], rows.cut(first, last), self._work.memory, self._delta))
            self._copy_at_mark(len(rows) - last)
        return torch.cat(outputs, 1)

    def _scan_channels(self, q: Tensor, rows: ChannelRows) -> Tensor:
        """Scan rows in sequence like `_scan_sequence`."""
        outputs = []
        for first, last in self._pieces(len(rows)):
            state = self._work.memory[..., 0]
            outputs.append(scan_channels(q[first:last], rows.cut(first, last), self._rates, state))
            self._copy_at_mark(len(rows) - last)
        return torch.cat(outputs, 1)

    def _pieces(self, num_rows: int) -> list[tuple[int, int]]:
        """Return ranges of the last `num_rows` rows, cut at the marks."""
        begin = self._work.length - num_rows
        marks = (mark - begin for mark in self._marks if begin < mark <= self._work.length)
        return list(pairwise([0, *sorted({*marks, num_rows})]))

    def _copy_at_mark(self, num_left: int) -> None:
        """Copy the recurrence's state if there is a mark where `num_left` rows in sequence are still to be scanned."""
        copy = self._marks.get(self._work.length - num_left)
        if copy is not None:
            copy.memory.copy_(self._work.memory)

    def _scan_tree(self, q: Tensor, first: int, last: int) -> Tensor:
        """Scan the stashed rows first..last of the tree, block by block."""
        outputs = []
        for begin in range(first, last, SCAN_BLOCK_ROWS):
            end = min(begin + SCAN_BLOCK_ROWS, last)
            ancestors = self._pass.ancestors(begin, end)
            rows = self._scan_rows(*(x[:, begin:end] for x in (self._k, self._v, self._g, self._beta)))
            sums = path_sums(self._g[:, :end], ancestors)
            queries = q[:, begin - first : end - first]
            seen = self._updates.before(begin)
            out, u = scan_tree(queries, rows, sums, self._work.memory, ancestors, seen, self._delta)
            self._updates.store(begin, rows.k, sums, u)
            outputs.append(out)
        return torch.cat(outputs, 1)

    def _replay(self, path: Tensor) -> None:
        """Advance the working state by stashed rows in sequence."""
        inputs = torch.cat([self._work.window, self._inputs.index_select(0, path)])
        self._work.window.copy_(inputs[path.shape[0] :])
        self._work.length += path.shape[0]
        if self.shape.rates:
            k, v, steps = (x.index_select(1, path) for x in (self._k, self._v, self._g))
            advance_channels(_channel_rows(k[0], v[..., 0], steps), self._rates, self._work.memory[..., 0])
        elif self.shape.heads:
            stash = (self._k, self._v, self._g, self._beta)
            advance(self._scan_rows(*(x.index_select(1, path) for x in stash)), self._work.memory, self._delta)

    def _scan_rows(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> ScanRows:
        """Return rows as the scan reads them, from what the layer was given or has stashed."""
        k = _unit(k.float()) if self._delta else k.float()
        return ScanRows(k, v.float(), g.float(), beta.float())


def _channel_rows(k: Tensor, v: Tensor, steps: Tensor) -> ChannelRows:
    """Return rows as the scan of channels reads them, from keys [n, D], values [H, n] and time steps [H, n]."""
    return ChannelRows(k.float(), v.float(), steps)


def _decays_shape(shape: StateShape, rows: int) -> tuple[int, ...]:
    return (shape.heads, rows) if shape.decays == 1 else (shape.heads, rows, shape.decays)


def _unit(x: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
