"""One growth of the trees of a pass: the best-first loop, and the children that all sources know."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specchat.engine.drafting.draft_model import runs
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.policy import DraftPolicy, Roots
from specchat.engine.drafting.proposers import Child, Proposers
from specchat.engine.drafting.sources import TAIL, ScoringSource, Temperatures
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import ROOT, last_tokens
from specchat.models.quant.autotune import autotuner
from specchat.records.limits import draft_width

# Proposals above this log weight are expanded together with their parents.
_LIKELY = math.log(0.5)


@dataclass(frozen=True)
class Sources:
    """What a growth asks for children.

    Attributes:
        scorer: source that scores all tokens after a node; None if there is no draft model.
        proposers: sources that propose tokens without scores.
        branch: most children that the scorer adds below a node.
        shared_noise: whether to rank paths with the sampler's noise.
    """

    scorer: ScoringSource | None
    proposers: Proposers
    branch: int
    shared_noise: bool

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree below the sequence's last token."""
        return sequence.max_depth if self.scorer is None else self.scorer.max_depth(sequence)

    def serving(self, sequences: Sequence[TokenSequence]) -> tuple[Sources, list[TokenSequence]]:
        """Return the sources of the next trees, and the sequences that they serve.

        A head serves no sequence whose prompt is still to be read. If there are no others, the sources without scores
        serve all of them.
        """
        if self.scorer is None and not self.proposers.sources:
            return self, []
        served = [sequence for sequence in sequences if self.max_depth(sequence) > 0]
        return (self, served) if served or self.scorer is None else replace(self, scorer=None).serving(sequences)


@dataclass(frozen=True)
class PassBegin:
    """The begin of a draft pass: the time, and how many kinds of matmuls were measured before.

    A pass that measures kernels says nothing about the passes after it, so its time is not recorded.
    """

    at: float = field(default_factory=time.perf_counter)
    measured: int = field(default_factory=lambda: autotuner().num_measured)

    @property
    def is_typical(self) -> bool:
        """Whether no kernel was measured since the begin."""
        return self.measured == autotuner().num_measured


class Growth:
    """Growing trees for some sequences.

    Without a scoring source, the proposing sources extend the trees as far as their proposals are worth a node. A
    scoring source expands the best open nodes pass by pass, until no child could enter a tree. Where the text copies, a
    node and its likely proposed descendants are expanded in one pass; the scores replace the guessed weights of
    proposals. In the end, proposals extend nodes whose expansion would not have been worth a pass.

    Args:
        sources: sources to ask.
        sequences: sequences whose trees may have nodes.
        policy: sizes of the trees.
        roots: the target's pass without nodes.
        cancel: event that stops drafting.

    Attributes:
        asked_roots: number of the record of proposals for each sequence's last token.
        passes: number of passes of the scoring source.
    """

    def __init__(
        self,
        sources: Sources,
        sequences: Sequence[TokenSequence],
        policy: DraftPolicy,
        roots: Roots,
        cancel: threading.Event | None,
    ) -> None:
        self.asked_roots: list[int] = []
        self.passes = 0
        self._sources = sources
        self._sequences = sequences
        self._policy = policy
        self._roots = roots
        self._cancel = cancel
        self._budget = policy.tree_budget
        # A proposal's guessed weight may be too high, so the paths that it displaces are not dropped at once.
        self._most_paths = (2 if sources.proposers.sources else 1) * self._budget
        self._max_depths = torch.tensor([sources.max_depth(sequence) for sequence in sequences])

    def run(self) -> Paths:
        """Grow the trees and return the paths that the target verifies."""
        sources = self._sources
        if sources.proposers.sources:
            self.asked_roots = [
                sources.proposers.ask(each, each.tokens[-TAIL:], self._luck(each, 0)) for each in self._sequences
            ]
        paths = self._first_children(Paths.empty())
        if sources.scorer is not None:
            paths = self._expanded(paths, sources.scorer)
        paths = self._extended(paths).first(self._budget)
        return paths.first(self._policy.num_to_verify(paths.score.tolist(), self._roots))

    def _expanded(self, paths: Paths, scorer: ScoringSource) -> Paths:
        """Expand nodes until another pass cannot change the trees or would not save time."""
        while True:
            begin = PassBegin()
            paths = self._with_likely_chains(paths, scorer)
            nodes = self._nodes_to_expand(paths, scorer)
            if not len(nodes):
                return paths
            logits = scorer.expand(paths, nodes, self._cancel)
            paths = self._scored(paths, scorer, paths.tree[nodes], nodes, logits)
            if not scorer.knows_all_levels:
                self._count_pass(len(nodes), begin)

    def _count_pass(self, rows: int, begin: PassBegin) -> None:
        self.passes += 1
        if begin.is_typical:
            self._policy.record_draft_pass(rows, time.perf_counter() - begin.at)

    def _first_children(self, paths: Paths) -> Paths:
        scorer = self._sources.scorer
        if scorer is None:
            return self._with_proposed(paths, [ROOT] * len(self._sequences), self.asked_roots)
        begin = PassBegin()
        logits, rows = scorer.begin(self._sequences, self._cancel)
        num_trees = len(self._sequences)
        paths = self._scored(paths, scorer, torch.arange(num_trees), torch.full((num_trees,), ROOT), logits)
        self._count_pass(rows, begin)
        return paths

    def _nodes_to_expand(self, paths: Paths, scorer: ScoringSource) -> Tensor:
        """Return the nodes of the next pass, sorted by tree; none ends the growth."""
        nodes = self._open(paths, scorer)
        if not scorer.knows_all_levels:
            nodes = nodes[: self._policy.num_to_expand(nodes.tolist(), paths.score[nodes].tolist(), self._roots)]
        return nodes[paths.tree[nodes].argsort(stable=True)] if len(self._sequences) > 1 else nodes

    def _open(self, paths: Paths, scorer: ScoringSource) -> Tensor:
        """Return the best open nodes that one pass has room for."""
        width = min(draft_width(self._budget, len(self._sequences)), scorer.num_free_rows)
        return paths.frontier(width, self._budget, self._max_depths)

    # --- proposals ---------------------------------------------------------------------------------------------------

    def _extended(self, paths: Paths) -> Paths:
        """Ask the proposing sources about all nodes that may have children, and add what they propose."""
        if not self._sources.proposers.sources:
            return paths
        # Beside scores, unlikely guesses displace better nodes: the own copy of a small model lost 2% on prose.
        least = -math.inf if self._sources.scorer is None else _LIKELY
        while nodes := paths.unasked(self._budget, self._max_depths):
            paths = self._with_proposed(paths, nodes, self._ask(paths, nodes), least)
        return paths

    def _with_likely_chains(self, paths: Paths, scorer: ScoringSource) -> Paths:
        """Ask the proposing sources about the nodes of the next pass; add proposals that are likelier than not."""
        if not self._sources.proposers.sources:
            return paths
        while nodes := [node for node in self._open(paths, scorer).tolist() if paths.asked[node] < 0]:
            asked = self._ask(paths, nodes)
            if scorer.expands_chains:
                paths = self._with_proposed(paths, nodes, asked, least=_LIKELY)
        return paths

    def _ask(self, paths: Paths, nodes: Sequence[int]) -> list[int]:
        """Ask the proposing sources about nodes, and return the numbers of the records."""
        depths = paths.depth[nodes].tolist()
        asked = [
            self._sources.proposers.ask(sequence, tail, self._luck(sequence, depth))
            for (sequence, tail), depth in zip(self._tails(paths, nodes), depths, strict=True)
        ]
        paths.asked[nodes] = torch.tensor(asked)
        return asked

    def _with_proposed(
        self, paths: Paths, nodes: Sequence[int], numbers: Sequence[int], least: float = -math.inf
    ) -> Paths:
        """Add the proposed children of nodes that no draft has scored.

        Args:
            paths: paths so far.
            nodes: indices of the nodes; ROOT once for each tree.
            numbers: numbers of the nodes' records of proposals.
            least: log weight below its parent that a child must exceed.
        """
        parents, trees, children = list[int](), list[int](), list[Child]()
        above, trees_of, depths = paths.score.tolist(), paths.tree.tolist(), paths.depth.tolist()
        worst = above[self._budget - 1] if len(paths) >= self._budget else -math.inf
        for place, (node, number) in enumerate(zip(nodes, numbers, strict=True)):
            tree, depth, score = (place, 0, 0.0) if node == ROOT else (trees_of[node], depths[node], above[node])
            found = [
                child
                for child in self._alone(number, tree, depth)
                if child.weight > least and score + child.weight > worst
            ]
            parents += [node] * len(found)
            trees += [tree] * len(found)
            children += found
        if not children:
            return paths
        return paths.with_children(
            torch.tensor(trees),
            torch.tensor(parents),
            torch.tensor([[child.weight] for child in children], dtype=torch.float64),
            torch.tensor([[child.token] for child in children]),
            self._most_paths,
            torch.tensor([[child.source] for child in children]),
        )

    def _alone(self, number: int, tree: int, depth: int) -> list[Child]:
        return self._sources.proposers.alone(number, self._luck(self._sequences[tree], depth))

    def _luck(self, sequence: TokenSequence, depth: int) -> Tensor | None:
        """Return the sampler's noise below a node of some depth [V]; None without noise, or if it is not shared."""
        noise = sequence.sampler.noise if self._sources.shared_noise else None
        return None if noise is None else noise.row(len(sequence.tokens) + depth)

    def _tails(self, paths: Paths, nodes: Sequence[int]) -> list[tuple[TokenSequence, list[int]]]:
        """Return the sequence of each node, and the last tokens up to the node."""
        tokens, parents, trees = paths.token.tolist(), paths.parent.tolist(), paths.tree.tolist()
        sequences = [self._sequences[trees[node]] for node in nodes]
        return [
            (sequence, last_tokens(sequence.tokens, tokens, parents, node, TAIL))
            for sequence, node in zip(sequences, nodes, strict=True)
        ]

    # --- scores ------------------------------------------------------------------------------------------------------

    def _scored(self, paths: Paths, scorer: ScoringSource, trees: Tensor, parents: Tensor, logits: Tensor) -> Paths:
        """Return `paths` with the best children of expanded nodes.

        Args:
            paths: paths so far.
            scorer: source of the scores.
            trees: trees of the expanded nodes [n], ascending.
            parents: indices of the expanded nodes [n], or ROOT.
            logits: scores after the expanded nodes, [n, V].
        """
        depths = torch.where(parents == ROOT, 0, paths.depth[parents.clamp(min=0)]) if len(paths) else parents + 1
        found, proposed = [], dict[tuple[int, int], Child]()
        for tree, rows in runs(trees):
            sequence = self._sequences[tree]
            positions = [len(sequence.tokens) + int(depth) for depth in depths[rows]]
            own = logits[rows, : sequence.sampler.vocab_size]  # padded vocabularies may differ in size
            weights = path_weights(own, sequence.sampler, scorer.temperatures, self._noise(sequence, positions))
            if self._sources.proposers.sources:
                numbers = self._numbers(paths, tree, parents[rows])
                merged = self._sources.proposers.beside(numbers, weights)
                proposed.update({(rows.start + row, token): child for (row, token), child in merged.items()})
            found.append(weights.topk(min(self._sources.branch, self._budget, weights.shape[-1]), dim=-1))
        best = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        # One copy to the host, because each one waits for a GPU; a double holds every token id.
        scores, numbers = torch.stack([each.double() for each in best]).cpu()
        tokens = numbers.long()
        if scores[:, 0].isnan().any():  # softmax makes NaN of infinite scores, too, and topk puts NaN first
            raise ScoresNotFiniteError
        if not proposed:
            return paths.with_children(trees, parents, scores, tokens, self._most_paths)
        return self._merged(paths, trees, parents, scores, tokens, proposed)

    def _numbers(self, paths: Paths, tree: int, parents: Tensor) -> list[int]:
        """Return the numbers of the records of proposals below expanded nodes of a tree."""
        asked: list[int] = paths.asked.tolist()
        return [self.asked_roots[tree] if node == ROOT else asked[node] for node in parents.tolist()]

    def _merged(
        self,
        paths: Paths,
        trees: Tensor,
        parents: Tensor,
        scores: Tensor,
        tokens: Tensor,
        proposed: dict[tuple[int, int], Child],
    ) -> Paths:
        """Add scored children, one for each token below a parent; children that exist already get a new weight."""
        exists, edges = self._existing(paths, parents, proposed)
        sources = torch.zeros_like(tokens)
        rows, branch = tokens.tolist(), tokens.shape[1]
        dropped, labels = list[int](), dict[int, int]()
        for (row, token), child in proposed.items():
            if token not in rows[row]:
                continue
            place = row * branch + rows[row].index(token)
            if (row, token) in exists:
                dropped.append(place)
            elif child.source:
                labels[place] = child.source
        scores.view(-1)[dropped] = -torch.inf
        sources.view(-1)[list(labels)] = torch.tensor(list(labels.values()), dtype=torch.int64)
        reweighted = paths.reweighted(edges) if edges else paths
        return reweighted.with_children(trees, parents, scores, tokens, self._most_paths, sources)

    def _existing(
        self, paths: Paths, parents: Tensor, proposed: dict[tuple[int, int], Child]
    ) -> tuple[set[tuple[int, int]], dict[int, float]]:
        """Return the children that exist, as (row, token), and their new weights by node."""
        row_of = {node: row for row, node in enumerate(parents.tolist())}
        exists, edges = set[tuple[int, int]](), dict[int, float]()
        for node, (parent, token) in enumerate(zip(paths.parent.tolist(), paths.token.tolist(), strict=True)):
            if parent == ROOT or parent not in row_of:
                continue
            row = row_of[parent]
            if (child := proposed.get((row, token))) is not None:
                exists.add((row, token))
                edges[node] = child.weight
        return exists, edges

    def _noise(self, sequence: TokenSequence, positions: Sequence[int]) -> Tensor | None:
        """Return the sampler's noise at positions [n, V]; None without noise, or if it is not shared."""
        noise = sequence.sampler.noise
        if noise is None or not self._sources.shared_noise:
            return None
        return torch.stack([noise.row(position) for position in positions])


def path_weights(logits: Tensor, sampler: Sampler, temperatures: Temperatures, noise: Tensor | None) -> Tensor:
    """Return log weights [n, V]: the draft's estimate of how likely the target accepts each token.

    Args:
        logits: the draft's scores [n, V].
        sampler: sampler of the sequence.
        temperatures: temperatures of the draft.
        noise: the sampler's noise [n, >= V]; None if the answer is greedy or the noise is not shared.
    """
    if sampler.noise is None:
        return torch.log_softmax(logits / temperatures.greedy, dim=-1)
    scores = logits / sampler.sampling.temperature
    if noise is None:
        return torch.log_softmax(scores, dim=-1)
    return torch.log_softmax((scores + noise[:, : scores.shape[-1]]) / temperatures.noise, dim=-1)
