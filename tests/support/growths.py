"""Other published growths of draft trees, slow and obvious, over the same draft: EAGLE-2's and SubSpec's."""

from __future__ import annotations

from collections.abc import Sequence

from specchat.engine.tree import ROOT, TokenTree
from support.specexec import Node, SpecExecDrafter


class Eagle2Drafter(SpecExecDrafter):
    """EAGLE-2's growth (arXiv 2406.16858): level by level, then the best nodes of all levels.

    Every level expands its best `TOP_K` nodes by cumulative probability and adds the best `TOP_K` children of each.
    """

    TOP_K, DEPTH = 10, 8

    def _grow(self, context: Sequence[int], budget: int, max_depth: int) -> TokenTree:
        level = self._best_children(context, None, self.TOP_K)
        nodes = list(level)
        for _ in range(1, min(self.DEPTH, max_depth)):
            level = [
                each for node in _best(level, self.TOP_K) for each in self._best_children(context, node, self.TOP_K)
            ]
            nodes += level
        return _tree(_best(nodes, budget) if max_depth else [])

    def _best_children(self, context: Sequence[int], node: Node | None, width: int) -> list[Node]:
        self._model.cache.truncate(0, 0)
        scores, tokens = self._log_probs([*context, *(node.path() if node else [])]).topk(width)
        above, depth = (0.0, 1) if node is None else (node.score, node.depth + 1)
        return [
            Node(above + score, token, node, depth)
            for score, token in zip(scores.tolist(), tokens.tolist(), strict=True)
        ]


class FixedBeamDrafter(Eagle2Drafter):
    """SubSpec's growth (arXiv 2509.18344): a beam of fixed width, whose every level is verified."""

    WIDTH = 6

    def _grow(self, context: Sequence[int], budget: int, max_depth: int) -> TokenTree:
        width = min(self.WIDTH, max(budget // 4, 1))
        level, nodes = _best(self._best_children(context, None, width), width), list[Node]()
        while level and len(nodes) < budget and level[0].depth <= max_depth:
            nodes += level[: budget - len(nodes)]
            level = _best([each for node in level for each in self._best_children(context, node, width)], width)
        return _tree(nodes)


def _best(nodes: Sequence[Node], count: int) -> list[Node]:
    return sorted(nodes, key=lambda node: node.score, reverse=True)[:count]


def _tree(nodes: Sequence[Node]) -> TokenTree:
    index = {id(node): i for i, node in enumerate(nodes)}
    parents = [ROOT if node.parent is None else index[id(node.parent)] for node in nodes]
    return TokenTree(tuple(node.token for node in nodes), tuple(parents))
