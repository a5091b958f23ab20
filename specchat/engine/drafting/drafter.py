"""Growing the tree of guesses.

Best first, as in SpecExec (arXiv 2406.02532, algorithm 1): the tree is the `budget` likeliest paths, found by expanding
the best unexpanded nodes in wide batches until no child could enter any more. Two things differ. Growth is not level by
level, so a sure continuation goes deep while the rest stays shallow. And when the target will sample, paths are ranked
by the race that the target will run: with the noise added to the draft's scores, a path's weight is how likely it is
to be drawn with this noise, not how likely it is in general.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specchat.engine.attention import RowLayout
from specchat.engine.drafting.policy import DraftPolicy
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.tree import ROOT, TokenTree, common_prefix
from specchat.records.limits import DRAFT_BRANCH, draft_width

# The softmax that turns a draft's scores into weights of paths. A draft's own probabilities say how likely a token is
# in general; here they must say how likely it is the one the target takes, which is surer: sharper than 1 tells better.
# Measured on the demo pair, budget 64, 90 held-out chats that no test uses; tokens per step at 1.0, 0.85, 0.7, 0.5:
# greedy 4.24, -, 5.1 (0.6), 5.67 (0.35: 5.40); with noise at t=0.7 4.72, 5.07, 5.11, 5.0 (0.55).
NOISE_TEMPERATURE = 0.7
GREEDY_TEMPERATURE = 0.5

# Its name among those whose guesses a tree may hold.
SOURCE = "model"


class Drafter(Protocol):
    """Guesses what the target will write; may be wrong about everything, only speed depends on it."""

    @property
    def models(self) -> Sequence[TreeModel]:
        """The models it holds in memory."""

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """A tree as large as `policy` says, of at most `max_depth` levels below the last token of `context`.

        Raises:
            ScoresNotFiniteError: the draft computes NaN or infinity, so its guesses mean nothing.
        """

    def commit(self, path: Sequence[int]) -> None:
        """The nodes of the last tree that the target accepted, root to leaf."""

    def reset(self) -> None:
        """Forgets every context."""

    def close(self) -> None:
        """Lets go of memory and threads."""


class NoDrafter:
    """Plain decoding: one token per pass."""

    models: Sequence[TreeModel] = ()

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """No guesses."""
        return TokenTree()

    def commit(self, path: Sequence[int]) -> None:
        """Nothing was guessed."""

    def reset(self) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class _Candidates:
    """The best paths found so far, best first; all tensors [M] on the CPU, M <= budget.

    `row` is the node's row among this tree's rows in the draft's cache, -1 until it is expanded.
    """

    score: Tensor  # float64: sum of log weights along the path
    token: Tensor
    parent: Tensor  # index into these tensors, or ROOT
    depth: Tensor
    row: Tensor

    @classmethod
    def empty(cls) -> _Candidates:
        """No paths."""
        ints = torch.zeros(0, dtype=torch.int64)
        return cls(torch.zeros(0, dtype=torch.float64), ints, ints, ints, ints)

    def __len__(self) -> int:
        return self.score.shape[0]

    def frontier(self, width: int, budget: int, max_depth: int) -> Tensor:
        """The best unexpanded nodes whose children could still enter: indices [<= width]."""
        open_ = (self.row < 0) & (self.depth < max_depth)
        if len(self) >= budget:
            open_ &= self.score > self.score[-1]
        return open_.nonzero()[:width, 0]

    def with_children(self, parents: Tensor, scores: Tensor, tokens: Tensor, budget: int) -> _Candidates:
        """Adds children and keeps the best `budget` of all.

        Args:
            parents: [n] indices, or ROOT.
            scores: log weights [n, branch], float64.
            tokens: [n, branch].
            budget: paths to keep.
        """
        branch = tokens.shape[1]
        parent = parents.repeat_interleave(branch)
        is_root = parent == ROOT
        if len(self):
            base = torch.where(is_root, 0.0, self.score[parent.clamp(min=0)])
            depth = torch.where(is_root, 1, self.depth[parent.clamp(min=0)] + 1)
        else:
            base, depth = torch.zeros(parent.shape, dtype=torch.float64), torch.ones_like(parent)
        # strictly below the parent, so that a sort can never put a child before it
        score = base + scores.flatten().clamp(max=-1e-9)
        merged = _Candidates(
            torch.cat([self.score, score]),
            torch.cat([self.token, tokens.flatten()]),
            torch.cat([self.parent, parent]),
            torch.cat([self.depth, depth]),
            torch.cat([self.row, torch.full_like(parent, -1)]),
        )
        return merged._best(budget)

    def first(self, count: int) -> _Candidates:
        """The best `count` paths, whole: a parent always stands before its children."""
        columns = (self.score, self.token, self.parent, self.depth, self.row)
        return _Candidates(*(column[:count] for column in columns))

    def _best(self, budget: int) -> _Candidates:
        order = self.score.argsort(descending=True, stable=True)[:budget]
        new_index = torch.full((len(self) + 1,), ROOT, dtype=torch.int64)  # last entry: where ROOT = -1 points
        new_index[order] = torch.arange(order.shape[0])
        parent = new_index[self.parent[order]]
        return _Candidates(self.score[order], self.token[order], parent, self.depth[order], self.row[order])


class ModelDrafter:
    """A small model with its own cache grows the tree.

    Args:
        model: the draft.
        branch: children considered per node.
        max_rows: rows the draft may spend on one tree (expanded nodes that later drop out included).
        max_context: committed tokens beyond which the draft's positions end, and with them its guesses.
        shared_noise: rank by the sampler's own noise; off only to measure what it brings.
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
        self._tokens: list[int] = []  # what the draft's cache holds
        self._rows: list[int] = []  # of the last tree: node -> row behind the prefix, or -1
        self._tree = TokenTree()

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """The best paths; ends when no unexpanded node could still change them, or would pay for itself."""
        self._tree, self._rows = TokenTree(), []
        budget = policy.tree_budget
        max_depth = min(max_depth, self._max_context - len(context))
        if max_depth <= 0 or not policy.should_draft():
            return self._tree
        root_logits = self._catch_up(context, policy, cancel)
        paths = self._children(_Candidates.empty(), torch.tensor([ROOT]), root_logits, len(context), sampler, budget)
        rows = _TreeRows(self._max_rows, len(context), self._model.device)
        width = draft_width(budget)
        while True:
            begin = time.perf_counter()
            nodes = paths.frontier(min(width, rows.free), budget, max_depth)
            nodes = nodes[: policy.num_to_expand(nodes.tolist(), paths.score[nodes].tolist())]
            if not len(nodes):
                break
            parents = paths.parent[nodes]
            parent_rows = torch.where(parents == ROOT, ROOT, paths.row[parents.clamp(min=0)])
            paths.row[nodes] = rows.add(parent_rows, paths.depth[nodes])
            hidden = self._model.forward(paths.token[nodes].tolist(), rows.layout(len(nodes)), cancel)
            paths = self._children(paths, nodes, self._model.logits(hidden), len(context), sampler, budget)
            policy.record_draft_pass(len(nodes), time.perf_counter() - begin)
        paths = paths.first(policy.num_to_verify(paths.score.tolist()))
        columns = (paths.token, paths.parent, paths.score)
        token, parent, weight = (tuple(column.tolist()) for column in columns)
        self._tree = TokenTree(token, parent, (SOURCE,) * len(paths), weight)
        self._rows = paths.row.tolist()
        return self._tree

    def commit(self, path: Sequence[int]) -> None:
        """Keeps the rows of accepted nodes that were expanded; the others are computed with the next context."""
        known = [node for node in path if self._rows[node] >= 0]
        prefix = len(self._tokens)
        self._model.cache.keep(prefix, [prefix + self._rows[node] for node in known])
        self._tokens += [self._tree.tokens[node] for node in known]
        self._tree, self._rows = TokenTree(), []

    def reset(self) -> None:
        """Empties the draft's cache."""
        self._model.cache.truncate(0)
        self._tokens, self._rows, self._tree = [], [], TokenTree()

    def close(self) -> None:
        """Stops the draft's streaming, if it streams."""
        self._model.close()

    def _catch_up(self, context: Sequence[int], policy: DraftPolicy, cancel: threading.Event | None) -> Tensor:
        """Computes what the cache lacks of `context`; the draft's scores behind its last token: [1, V]."""
        begin = time.perf_counter()
        shared = min(common_prefix(self._tokens, list(context)), len(context) - 1)
        self._model.cache.truncate(shared)
        self._tokens = list(context[:shared])
        hidden = self._model.append(self._known(context[shared:]), cancel)
        self._tokens = list(context)
        logits = self._model.logits(hidden[-1:])
        policy.record_draft_pass(len(context) - shared, time.perf_counter() - begin)
        return logits

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens as the draft can read them: the target may have more, which stand for nothing here."""
        return [min(token_id, self._model.vocab_size - 1) for token_id in token_ids]

    def _children(
        self, paths: _Candidates, parents: Tensor, logits: Tensor, length: int, sampler: Sampler, budget: int
    ) -> _Candidates:
        """Adds the best children of expanded nodes: parents [n], logits [n, V] behind them."""
        depths = torch.where(parents == ROOT, 0, paths.depth[parents.clamp(min=0)]) if len(paths) else parents + 1
        logits = logits[:, : sampler.vocab_size]  # padded vocabularies may differ in length
        weights = self._weights(logits, [length + int(depth) for depth in depths], sampler)
        scores, tokens = (each.cpu() for each in weights.topk(min(self._branch, budget, weights.shape[-1]), dim=-1))
        if scores[:, 0].isnan().any():  # softmax makes NaN of infinite scores, too, and topk puts NaN first
            raise ScoresNotFiniteError
        return paths.with_children(parents, scores.double(), tokens, budget)

    def _weights(self, logits: Tensor, positions: Sequence[int], sampler: Sampler) -> Tensor:
        """How likely each token is to be the target's, given what the draft knows: log weights [n, V]."""
        if sampler.noise is None:
            return torch.log_softmax(logits / GREEDY_TEMPERATURE, dim=-1)
        scores = logits / sampler.sampling.temperature
        if not self._shared_noise:
            return torch.log_softmax(scores, dim=-1)
        noise = torch.stack([sampler.noise.row(position) for position in positions])
        return torch.log_softmax((scores + noise[:, : scores.shape[-1]]) / NOISE_TEMPERATURE, dim=-1)


class _TreeRows:
    """The rows of one growing tree in the draft's cache, in the order of expansion."""

    def __init__(self, max_rows: int, prefix: int, device: torch.device) -> None:
        self._seen = torch.zeros(max_rows, max_rows, dtype=torch.bool)
        self._positions = torch.zeros(max_rows, dtype=torch.int64)
        self._prefix = prefix
        self._device = device
        self._end = 0

    @property
    def free(self) -> int:
        """Rows left."""
        return self._seen.shape[0] - self._end

    def add(self, parent_rows: Tensor, depths: Tensor) -> Tensor:
        """New rows below the given ones (ROOT for none); their indices [n]."""
        rows = torch.arange(self._end, self._end + len(parent_rows))
        below = parent_rows >= 0
        self._seen[rows[below]] = self._seen[parent_rows[below]]
        self._seen[rows, rows] = True
        self._positions[rows] = self._prefix - 1 + depths
        self._end += len(parent_rows)
        return rows

    def layout(self, num_new: int) -> RowLayout:
        """The layout of a pass over the last `num_new` rows."""
        ancestors = self._seen[self._end - num_new : self._end, : self._end].to(self._device)
        return RowLayout(self._prefix, 0, ancestors, self._positions[: self._end].to(self._device))
