"""Drafters, which grow the draft trees of a pass.

Best-first search as in SpecExec (arXiv 2406.02532, algorithm 1): the tree holds the `budget` likeliest paths. The best
unexpanded nodes are expanded in wide batches until no child could enter the tree. Two things differ from SpecExec. The
tree does not grow level by level, so likely continuations go deep and unlikely ones stay shallow. And when the target
samples, paths are ranked by the target's own race. The target's noise is added to the draft's scores, so a path's
weight is its likelihood of being drawn with this noise, not its likelihood in general.

The trees of all sequences grow together: one draft pass reads the new tokens of all, then each round expands the best
open nodes of all trees in one pass. The best `budget` paths of all trees are kept, whichever trees they are in. With
ten sequences this brings 3 to 13% more tokens than equal shares (demo pair, 40 to 320 nodes).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from specchat.engine.drafting.paths import Paths, TreeRows
from specchat.engine.drafting.policy import DraftPolicy, Roots
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import ROOT, TokenTree, common_prefix
from specchat.records.limits import DRAFT_BRANCH, draft_width

# Temperature of the softmax that turns the draft's scores into path weights. The draft's own softmax estimates how
# likely a token is in general. A path weight must estimate how likely the target accepts the token. The target's choice
# is more certain than the draft's softmax, so temperatures below 1 rank paths better.
# Tokens per step by temperature, measured on the demo pair (budget 64, 90 held-out chats that no test uses):
# greedy: 4.24 at 1.0, 5.1 at 0.6, 5.67 at 0.5, 5.40 at 0.35;
# sampling at t=0.7: 4.72 at 1.0, 5.07 at 0.85, 5.11 at 0.7, 5.0 at 0.55.
NOISE_TEMPERATURE = 0.7
GREEDY_TEMPERATURE = 0.5

# Rows that a prompt has at least. Within a text, a step hands fewer rows to the draft, and recurrent layers can return
# to the state before them. So restore points are saved before prompts only.
_PROMPT_ROWS = 16

# Name of the model drafter in `TokenTree.sources`.
SOURCE = "model"


class Drafter(Protocol):
    """Drafts trees for the target; wrong guesses cost speed but never change the text.

    A drafter knows sequences by their seats. A seat may hold another sequence at any call of `grow`, whose tokens tell
    what of the earlier work still counts.
    """

    @property
    def models(self) -> Sequence[TreeModel]:
        """Models that the drafter holds in memory."""

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

    def commit(self, seat: int, path: Sequence[int]) -> None:
        """Commit the nodes of a seat's last tree that the target accepted, root to leaf."""

    def reset(self) -> None:
        """Drop all cached context of all seats."""

    def close(self) -> None:
        """Release memory and threads."""


class NoDrafter:
    """Drafter for plain decoding: empty trees, one token per pass."""

    models: Sequence[TreeModel] = ()

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        """Return empty trees."""
        return [TokenTree() for _ in sequences]

    def commit(self, seat: int, path: Sequence[int]) -> None:
        """Do nothing: nothing was drafted."""

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
    """

    tree: TokenTree
    rows: list[int]


class ModelDrafter:
    """Grows trees with a small model that has its own KV cache.

    Args:
        model: draft model, with as many seats as the target.
        branch: number of children considered per node.
        max_rows: rows that growing trees may take in the draft's cache, including nodes that later drop out.
        max_context: longest context that the draft's positions support; no trees are drafted beyond it.
        shared_noise: whether to rank paths with the sampler's noise; False only to measure the gain of shared noise.
    """

    def __init__(
        self,
        model: TreeModel,
        *,
        max_rows: int,
        max_context: int,
        branch: int = DRAFT_BRANCH,
        shared_noise: bool = True,
    ) -> None:
        self.models: Sequence[TreeModel] = (model,)
        self._model = model
        self._branch = branch
        self._max_rows = max_rows
        self._max_context = max_context
        self._shared_noise = shared_noise
        # For each seat, the tokens whose rows are in the draft's cache.
        self._held: list[list[int]] = [[] for _ in range(model.cache.seats)]
        self._grown: dict[int, _Grown] = {}  # last tree by seat

    def grow(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> list[TokenTree]:
        """Draft trees of the best paths; stop when another draft pass cannot change them or would not save time."""
        self._grown = {}
        growing = [sequence for sequence in sequences if self._max_depth(sequence) > 0]
        if growing and policy.should_draft():
            roots = Roots(len(sequences), sum(len(sequence.pending) for sequence in sequences))
            self._grow(growing, policy, roots, cancel)
        nothing = _Grown(TokenTree(), [])
        return [self._grown.get(sequence.seat, nothing).tree for sequence in sequences]

    def commit(self, seat: int, path: Sequence[int]) -> None:
        """Keep the rows of accepted nodes that were expanded; other accepted nodes are computed by the next `grow`."""
        grown = self._grown.pop(seat, None)
        if grown is None:
            return
        known = [node for node in path if grown.rows[node] >= 0]
        prefix = len(self._held[seat])
        self._model.cache.keep(seat, prefix, [prefix + grown.rows[node] for node in known])
        self._held[seat] += [grown.tree.tokens[node] for node in known]

    def reset(self) -> None:
        """Empty the draft's cache."""
        for seat, held in enumerate(self._held):
            self._model.cache.truncate(seat, 0)
            held.clear()
        self._grown = {}

    def close(self) -> None:
        """Close the draft model."""
        self._model.close()

    def _max_depth(self, sequence: TokenSequence) -> int:
        return min(sequence.max_depth, self._max_context - len(sequence.tokens))

    def _grow(
        self,
        sequences: Sequence[TokenSequence],
        policy: DraftPolicy,
        roots: Roots,
        cancel: threading.Event | None,
    ) -> None:
        """Grow a tree for each sequence, in joint passes.

        Args:
            sequences: sequences whose trees may have nodes.
            policy: sizes of the trees.
            roots: the target's pass without nodes.
            cancel: event that stops drafting.
        """
        budget, width = policy.tree_budget, draft_width(policy.tree_budget, len(sequences))
        max_depths = torch.tensor([self._max_depth(sequence) for sequence in sequences])
        rows = [TreeRows(self._max_rows, len(each.tokens), self._model.device) for each in sequences]
        parents = torch.full((len(sequences),), ROOT)
        root_logits = self._catch_up(sequences, policy, cancel)
        paths = self._children(Paths.empty(), torch.arange(len(sequences)), parents, root_logits, sequences, budget)
        while True:
            begin = time.perf_counter()
            free = self._max_rows - sum(each.num_rows for each in rows)
            nodes = paths.frontier(min(width, free), budget, max_depths)
            nodes = nodes[: policy.num_to_expand(nodes.tolist(), paths.score[nodes].tolist(), roots)]
            if not len(nodes):
                break
            if len(sequences) > 1:
                nodes = nodes[paths.tree[nodes].argsort(stable=True)]
            logits = self._expand(paths, nodes, sequences, rows, cancel)
            paths = self._children(paths, paths.tree[nodes], nodes, logits, sequences, budget)
            policy.record_draft_pass(len(nodes), time.perf_counter() - begin)
        paths = paths.first(policy.num_to_verify(paths.score.tolist(), roots))
        for tree, sequence in enumerate(sequences):
            self._grown[sequence.seat] = _finished(paths.of_tree(tree) if len(sequences) > 1 else paths)

    def _catch_up(
        self, sequences: Sequence[TokenSequence], policy: DraftPolicy, cancel: threading.Event | None
    ) -> Tensor:
        """Compute the tokens that are not cached, and return the scores after each sequence's last token, [n, V]."""
        begin = time.perf_counter()
        tokens, parts, last = list[int](), list[tuple[int, RowLayout]](), list[int]()
        for sequence in sequences:
            held = self._held[sequence.seat]
            shared = min(common_prefix(held, sequence.tokens), len(sequence.tokens) - 1)
            if shared == len(held) and len(sequence.tokens) - shared > _PROMPT_ROWS:
                self._model.cache.save(sequence.seat)
            shared = self._model.cache.truncate(sequence.seat, shared)
            del held[shared:]
            new = sequence.tokens[shared:]
            parts.append((sequence.seat, linear_layout(shared, len(new), self._model.device)))
            tokens += self._known(new)
            last.append(len(tokens) - 1)
        hidden = self._model.forward(tokens, PassLayout(parts), cancel)
        for sequence in sequences:
            self._held[sequence.seat] = list(sequence.tokens)
        logits = self._model.logits(hidden[last])
        policy.record_draft_pass(len(tokens), time.perf_counter() - begin)
        return logits

    def _expand(
        self,
        paths: Paths,
        nodes: Tensor,
        sequences: Sequence[TokenSequence],
        rows: Sequence[TreeRows],
        cancel: threading.Event | None,
    ) -> Tensor:
        """Compute nodes, which are sorted by tree, and return the scores after them, [n, V]."""
        parents = paths.parent[nodes]
        parent_rows = torch.where(parents == ROOT, ROOT, paths.row[parents.clamp(min=0)])
        parts = []
        for tree, of_tree in _runs(paths.tree[nodes]):
            own = nodes[of_tree]
            paths.row[own] = rows[tree].add(parent_rows[of_tree], paths.depth[own])
            parts.append((sequences[tree].seat, rows[tree].layout(len(own))))
        hidden = self._model.forward(paths.token[nodes].tolist(), PassLayout(parts), cancel)
        return self._model.logits(hidden)

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Clamp token ids to the draft's vocabulary; the target may have further ids without meaning to the draft."""
        return [min(token_id, self._model.vocab_size - 1) for token_id in token_ids]

    def _children(
        self,
        paths: Paths,
        trees: Tensor,
        parents: Tensor,
        logits: Tensor,
        sequences: Sequence[TokenSequence],
        budget: int,
    ) -> Paths:
        """Return `paths` with the best children of expanded nodes.

        Args:
            paths: paths so far.
            trees: trees of the expanded nodes [n], ascending.
            parents: indices of the expanded nodes [n], or ROOT.
            logits: scores after the expanded nodes, [n, V].
            sequences: sequence of each tree.
            budget: number of paths to keep.
        """
        depths = torch.where(parents == ROOT, 0, paths.depth[parents.clamp(min=0)]) if len(paths) else parents + 1
        found = []
        for tree, rows in _runs(trees):
            sequence = sequences[tree]
            positions = [len(sequence.tokens) + int(depth) for depth in depths[rows]]
            own = logits[rows, : sequence.sampler.vocab_size]  # padded vocabularies may differ in size
            weights = self._weights(own, positions, sequence.sampler)
            found.append(weights.topk(min(self._branch, budget, weights.shape[-1]), dim=-1))
        best = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        scores, tokens = (each.cpu() for each in best)
        if scores[:, 0].isnan().any():  # softmax makes NaN of infinite scores, too, and topk puts NaN first
            raise ScoresNotFiniteError
        return paths.with_children(trees, parents, scores.double(), tokens, budget)

    def _weights(self, logits: Tensor, positions: Sequence[int], sampler: Sampler) -> Tensor:
        """Return log weights [n, V]: the draft's estimate of how likely the target accepts each token."""
        if sampler.noise is None:
            return torch.log_softmax(logits / GREEDY_TEMPERATURE, dim=-1)
        scores = logits / sampler.sampling.temperature
        if not self._shared_noise:
            return torch.log_softmax(scores, dim=-1)
        noise = torch.stack([sampler.noise.row(position) for position in positions])
        return torch.log_softmax((scores + noise[:, : scores.shape[-1]]) / NOISE_TEMPERATURE, dim=-1)


def _runs(trees: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each tree of a sorted list with the places where the list names this tree."""
    begin = 0
    for tree, group in groupby(trees.tolist()):
        end = begin + len(list(group))
        yield tree, slice(begin, end)
        begin = end


def _finished(paths: Paths) -> _Grown:
    """Return the tree of paths that all are in one tree."""
    token, parent, weight = (tuple(column.tolist()) for column in (paths.token, paths.parent, paths.score))
    return _Grown(TokenTree(token, parent, (SOURCE,) * len(paths), weight), paths.row.tolist())
