"""Growing trees: the best paths so far, and the rows of expanded nodes in the draft's cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.engine.layout import RowLayout
from specchat.engine.tree import ROOT


@dataclass
class Paths:
    """The best paths of all trees so far, best first; all tensors [M] on the CPU, M <= budget.

    `row` is the node's row among its tree's rows in the draft's cache, -1 until the node is expanded.
    """

    score: Tensor  # sum of log weights along the path, float64
    token: Tensor
    parent: Tensor  # index into these tensors, or ROOT
    depth: Tensor
    row: Tensor
    tree: Tensor

    @classmethod
    def empty(cls) -> Paths:
        """Return an empty set of paths."""
        ints = torch.zeros(0, dtype=torch.int64)
        return cls(torch.zeros(0, dtype=torch.float64), ints, ints, ints, ints, ints)

    def __len__(self) -> int:
        return self.score.shape[0]

    def frontier(self, width: int, budget: int, max_depths: Tensor) -> Tensor:
        """Return the best unexpanded nodes whose children could still enter a tree: indices [<= width].

        Args:
            width: most nodes to return.
            budget: number of paths that are kept.
            max_depths: number of levels of each tree, int64 [trees].
        """
        open_ = (self.row < 0) & (self.depth < max_depths[self.tree])
        if len(self) >= budget:
            open_ &= self.score > self.score[-1]
        return open_.nonzero()[:width, 0]

    def with_children(self, trees: Tensor, parents: Tensor, scores: Tensor, tokens: Tensor, budget: int) -> Paths:
        """Add children and keep the best `budget` paths.

        Args:
            trees: trees of the expanded nodes [n].
            parents: indices of the expanded nodes [n], or ROOT.
            scores: log weights of the children [n, branch], float64.
            tokens: token ids of the children [n, branch].
            budget: number of paths to keep.
        """
        branch = tokens.shape[1]
        parent = parents.repeat_interleave(branch)
        is_root = parent == ROOT
        if len(self):
            base = torch.where(is_root, 0.0, self.score[parent.clamp(min=0)])
            depth = torch.where(is_root, 1, self.depth[parent.clamp(min=0)] + 1)
        else:
            base, depth = torch.zeros(parent.shape, dtype=torch.float64), torch.ones_like(parent)
        # Keep scores strictly below the parent's, so that sorting never puts a child before its parent.
        score = base + scores.flatten().clamp(max=-1e-9)
        merged = Paths(
            torch.cat([self.score, score]),
            torch.cat([self.token, tokens.flatten()]),
            torch.cat([self.parent, parent]),
            torch.cat([self.depth, depth]),
            torch.cat([self.row, torch.full_like(parent, -1)]),
            torch.cat([self.tree, trees.repeat_interleave(branch)]),
        )
        return merged._best(budget)

    def first(self, count: int) -> Paths:
        """Return the best `count` paths; every parent is included, because parents precede their children."""
        columns = (self.score, self.token, self.parent, self.depth, self.row, self.tree)
        return Paths(*(column[:count] for column in columns))

    def of_tree(self, tree: int) -> Paths:
        """Return the paths of one tree."""
        return self._taken((self.tree == tree).nonzero()[:, 0])

    def _best(self, budget: int) -> Paths:
        return self._taken(self.score.argsort(descending=True, stable=True)[:budget])

    def _taken(self, nodes: Tensor) -> Paths:
        """Return the paths that end at the given nodes, in this order; the parents must be among the nodes."""
        new_index = torch.full((len(self) + 1,), ROOT, dtype=torch.int64)  # ROOT = -1 indexes the last entry
        new_index[nodes] = torch.arange(nodes.shape[0])
        columns = (self.score, self.token, new_index[self.parent], self.depth, self.row, self.tree)
        return Paths(*(column[nodes] for column in columns))


class TreeRows:
    """Rows of one growing tree in its seat of the draft's cache, in order of expansion."""

    def __init__(self, max_rows: int, prefix: int, device: torch.device) -> None:
        self._seen = torch.zeros(max_rows, max_rows, dtype=torch.bool)
        self._positions = torch.zeros(max_rows, dtype=torch.int64)
        self._prefix = prefix
        self._device = device
        self._end = 0

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return self._end

    def add(self, parent_rows: Tensor, depths: Tensor) -> Tensor:
        """Add rows below the given parent rows (ROOT for none), and return their indices [n]."""
        rows = torch.arange(self._end, self._end + len(parent_rows))
        below = parent_rows >= 0
        self._seen[rows[below]] = self._seen[parent_rows[below]]
        self._seen[rows, rows] = True
        self._positions[rows] = self._prefix - 1 + depths
        self._end += len(parent_rows)
        return rows

    def layout(self, num_new: int) -> RowLayout:
        """Return the layout of a pass over the last `num_new` rows."""
        ancestors = self._seen[self._end - num_new : self._end, : self._end].to(self._device)
        return RowLayout(self._prefix, 0, ancestors, self._positions[: self._end].to(self._device))
