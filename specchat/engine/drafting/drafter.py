"""Drafters, which grow the draft tree.

Best-first search as in SpecExec (arXiv 2406.02532, algorithm 1): the tree holds the `budget` likeliest paths. The best
unexpanded nodes are expanded in wide batches until no child could enter the tree. Two things differ from SpecExec. The
tree does not grow level by level, so likely continuations go deep and unlikely ones stay shallow. And when the target
samples, paths are ranked by the target's own race. The target's noise is added to the draft's scores, so a path's
weight is its likelihood of being drawn with this noise, not its likelihood in general.
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
    """Drafts trees for the target; wrong guesses cost speed but never change the text."""

    @property
    def models(self) -> Sequence[TreeModel]:
        """Models that the drafter holds in memory."""

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """Return a tree below the last token of `context`, of at most `max_depth` levels and a size set by `policy`.

        Raises:
            ScoresNotFiniteError: the draft computes NaN or infinity, so its guesses mean nothing.
        """

    def commit(self, path: Sequence[int]) -> None:
        """Commit the nodes of the last tree that the target accepted, root to leaf."""

    def reset(self) -> None:
        """Drop all cached context."""

    def close(self) -> None:
        """Release memory and threads."""


class NoDrafter:
    """Drafter for plain decoding: empty trees, one token per pass."""

    models: Sequence[TreeModel] = ()

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """Return an empty tree."""
        return TokenTree()

    def commit(self, path: Sequence[int]) -> None:
        """Do nothing: nothing was drafted."""

    def reset(self) -> None:
        """Do nothing: nothing is cached."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


@dataclass
class _Candidates:
    """The best paths so far, best first; all tensors [M] on the CPU, M <= budget.

    `row` is the node's row among this tree's rows in the draft's cache, -1 until the node is expanded.
    """

    score: Tensor  # sum of log weights along the path, float64
    token: Tensor
    parent: Tensor  # index into these tensors, or ROOT
    depth: Tensor
    row: Tensor

    @classmethod
    def empty(cls) -> _Candidates:
        """Return an empty set of paths."""
        ints = torch.zeros(0, dtype=torch.int64)
        return cls(torch.zeros(0, dtype=torch.float64), ints, ints, ints, ints)

    def __len__(self) -> int:
        return self.score.shape[0]

    def frontier(self, width: int, budget: int, max_depth: int) -> Tensor:
        """Return the best unexpanded nodes whose children could still enter the tree: indices [<= width]."""
        open_ = (self.row < 0) & (self.depth < max_depth)
        if len(self) >= budget:
            open_ &= self.score > self.score[-1]
        return open_.nonzero()[:width, 0]

    def with_children(self, parents: Tensor, scores: Tensor, tokens: Tensor, budget: int) -> _Candidates:
        """Add children and keep the best `budget` paths.

        Args:
            parents: indices of the expanded nodes [n], or ROOT.
            scores: log weights of the children [n, branch], float64.
            tokens: token ids of the children [n, branch].
            budget: number of paths to keep.
        """
        branch = tokens.shape[1]
        parent = parents.repeat_interleave(branch)
        is_root = parent == ROOT
        if len(self):
            base = torch.where(is_root, 0.0, self.score[parent.clamp(min=0)])
            depth = torch.where(is_root, 1, self.depth[parent.clamp(min=0)] + 1)
        else:
            base, depth = torch.zeros(parent.shape, dtype=torch.float64), torch.ones_like(parent)
        # Keep scores strictly below the parent's, so that sorting never puts a child before its parent.
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
        """Return the best `count` paths; every parent is included, because parents precede their children."""
        columns = (self.score, self.token, self.parent, self.depth, self.row)
        return _Candidates(*(column[:count] for column in columns))

    def _best(self, budget: int) -> _Candidates:
        order = self.score.argsort(descending=True, stable=True)[:budget]
        new_index = torch.full((len(self) + 1,), ROOT, dtype=torch.int64)  # ROOT = -1 indexes the last entry
        new_index[order] = torch.arange(order.shape[0])
        parent = new_index[self.parent[order]]
        return _Candidates(self.score[order], self.token[order], parent, self.depth[order], self.row[order])


class ModelDrafter:
    """Grows trees with a small model that has its own KV cache.

    Args:
        model: draft model.
        branch: number of children considered per node.
        max_rows: rows that one tree may take in the draft's cache, including expanded nodes that later drop out.
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
        self._tokens: list[int] = []  # tokens whose rows are in the draft's cache
        self._rows: list[int] = []  # for each node of the last tree: its row after the prefix, or -1
        self._tree = TokenTree()

    def grow(
        self,
        context: Sequence[int],
        policy: DraftPolicy,
        max_depth: int,
        sampler: Sampler,
        cancel: threading.Event | None,
    ) -> TokenTree:
        """Draft a tree of the best paths; stop when another draft pass cannot change it or would not save time."""
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
        """Keep the rows of accepted nodes that were expanded; other accepted nodes are computed by the next `grow`."""
        known = [node for node in path if self._rows[node] >= 0]
        prefix = len(self._tokens)
        self._model.cache.keep(prefix, [prefix + self._rows[node] for node in known])
        self._tokens += [self._tree.tokens[node] for node in known]
        self._tree, self._rows = TokenTree(), []

    def reset(self) -> None:
        """Empty the draft's cache."""
        self._model.cache.truncate(0)
        self._tokens, self._rows, self._tree = [], [], TokenTree()

    def close(self) -> None:
        """Close the draft model."""
        self._model.close()

    def _catch_up(self, context: Sequence[int], policy: DraftPolicy, cancel: threading.Event | None) -> Tensor:
        """Compute the tokens of `context` that are not cached, and return the scores after its last token, [1, V]."""
        begin = time.perf_counter()
        shared = min(common_prefix(self._tokens, list(context)), len(context) - 1)
        if shared == len(self._tokens) and len(context) - shared > _PROMPT_ROWS:
            self._model.cache.save()
        shared = self._model.cache.truncate(shared)
        self._tokens = list(context[:shared])
        hidden = self._model.append(self._known(context[shared:]), cancel)
        self._tokens = list(context)
        logits = self._model.logits(hidden[-1:])
        policy.record_draft_pass(len(context) - shared, time.perf_counter() - begin)
        return logits

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Clamp token ids to the draft's vocabulary; the target may have further ids without meaning to the draft."""
        return [min(token_id, self._model.vocab_size - 1) for token_id in token_ids]

    def _children(
        self, paths: _Candidates, parents: Tensor, logits: Tensor, length: int, sampler: Sampler, budget: int
    ) -> _Candidates:
        """Return `paths` with the best children of expanded nodes, given parents [n] and their logits [n, V]."""
        depths = torch.where(parents == ROOT, 0, paths.depth[parents.clamp(min=0)]) if len(paths) else parents + 1
        logits = logits[:, : sampler.vocab_size]  # padded vocabularies may differ in size
        weights = self._weights(logits, [length + int(depth) for depth in depths], sampler)
        scores, tokens = (each.cpu() for each in weights.topk(min(self._branch, budget, weights.shape[-1]), dim=-1))
        if scores[:, 0].isnan().any():  # softmax makes NaN of infinite scores, too, and topk puts NaN first
            raise ScoresNotFiniteError
        return paths.with_children(parents, scores.double(), tokens, budget)

    def _weights(self, logits: Tensor, positions: Sequence[int], sampler: Sampler) -> Tensor:
        """Return log weights [n, V]: the draft's estimate of how likely the target accepts each token."""
        if sampler.noise is None:
            return torch.log_softmax(logits / GREEDY_TEMPERATURE, dim=-1)
        scores = logits / sampler.sampling.temperature
        if not self._shared_noise:
            return torch.log_softmax(scores, dim=-1)
        noise = torch.stack([sampler.noise.row(position) for position in positions])
        return torch.log_softmax((scores + noise[:, : scores.shape[-1]]) / NOISE_TEMPERATURE, dim=-1)


class _TreeRows:
    """Rows of one growing tree in the draft's cache, in order of expansion."""

    def __init__(self, max_rows: int, prefix: int, device: torch.device) -> None:
        self._seen = torch.zeros(max_rows, max_rows, dtype=torch.bool)
        self._positions = torch.zeros(max_rows, dtype=torch.int64)
        self._prefix = prefix
        self._device = device
        self._end = 0

    @property
    def free(self) -> int:
        """Number of rows left."""
        return self._seen.shape[0] - self._end

    def add(self, parent_rows: Tensor, depths: Tensor) -> Tensor:
        """Add rows below the given parent rows (ROOT for none), and return their indices [n]."""
        rows = torch.arange(self._end, self._end + len(parent_rows))
        below = parent_rows >= 0
        self._seen[rows[below]] = self._seen[parent_rows[below]]
        self._seen[rows, rows] = True
        self._positions[rows] = self._prefix - 1 + depths
        self._end += len(parent_rows)
        return rows

    def layout(self, num_new: int) -> RowLayout:
        """Return the layout of a pass over the last `num_new` rows."""
        ancestors = self._seen[self._end - num_new : self._end, : self._end].to(self._device)
        return RowLayout(self._prefix, 0, ancestors, self._positions[: self._end].to(self._device))
