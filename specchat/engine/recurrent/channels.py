"""Scans of layers whose channels have states of their own: Mamba 1.

Every channel c has a state h of D numbers, which decay at constant rates A_c times the row's time step:

    h_i = exp(dt_i A_c) h_parent(i) + dt_i x_i B_i        y_i = h_i . C_i

There are thousands of channels, so scores between rows and channels, as other scans compute them, would take a hundred
times the memory of the states. The states of a tree's rows are computed one row after another instead, and kept until
the tree is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChannelRows:
    """What a layer computes for its rows, float32.

    Attributes:
        k: keys [n, D], B in the equations.
        v: values [H, n], x in the equations.
        steps: time steps [H, n].
    """

    k: Tensor
    v: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.k)

    def cut(self, begin: int, end: int) -> ChannelRows:
        """Return rows begin..end."""
        return ChannelRows(self.k[begin:end], self.v[:, begin:end], self.steps[:, begin:end])


def scan_channels(q: Tensor, rows: ChannelRows, rates: Tensor, state: Tensor) -> Tensor:
    """Return the outputs [H, n] of rows in sequence, and advance `state` in place.

    Args:
        q: queries [n, D], float32; C in the equations.
        rows: keys, values and time steps.
        rates: rates of decay per unit of time [H, D], float32, never positive; A in the equations.
        state: state [H, D] before the rows, float32.
    """
    out = rows.v.new_empty(rows.v.shape)
    for row in range(len(rows)):
        _advance(rows, row, rates, state)
        out[:, row] = state @ q[row]
    return out


def advance_channels(rows: ChannelRows, rates: Tensor, state: Tensor) -> None:
    """Advance `state` in place by rows in sequence; arguments as in `scan_channels`."""
    for row in range(len(rows)):
        _advance(rows, row, rates, state)


def scan_tree_channels(
    q: Tensor, rows: ChannelRows, rates: Tensor, state: Tensor, states: Tensor, first: int, parents: Sequence[int]
) -> Tensor:
    """Return the outputs [H, n] of new tree rows, and store their states; `state` stays.

    Args:
        q: queries [n, D], float32.
        rows: keys, values and time steps of the new rows.
        rates: rates of decay per unit of time [H, D], float32.
        state: state [H, D] before the tree, float32.
        states: states of all tree rows [m, H, D], of which those of earlier rows are known.
        first: index of the first new row among the tree's rows.
        parents: index of each new row's parent among the tree's rows; -1 for the row before the tree.
    """
    out = rows.v.new_empty(rows.v.shape)
    for row, parent in enumerate(parents):
        own = states[first + row]
        own.copy_(state if parent < 0 else states[parent])
        _advance(rows, row, rates, own)
        out[:, row] = own @ q[row]
    return out


def _advance(rows: ChannelRows, row: int, rates: Tensor, state: Tensor) -> None:
    steps = rows.steps[:, row]
    state *= (steps.unsqueeze(-1) * rates).exp_()
    state.addcmul_((steps * rows.v[:, row]).unsqueeze(-1), rows.k[row])
