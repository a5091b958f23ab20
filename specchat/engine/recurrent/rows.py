"""The rows of one pass, as recurrent layers see them: rows in sequence, then tree rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specchat.engine.layout import RowLayout


class PassRows:
    """The rows of one pass over one sequence; all recurrent layers share them.

    Args:
        layout: layout of the pass; its chunk changes while a layer runs.
        device: device of the layers; None for that of the layout.
    """

    def __init__(self, layout: RowLayout, device: torch.device | None = None) -> None:
        self._layout = layout
        self._ancestors = layout.ancestors if device is None else layout.ancestors.to(device)
        self._taps: dict[int, Tensor] = {}

    @property
    def num_linear(self) -> int:
        """Number of the pass's rows in sequence."""
        return self._layout.num_linear

    @property
    def prefix(self) -> int:
        """Number of rows before the pass that are in sequence."""
        return self._layout.prefix

    @property
    def num_earlier(self) -> int:
        """Number of tree rows that earlier passes have appended."""
        return self._layout.num_earlier

    @property
    def begins(self) -> bool:
        """Whether the current chunk is the layer's first."""
        return self._layout.chunk[0] == 0

    @property
    def num_chunk_linear(self) -> int:
        """Number of the current chunk's rows in sequence; its other rows are tree rows."""
        begin, end = self._layout.chunk
        return min(max(self._layout.num_linear, begin), end) - begin

    @property
    def tree(self) -> tuple[int, int]:
        """Range [first, last) of the current chunk's rows among all tree rows, earlier passes included."""
        begin, end = self._layout.chunk
        first = begin + self.num_chunk_linear - self._layout.num_linear
        return self._layout.num_earlier + first, self._layout.num_earlier + end - self._layout.num_linear

    def ancestors(self, first: int, last: int) -> Tensor:
        """Return the tree rows that tree rows first..last see, themselves included: bool [last - first, last]."""
        earlier = self._layout.num_earlier
        return self._ancestors[first - earlier : last - earlier, :last]

    @property
    def parents(self) -> list[int]:
        """Parents of the chunk's tree rows, as indices of tree rows; -1 for the last row before the tree."""
        parents: list[int] = (self.taps(2)[:, 0] - 1).tolist()
        return parents

    def taps(self, size: int) -> Tensor:
        """Return the `size` rows that a convolution sees from each tree row of the chunk, oldest first.

        Returns:
            Columns of [the last `size - 1` rows before the tree, all tree rows], int64 [n, size].
        """
        if size not in self._taps:
            self._taps[size] = _nearest(self._ancestors, size)
        first, last = (row - self._layout.num_earlier for row in self.tree)
        return self._taps[size][first:last]


def _nearest(ancestors: Tensor, size: int) -> Tensor:
    """Return the columns of `PassRows.taps` for new rows with these ancestors, bool [n, m]."""
    padded = functional.pad(ancestors, (0, max(size - ancestors.shape[1], 0)))
    rank = padded * torch.arange(1, padded.shape[1] + 1, dtype=torch.int32, device=ancestors.device)
    # Parents come before their children, so the nearest ancestors are the last ones.
    nearest = rank.topk(size, dim=1).values.long() - 1
    in_tree = nearest >= 0
    steps_above = torch.arange(size, device=ancestors.device)[None] - in_tree.sum(1, keepdim=True)
    return torch.where(in_tree, nearest + size - 1, size - 2 - steps_above).flip(1)
