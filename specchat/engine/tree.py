"""The draft tree: tokens, parents, and the visibility of nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specchat.records.generation import Guesses, SourceWork

ROOT = -1


@dataclass(frozen=True)
class TokenTree:
    """Draft nodes below the root; the root is the last committed token and no node of the tree.

    Attributes:
        tokens: token id of each node, likeliest first.
        parents: index of each node's parent, smaller than the node's own index; ROOT for children of the root.
        sources: name of the drafter of each node; empty if unknown.
        weights: drafter's log weight of the path that ends at each node, descending; empty if unknown.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """Node index by (parent index, token id)."""
        return {edge: node for node, edge in enumerate(zip(self.parents, self.tokens, strict=True))}

    @cached_property
    def ancestors(self) -> Tensor:
        """Visibility of nodes, bool [N, N]: each row marks the node's ancestors and the node itself."""
        seen = torch.zeros(len(self), len(self), dtype=torch.bool)
        depths, parents = torch.tensor(self.depths), torch.tensor(self.parents)
        for depth in range(1, max(self.depths, default=0) + 1):
            nodes = (depths == depth).nonzero()[:, 0]
            if depth > 1:
                seen[nodes] = seen[parents[nodes]]
            seen[nodes, nodes] = True
        return seen

    def by_source(self, path: Sequence[int], work: Sequence[SourceWork] = ()) -> tuple[Guesses, ...]:
        """Count each source's nodes and its nodes on `path`, by depth.

        Args:
            path: accepted nodes, root to leaf.
            work: work of each source on the trees of the pass.
        """
        costs = {each.source: each for each in work}
        found = []
        for source in sorted({*self.sources, *costs}):
            offered = [depth for name, depth in zip(self.sources, self.depths, strict=False) if name == source]
            accepted = [self.depths[node] for node in path if self.sources and self.sources[node] == source]
            cost = costs.get(source, SourceWork(source))
            found.append(
                Guesses(
                    source,
                    len(offered),
                    len(accepted),
                    _counts(offered),
                    _counts(accepted),
                    cost.draft_s,
                    cost.draft_passes,
                )
            )
        return tuple(found)

    def likely_descendants(self, node: int, limit: int) -> list[int]:
        """Return up to `limit` nodes below `node` (ROOT for all), likeliest first."""
        if node == ROOT:
            return list(range(min(limit, len(self))))
        below = self.ancestors[node + 1 :, node].nonzero()[:limit, 0] + node + 1
        return [int(n) for n in below]


def _counts(depths: Sequence[int]) -> tuple[int, ...]:
    """Return how often depth 1, 2, ... up to the largest one occurs."""
    counts = Counter(depths)
    return tuple(counts[depth] for depth in range(1, max(depths, default=0) + 1))


def last_tokens(text: Sequence[int], tokens: Sequence[int], parents: Sequence[int], node: int, most: int) -> list[int]:
    """Return the last `most` tokens up to a node of a tree, or all of a shorter text.

    Args:
        text: tokens up to the tree's root.
        tokens: token of each node.
        parents: parent of each node, or ROOT.
        node: index of the node, or ROOT.
        most: most tokens to return.
    """
    below = list[int]()
    while node != ROOT and len(below) < most:
        below.append(tokens[node])
        node = parents[node]
    missing = most - len(below)
    return [*text[max(len(text) - missing, 0) :], *reversed(below)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)  # a list never equals a tuple
