"""Drafters, which grow the draft trees of a pass.

Best-first search as in SpecExec (arXiv 2406.02532, algorithm 1): the tree holds the `budget` likeliest paths. The best
unexpanded nodes are expanded in wide batches until no child could enter the tree. Two things differ from SpecExec. The
tree does not grow level by level, so likely continuations go deep and unlikely ones stay shallow. And when the target
samples, paths are ranked by the target's own race. The target's noise is added to the draft's scores, so a path's
weight is its likelihood of being drawn with this noise, not its likelihood in general.

A drafter asks several sources for the children of nodes: a draft model, which scores all tokens, and sources that
propose tokens without a pass. Their children share one tree, one node for each token below a parent, ranked by weights
that are learned for each source.

The trees of all sequences grow together: one draft pass reads the new tokens of all, then each round expands the best
open nodes of all trees in one pass. The best `budget` paths of all trees are kept, whichever trees they are in. With
ten sequences this brings 3 to 13% more tokens than equal shares (demo pair, 40 to 320 nodes).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

from torch import Tensor

from specchat.engine.drafting.device_growth import DeviceGrowth
from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.few_threads import are_tiny, one_thread
from specchat.engine.drafting.growth import Growth, Sources
from specchat.engine.drafting.pass_times import FadingRatio
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.policy import DraftPolicy, Roots
from specchat.engine.drafting.proposers import Proposers
from specchat.engine.drafting.recycling import Recycling
from specchat.engine.drafting.retrieval import Retrieval
from specchat.engine.drafting.sources import ProposingSource, ScoringSource
from specchat.engine.kv_cache import Kept
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import SourceWork
from specchat.records.limits import DRAFT_BRANCH, draft_width

# Seconds by which a pass takes longer where sources are asked between passes, so that a tree cannot grow on the device:
# the host waits for the scores, chooses nodes and lays out their rows (1.0 to 1.6 ms, 64 nodes, one core).
_HOST_PASS_S = 1.5e-3
# The next tree takes about as many passes as the last few ones: older ones fade by this factor.
_KEEP_PASSES = 0.8


class Drafter(Protocol):
    """Drafts trees for the target; wrong guesses cost speed but never change the text.

    A drafter knows sequences by their seats. A seat may hold another sequence at any call of `grow`, whose tokens tell
    what of the earlier work still counts.
    """

    @property
    def models(self) -> Sequence[TreeModel]:
        """Models that the drafter holds in memory."""

    @property
    def work(self) -> Sequence[SourceWork]:
        """Work of each source in the last call of `grow`."""

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        """Return a tree below the last token of each sequence, of at most `max_depth` levels.

        Args:
            sequences: sequences of the target's next pass, in different seats.
            policy: sizes of the trees; its budget counts the nodes of all trees together.
            cancel: event that stops drafting.

        Raises:
            ScoresNotFiniteError: the draft computes NaN or infinity, so its guesses mean nothing.
        """

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Take scores that the target computed.

        Args:
            tails: last tokens up to each scored row, of which the last one is the row's own.
            scores: the target's scores of each row, float32 [n, V].
        """

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Commit the nodes of a seat's last tree that the target accepted.

        Args:
            seat: seat of the sequence.
            path: accepted nodes, root to leaf.
            tokens: tokens that the target drew: those of the path, and the one after it.

        Returns:
            Rows that stay in the drafter's caches, which the caller keeps before the next tree.
        """

    @property
    def wants_states(self) -> bool:
        """Whether the drafter reads the target's hidden states of committed rows."""

    @property
    def taps(self) -> LayerTaps | None:
        """What the drafter reads of the target's layers in every pass; None if it reads the last states or none."""

    def receive(self, seat: int, states: FinalStates) -> None:
        """Take the target's states of a seat's rows that became final, after `commit`; only if `wants_states`."""

    def without_scores(self) -> None:
        """Give up the source that scores nodes, because its scores are of no use; other sources go on."""

    def reset(self) -> None:
        """Drop all cached context of all seats."""

    def close(self) -> None:
        """Release memory and threads."""


class NoDrafter:
    """Drafter for plain decoding: empty trees, one token per pass."""

    models: Sequence[TreeModel] = ()
    work: Sequence[SourceWork] = ()
    wants_states = False
    taps: LayerTaps | None = None

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        """Return empty trees."""
        return [TokenTree() for _ in sequences]

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Do nothing: no source learns."""

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Return nothing: nothing was drafted."""
        return ()

    def receive(self, seat: int, states: FinalStates) -> None:
        """Do nothing: nothing is drafted."""

    def without_scores(self) -> None:
        """Do nothing: nothing scores."""

    def reset(self) -> None:
        """Do nothing: nothing is cached."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


@dataclass(frozen=True)
class _Grown:
    """A finished tree.

    Attributes:
        tree: nodes that the target verifies.
        rows: row of each node among the tree's rows in the draft's cache, -1 for nodes that were not expanded.
        asked: number of the record of proposals below the root, then below each node; -1 where nothing was asked.
    """

    tree: TokenTree
    rows: list[int]
    asked: list[int]


class TreeDrafter:
    """Grows trees from several sources.

    Args:
        scorer: source that scores all tokens after a node; None to draft without a model.
        proposers: sources that propose tokens in no time.
        branch: number of children considered per node.
        shared_noise: whether to rank paths with the sampler's noise; False only to measure the gain of shared noise.
    """

    def __init__(
        self,
        scorer: ScoringSource | None,
        proposers: Sequence[ProposingSource] = (),
        *,
        branch: int = DRAFT_BRANCH,
        shared_noise: bool = True,
    ) -> None:
        self.models: Sequence[TreeModel] = () if scorer is None else scorer.models
        self.work: Sequence[SourceWork] = ()
        self._scorer = scorer
        scorers = [] if scorer is None else [scorer.name]
        share = 1.0 if scorer is None else scorer.proposal_share
        self._proposers = Proposers(proposers, first=len(scorers), share=share)
        self._sources = Sources(scorer, self._proposers, branch, shared_noise)
        self._names = (*scorers, *(source.name for source in proposers))
        self._is_tiny = are_tiny(self.models)
        self._grown: dict[int, _Grown] = {}  # last tree by seat
        self._useful_passes = FadingRatio(keep=_KEEP_PASSES)  # of trees that grow on a device
        self._held_up_s = 0.0  # by which the last trees took longer than on the device

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        """Draft trees of the best paths; stop when another draft pass cannot change them or would not save time."""
        self._grown, self.work = {}, ()
        sources, growing = self._sources.serving(sequences)
        if growing and policy.should_draft():
            roots = Roots(len(sequences), sum(len(sequence.pending) for sequence in sequences))
            self._grow(sources, growing, policy, roots, cancel)
        if self._sources.scorer is not None:
            self._sources.scorer.catch_up(cancel)
        nothing = _Grown(TokenTree(), [], [])
        return [self._grown.get(sequence.seat, nothing).tree for sequence in sequences]

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Hand the target's scores to the sources that learn from them."""
        for source in self._proposers.sources:
            source.observe(tails, scores)

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Hand the accepted nodes to the scoring source, and learn which proposals came true."""
        grown = self._grown.pop(seat, None)
        if grown is None:
            return ()
        kept: Sequence[Kept] = ()
        if self._sources.scorer is not None:
            known = [node for node in path if grown.rows[node] >= 0]
            kept = self._sources.scorer.commit(
                seat, [grown.rows[node] for node in known], [grown.tree.tokens[node] for node in known]
            )
        for node in path:
            self._proposers.count_accepted(self._names.index(grown.tree.sources[node]))
        for node, token in zip((ROOT, *path), tokens, strict=False):  # a broken walk draws no last token
            if grown.asked[node + 1] >= 0:
                self._proposers.learn(grown.asked[node + 1], token)
        return kept

    @property
    def wants_states(self) -> bool:
        """Whether the scoring source reads the target's states."""
        return self._sources.scorer is not None and self._sources.scorer.wants_states

    @property
    def taps(self) -> LayerTaps | None:
        """What the scoring source reads of the target's layers."""
        return None if self._sources.scorer is None else self._sources.scorer.taps

    def receive(self, seat: int, states: FinalStates) -> None:
        """Hand the target's states to the scoring source."""
        if self._sources.scorer is not None:
            self._sources.scorer.receive(seat, states)

    def without_scores(self) -> None:
        """Draft with the proposing sources alone from now on; the scoring source keeps its memory, but no text."""
        if self._scorer is not None:
            self._scorer.reset()
        self._sources = replace(self._sources, scorer=None)

    def reset(self) -> None:
        """Empty the draft's cache, and forget all texts."""
        if self._scorer is not None:
            self._scorer.reset()
        self._proposers.reset()
        self._grown = {}

    def close(self) -> None:
        """Close the draft model."""
        if self._scorer is not None:
            self._scorer.close()

    def _grow(
        self,
        sources: Sources,
        sequences: Sequence[TokenSequence],
        policy: DraftPolicy,
        roots: Roots,
        cancel: threading.Event | None,
    ) -> None:
        """Grow a tree for each sequence, together.

        Args:
            sources: sources of the trees.
            sequences: sequences whose trees may have nodes.
            policy: sizes of the trees.
            roots: the target's pass without nodes.
            cancel: event that stops drafting.
        """
        begin = time.perf_counter()
        growth = self._growth(sources, sequences, policy, roots, cancel)
        try:
            with one_thread() if self._is_tiny else nullcontext():
                paths = growth.run()
        finally:
            if sources.scorer is not None:
                sources.scorer.end()
        asked_roots = [-1] * len(sequences)
        if isinstance(growth, DeviceGrowth):
            self._useful_passes.add(growth.useful_passes, 1)
        else:
            asked_roots = growth.asked_roots or asked_roots
            if grows_on_device(sources.scorer, sequences):
                self._held_up_s = _HOST_PASS_S * growth.passes
        for tree, sequence in enumerate(sequences):
            of_tree = paths.of_tree(tree) if len(sequences) > 1 else paths
            self._grown[sequence.seat] = self._finished(of_tree, asked_roots[tree])
        self.work = self._proposers.work
        if sources.scorer is not None:
            seconds = time.perf_counter() - begin - sum(each.draft_s for each in self.work)
            self.work = (SourceWork(sources.scorer.name, seconds, growth.passes), *self.work)

    def _growth(
        self,
        sources: Sources,
        sequences: Sequence[TokenSequence],
        policy: DraftPolicy,
        roots: Roots,
        cancel: threading.Event | None,
    ) -> Growth | DeviceGrowth:
        """Return the growth of trees: on the device where nothing needs the host between passes; see `_grow`."""
        scorer, proposers = sources.scorer, sources.proposers
        proposers.begin(sequences, policy.tokens_per_s, alone=scorer is None, held_up_s=self._held_up_s)
        self._held_up_s = 0.0
        if proposers.are_asked or not grows_on_device(scorer, sequences):
            return Growth(sources, sequences, policy, roots, cancel)
        return DeviceGrowth(
            scorer,
            sequences[0],
            policy,
            roots,
            branch=sources.branch,
            shared_noise=sources.shared_noise,
            num_passes=math.ceil(self._useful_passes.value(policy.tree_budget / draft_width(policy.tree_budget))),
            cancel=cancel,
        )

    def _finished(self, paths: Paths, asked_root: int) -> _Grown:
        """Return the tree of paths that all are in one tree."""
        columns = (paths.token, paths.parent, paths.source, paths.score)
        tokens, parents, sources, weights = (column.tolist() for column in columns)
        names = tuple(self._names[source] for source in sources)
        tree = TokenTree(tuple(tokens), tuple(parents), names, tuple(weights))
        return _Grown(tree, paths.row.tolist(), [asked_root, *paths.asked.tolist()])


class ModelDrafter(TreeDrafter):
    """Grows trees with a small model that has its own KV cache.

    Args:
        model: draft model, with as many seats as the target.
        max_rows: rows that growing trees may take in the draft's cache, including nodes that later drop out.
        max_context: longest context that the draft's positions support; no trees are drafted beyond it.
        proposers: sources that propose tokens beside the model.
        branch: number of children considered per node.
        shared_noise: whether to rank paths with the sampler's noise; False only to measure the gain of shared noise.
    """

    def __init__(
        self,
        model: TreeModel,
        *,
        max_rows: int,
        max_context: int,
        proposers: Sequence[ProposingSource] = (),
        branch: int = DRAFT_BRANCH,
        shared_noise: bool = True,
    ) -> None:
        scorer = DraftModel(model, max_rows=max_rows, max_context=max_context)
        super().__init__(scorer, proposers, branch=branch, shared_noise=shared_noise)


def grows_on_device(scorer: ScoringSource | None, sequences: Sequence[TokenSequence]) -> TypeGuard[DraftModel]:
    """Return whether a source's trees can grow on its device: the tree of one sequence, by a draft model on a GPU."""
    return isinstance(scorer, DraftModel) and scorer.grows_on_device and len(sequences) == 1


def free_sources(seats: int) -> list[ProposingSource]:
    """Return the sources that need no model: repeats of the text, and the target's own earlier scores."""
    return [Retrieval(seats), Recycling()]
