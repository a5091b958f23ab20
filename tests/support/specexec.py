"""SpecExec's own growth (arXiv 2406.02532), slow and obvious: level by level, one global threshold.

Every level expands its best `WIDTH` nodes, offers each node's best `BRANCH` children with their cumulative log
probability less a constant per level, and keeps what belongs to the best `budget` of the whole tree.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specchat.engine.drafting.policy import DraftPolicy
from specchat.engine.kv_cache import Kept
from specchat.engine.model import TreeModel
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import SourceWork

WIDTH = 128
BRANCH = 32
DECAY = 0.95


@dataclass
class Node:
    score: float
    token: int
    parent: Node | None
    depth: int

    def path(self) -> list[int]:
        above = self.parent.path() if self.parent else []
        return [*above, self.token]


class SpecExecDrafter:
    """Computes every path from the prompt's cache anew, one at a time; the draft at temperature 1."""

    def __init__(self, model: TreeModel) -> None:
        self.models: Sequence[TreeModel] = (model,)
        self.work: Sequence[SourceWork] = ()
        self._model = model

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        return [self._grow(each.tokens, policy.tree_budget, each.max_depth) for each in sequences]

    def _grow(self, context: Sequence[int], budget: int, max_depth: int) -> TokenTree:
        cache = self._model.cache
        cache.truncate(0, 0)
        root = self._log_probs(list(context))
        best: list[Node] = []
        level = self._children(None, root)
        while level:
            best = sorted([*best, *level], key=lambda node: node.score, reverse=True)[:budget]
            kept = set(map(id, best))
            frontier = sorted((n for n in level if id(n) in kept), key=lambda node: node.score, reverse=True)[:WIDTH]
            level = []
            for node in frontier:
                if node.depth < max_depth:
                    cache.truncate(0, len(context))
                    level += self._children(node, self._log_probs(node.path()))
            threshold = best[-1].score if len(best) == budget else -math.inf
            level = [node for node in level if node.score > threshold]
        cache.truncate(0, 0)
        index = {id(node): i for i, node in enumerate(best)}
        parents = [ROOT if node.parent is None else index[id(node.parent)] for node in best]
        return TokenTree(tuple(node.token for node in best), tuple(parents))

    def observe(self, tails: Sequence[Sequence[int]], scores: torch.Tensor) -> None:
        pass

    wants_states = False
    taps = None

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        return ()

    def close(self) -> None:
        pass

    def _log_probs(self, tokens: list[int]) -> torch.Tensor:
        return self._model.logits(self._model.append(tokens)[-1:])[0].log_softmax(-1)

    @staticmethod
    def _children(parent: Node | None, log_probs: torch.Tensor) -> list[Node]:
        base, depth = (0.0, 1) if parent is None else (parent.score, parent.depth + 1)
        scores, tokens = log_probs.topk(min(BRANCH, len(log_probs)))
        return [
            Node(base + math.log(DECAY) + score, token, parent, depth)
            for score, token in zip(scores.tolist(), tokens.tolist(), strict=True)
        ]
