"""Growing trees: the best paths so far, and the rows of expanded nodes in the draft's cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specchat.engine.layout import RowLayout
from specchat.engine.tree import ROOT

# Scores stay strictly below the parent's, so that sorting never puts a child before its parent.
LEAST_LOSS = -1e-9


_NUM_FLOATS, _NUM_INTS = 2, 7


class Paths:
    """The best paths of all trees so far, best first; all tensors [M] on the CPU.

    The columns are views of two tensors, which are cut and joined as a whole: a tree takes some 20 rounds, and each
    operation on a tensor 5 us and more.

    Args:
        floats: score and edge, float64 [2, M].
        ints: the other columns, in the order below, int64 [7, M].

    Attributes:
        score: sum of log weights along the path.
        edge: log weight of the node below its parent.
        token: token id of the node.
        parent: index of the parent in these tensors, or ROOT.
        depth: number of nodes on the path.
        tree: number of the node's tree.
        source: number of the source of the node.
        row: row of the node among its tree's rows in the draft's cache, -1 until the node is expanded.
        asked: number of the node's record of proposals, -1 until the proposing sources were asked.
    """

    def __init__(self, floats: Tensor, ints: Tensor) -> None:
        self._floats, self._ints = floats, ints
        self.score, self.edge = floats.unbind()
        self.token, self.parent, self.depth, self.tree, self.source, self.row, self.asked = ints.unbind()

    @classmethod
    def empty(cls) -> Paths:
        """Return an empty set of paths."""
        return cls(torch.zeros(_NUM_FLOATS, 0, dtype=torch.float64), torch.zeros(_NUM_INTS, 0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.score.shape[0]

    def frontier(self, width: int, budget: int, max_depths: Tensor) -> Tensor:
        """Return the best unexpanded nodes whose children could still enter a tree: indices [<= width].

        Args:
            width: most nodes to return.
            budget: number of paths that the trees will have.
            max_depths: number of levels of each tree, int64 [trees].
        """
        return (self._could_have_children(budget, max_depths) & (self.row < 0)).nonzero()[:width, 0]

    def unasked(self, budget: int, max_depths: Tensor) -> list[int]:
        """Return the nodes that no proposing source was asked about, and whose children could still enter a tree."""
        nodes: list[int] = (self._could_have_children(budget, max_depths) & (self.asked < 0)).nonzero()[:, 0].tolist()
        return nodes

    def with_children(
        self, trees: Tensor, parents: Tensor, scores: Tensor, tokens: Tensor, most: int, sources: Tensor | None = None
    ) -> Paths:
        """Add children and keep the best paths.

        Args:
            trees: trees of the expanded nodes [n].
            parents: indices of the expanded nodes [n], or ROOT.
            scores: log weights of the children [n, branch], float64; -inf for a child that exists already.
            tokens: token ids of the children [n, branch].
            most: number of paths to keep.
            sources: sources of the children [n, branch]; None for the first source.
        """
        branch = tokens.shape[1]
        parent = parents.repeat_interleave(branch)
        is_root = parent == ROOT
        if len(self):
            base = torch.where(is_root, 0.0, self.score[parent.clamp(min=0)])
            depth = torch.where(is_root, 1, self.depth[parent.clamp(min=0)] + 1)
        else:
            base, depth = torch.zeros(parent.shape, dtype=torch.float64), torch.ones_like(parent)
        edge = scores.flatten().clamp(max=LEAST_LOSS)
        unknown = torch.full_like(parent, -1)
        from_source = torch.zeros_like(parent) if sources is None else sources.flatten()
        columns = tokens.flatten(), parent, depth, trees.repeat_interleave(branch), from_source, unknown, unknown
        merged = Paths(
            torch.cat([self._floats, torch.stack([base + edge, edge])], dim=1),
            torch.cat([self._ints, torch.stack(columns)], dim=1),
        )
        return merged._best(most)

    def reweighted(self, edges: Mapping[int, float]) -> Paths:
        """Return the paths, in the same order, with new log weights of some nodes below their parents."""
        edge = self.edge.tolist()
        for node, weight in edges.items():
            edge[node] = min(weight, LEAST_LOSS)
        score = list[float]()
        for weight, parent in zip(edge, self.parent.tolist(), strict=True):
            score.append(weight + (0.0 if parent == ROOT else score[parent]))
        return Paths(torch.tensor([score, edge], dtype=torch.float64), self._ints)

    def first(self, count: int) -> Paths:
        """Return the best `count` paths; every parent is included, because parents precede their children."""
        return Paths(self._floats[:, :count], self._ints[:, :count])

    def of_tree(self, tree: int) -> Paths:
        """Return the paths of one tree."""
        return self._taken((self.tree == tree).nonzero()[:, 0])

    def _could_have_children(self, budget: int, max_depths: Tensor) -> Tensor:
        could = self.depth < max_depths[self.tree]
        return could & (self.score > self.score[budget - 1]) if len(self) >= budget else could

    def _best(self, most: int) -> Paths:
        order = self.score.argsort(descending=True, stable=True)[:most]
        return self._taken(order[self.score[order] > -torch.inf])

    def _taken(self, nodes: Tensor) -> Paths:
        """Return the paths that end at the given nodes, in this order; the parents must be among the nodes."""
        new_index = torch.full((len(self) + 1,), ROOT, dtype=torch.int64)  # ROOT = -1 indexes the last entry
        new_index[nodes] = torch.arange(nodes.shape[0])
        taken = Paths(self._floats.index_select(1, nodes), self._ints.index_select(1, nodes))
        taken.parent.copy_(new_index[taken.parent])
        return taken


class TreeRows:
    """Rows of one growing tree in its seat of the draft's cache, in order of expansion."""

    def __init__(self, max_rows: int, prefix: int) -> None:
        self._seen = torch.zeros(max_rows, max_rows, dtype=torch.bool)
        self._positions = torch.zeros(max_rows, dtype=torch.int64)
        self._prefix = prefix
        self._end = 0

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return self._end

    def next(self, count: int) -> Tensor:
        """Return the indices [count] of the rows that `add` fills next."""
        return torch.arange(self._end, self._end + count)

    def add(self, parent_rows: Tensor, depths: Tensor) -> None:
        """Add rows below the given parent rows, ROOT for none; a parent may be an earlier one of these rows."""
        rows = self.next(len(parent_rows))
        for level in depths.unique():  # ascending
            below = (depths == level) & (parent_rows >= 0)
            self._seen[rows[below]] = self._seen[parent_rows[below]]
            self._seen[rows[depths == level], rows[depths == level]] = True
        self._positions[rows] = self._prefix - 1 + depths
        self._end += len(parent_rows)

    def layout(self, num_new: int) -> RowLayout:
        """Return the layout of a pass over the last `num_new` rows, in host memory."""
        ancestors = self._seen[self._end - num_new : self._end, : self._end]
        return RowLayout(self._prefix, 0, ancestors, self._positions[: self._end])
