"""Other published growths of draft trees over any source that scores nodes, with a node computed at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.policy import DraftPolicy
from specchat.engine.drafting.sources import ScoringSource
from specchat.engine.kv_cache import Kept
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import SourceWork
from support.specexec import SpecExecDrafter


class _NoCache:
    def truncate(self, seat: int, length: int) -> None:
        """The source drops its rows itself."""


class PathScores:
    """What the slow growths ask of a model, answered by a source: the scores after a context and a path.

    The nodes are kept in the order in which they are asked for: each new one has the lowest weight so far.
    """

    def __init__(self, source: ScoringSource, sequence: TokenSequence) -> None:
        self.cache = _NoCache()
        self._source = source
        self._context = tuple(sequence.tokens)
        scores, _ = source.begin([sequence], None)
        self._scores: dict[tuple[int, ...], Tensor] = {(): scores}
        self._nodes: dict[tuple[int, ...], int] = {(): ROOT}
        self._paths = Paths.empty()

    def append(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = len(self._context)
        return [tuple(tokens[size:] if tuple(tokens[:size]) == self._context else tokens)]

    def logits(self, asked: Sequence[tuple[int, ...]]) -> Tensor:
        (path,) = asked
        if path not in self._scores:
            self.logits([path[:-1]])  # a node needs its parent's row
            node, parent = len(self._paths), self._nodes[path[:-1]]
            weight = torch.tensor([[float(-(node + 1) + (0 if parent == ROOT else parent + 1))]], dtype=torch.float64)
            trees, token = torch.zeros(1, dtype=torch.int64), torch.tensor([[path[-1]]])
            self._paths = self._paths.with_children(trees, torch.tensor([parent]), weight, token, 1 << 20)
            self._nodes[path] = node
            self._scores[path] = self._source.expand(self._paths, torch.tensor([node]), None)
        return self._scores[path]


class SourceGrowth:
    """A drafter with another growth over a source; one sequence.

    Args:
        source: source that scores nodes, with rows for all that the growth asks for.
        growth: class of the growth.
    """

    def __init__(self, source: ScoringSource, growth: type[SpecExecDrafter]) -> None:
        self.models: Sequence[TreeModel] = source.models
        self.work: Sequence[SourceWork] = ()
        self.wants_states, self.taps = source.wants_states, source.taps
        self._source = source
        self._growth = growth
        self._grown = False

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        (sequence,) = sequences
        most = self._source.max_depth(sequence)
        self._grown = most > 0
        tree = TokenTree()
        if self._grown:
            scores = PathScores(self._source, sequence)
            tree = self._growth(scores)._grow(sequence.tokens, policy.tree_budget, most)  # type: ignore[arg-type]
            self._source.end()
        self._source.catch_up(cancel)
        return [tree]

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        pass

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        return self._source.commit(seat, [], []) if self._grown else ()

    def receive(self, seat: int, states: FinalStates) -> None:
        self._source.receive(seat, states)

    def without_scores(self) -> None:
        raise AssertionError("the demo's head agrees with its target")

    def reset(self) -> None:
        self._source.reset()

    def close(self) -> None:
        self._source.close()
