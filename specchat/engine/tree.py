"""The tree of guesses: which tokens, whose children, who sees whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specchat.records.generation import Guesses

ROOT = -1


@dataclass(frozen=True)
class TokenTree:
    """Draft nodes below the last committed token, which is the root and not among them.

    Attributes:
        tokens: one per node, best guess first.
        parents: node index, or ROOT; always smaller than the node's own index.
        sources: which drafter guessed each node; empty where nobody asks.
        weights: the drafter's log weights of the paths that end at each node, descending; empty if it gives none.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root; its children have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node."""
        return {edge: node for node, edge in enumerate(zip(self.parents, self.tokens, strict=True))}

    @cached_property
    def ancestors(self) -> Tensor:
        """Which nodes each node sees: its ancestors and itself; bool [N, N]."""
        seen = torch.zeros(len(self), len(self), dtype=torch.bool)
        depths, parents = torch.tensor(self.depths), torch.tensor(self.parents)
        for depth in range(1, max(self.depths, default=0) + 1):
            nodes = (depths == depth).nonzero()[:, 0]
            if depth > 1:
                seen[nodes] = seen[parents[nodes]]
            seen[nodes, nodes] = True
        return seen

    def by_source(self, path: Sequence[int]) -> tuple[Guesses, ...]:
        """What each drafter offered, and how much of it is on `path`."""
        offered = Counter(self.sources)
        accepted = Counter(self.sources[node] for node in path) if self.sources else Counter[str]()
        return tuple(Guesses(source, offered[source], accepted[source]) for source in sorted(offered))

    def likely_descendants(self, node: int, limit: int) -> list[int]:
        """Up to `limit` nodes below `node` (ROOT for all), best guesses first."""
        if node == ROOT:
            return list(range(min(limit, len(self))))
        below = self.ancestors[node + 1 :, node].nonzero()[:limit, 0] + node + 1
        return [int(n) for n in below]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)  # a list never equals a tuple
