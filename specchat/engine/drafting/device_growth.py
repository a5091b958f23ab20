"""Growing the tree of one sequence on a device, without waiting for it between passes.

This is the best-first loop of `Growth` for a draft model alone, and it chooses the same trees. `Growth` reads the
scores of every pass before it queues the next one. On a GPU, each of these copies is a wait, during which nothing is
queued. Here, paths, their rows and the rule that ends the growth are tensors of fixed sizes on the device. So the host
queues as many passes as recent trees took, and reads the tree once at the end. A pass after the last useful one changes
nothing. If the tree is still growing, more passes follow.

Every pass takes as many rows of the draft's cache as it may expand nodes. So a tree ends after as many passes as there
is room for, where `Growth` could go on if passes expanded fewer nodes.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.growth import PassBegin, path_weights
from specchat.engine.drafting.paths import LEAST_LOSS, Paths
from specchat.engine.drafting.policy import DraftPolicy, ExpansionTables, Roots
from specchat.engine.layout import RowLayout
from specchat.engine.sampling import ScoresNotFiniteError
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import ROOT
from specchat.records.limits import draft_width

# Passes to queue after the first ones if the tree is still growing.
_MORE_PASSES = 2


class DeviceGrowth:
    """Growing a tree for one sequence.

    Args:
        scorer: draft model.
        sequence: sequence whose tree may have nodes.
        policy: sizes of the tree.
        roots: the target's pass without nodes.
        branch: number of children considered per node.
        shared_noise: whether to rank paths with the sampler's noise.
        num_passes: number of passes to queue at first, after the one that begins the tree.
        cancel: event that stops drafting.

    Attributes:
        passes: number of passes that were queued.
        useful_passes: number of passes that expanded nodes of the tree.
    """

    def __init__(
        self,
        scorer: DraftModel,
        sequence: TokenSequence,
        policy: DraftPolicy,
        roots: Roots,
        *,
        branch: int,
        shared_noise: bool,
        num_passes: int,
        cancel: threading.Event | None,
    ) -> None:
        self.passes = self.useful_passes = 0
        self._scorer = scorer
        self._sequence = sequence
        self._policy = policy
        self._roots = roots
        self._branch = branch
        self._shared_noise = shared_noise
        self._num_passes = num_passes
        self._cancel = cancel
        self._budget = policy.tree_budget
        self._width = min(draft_width(self._budget), self._budget, scorer.max_rows)
        self._max_depth = scorer.max_depth(sequence)

    @torch.inference_mode()
    def run(self) -> Paths:
        """Grow the tree and return the paths that the target verifies.

        Raises:
            ScoresNotFiniteError: the draft computes NaN or infinity.
        """
        begin, recorded = PassBegin(), self._scorer.num_recorded
        tables = self._policy.expansion_tables(self._width, self._roots)
        values = torch.empty(0, dtype=torch.float64) if tables is None else tables.packed()
        logits, rows, values = self._scorer.begin_beside(self._sequence, values, self._cancel)
        most = self._scorer.max_rows // self._width
        tree = _Tree(self._budget, most * self._width, len(self._sequence.tokens), logits.device)
        tree.add(None, *self._best_children(logits, None))
        rule = None if tables is None else _Rule(tables, values)
        queued, end = 0, min(self._num_passes, most)
        while True:
            for number in range(queued, end):
                self._expand(tree, rule, number)
            paths = tree.read()
            if end == most or not self._is_growing(paths):
                break
            queued, end = end, min(end + _MORE_PASSES, most)
        self.passes, self.useful_passes = 1 + end, int(paths.row.max()) // self._width + 1 if len(paths) else 0
        if recorded == self._scorer.num_recorded:
            self._record(begin, rows)
        return paths.first(self._policy.num_to_verify(paths.score.tolist(), self._roots))

    def _is_growing(self, paths: Paths) -> bool:
        """Return whether another pass would expand nodes."""
        nodes = paths.frontier(self._width, self._budget, torch.tensor([self._max_depth]))
        return self._policy.num_to_expand(nodes.tolist(), paths.score[nodes].tolist(), self._roots) > 0

    def _record(self, begin: PassBegin, rows: int) -> None:
        """Record the mean time of a pass; the first one counts, too, unless it has read a prompt."""
        if rows <= self._width and begin.is_typical:
            seconds = (time.perf_counter() - begin.at) / self.passes
            for _ in range(self.passes):
                self._policy.record_draft_pass(self._width, seconds)

    def _expand(self, tree: _Tree, rule: _Rule | None, number: int) -> None:
        """Expand the best open nodes in one pass."""
        chosen = tree.open_nodes(self._width, self._max_depth)
        if rule is not None:
            chosen = rule.worth_their_time(chosen)
        logits = self._scorer.compute(chosen.tokens, tree.next_rows(chosen, number), self._cancel)
        tree.add(chosen, *self._best_children(logits, chosen.depths, deepest=number + 1))

    def _best_children(self, logits: Tensor, depths: Tensor | None, deepest: int = 0) -> tuple[Tensor, Tensor]:
        """Return log weights, float64, and tokens of the best children of nodes, [n, branch].

        Args:
            logits: scores after the nodes, [n, V].
            depths: depths of the nodes; None for the root alone.
            deepest: largest depth that a node may have.
        """
        sampler = self._sequence.sampler
        own, noise = logits[:, : sampler.vocab_size], None
        if sampler.noise is not None and self._shared_noise:
            first = len(self._sequence.tokens)
            noise = torch.stack([sampler.noise.row(first + depth) for depth in range(deepest + 1)])
            noise = noise if depths is None else noise.index_select(0, depths)
        weights = path_weights(own, sampler, self._scorer.temperatures, noise)
        scores, tokens = weights.topk(min(self._branch, self._budget, weights.shape[-1]), dim=-1)
        return scores.double(), tokens


@dataclass(frozen=True)
class _Chosen:
    """The nodes of a pass.

    Attributes:
        nodes: indices of the nodes [width], best first; those beyond the last chosen one are of no meaning.
        are_chosen: whether each of them is expanded, bool [width]: some, then none.
        scores: sum of log weights along the path of each, float64 [width].
        columns: tokens, parents, depths and rows of the nodes, int64 [4, width].
    """

    nodes: Tensor
    are_chosen: Tensor
    scores: Tensor
    columns: Tensor

    @property
    def tokens(self) -> Tensor:
        """Token of each node."""
        return self.columns[0]

    @property
    def depths(self) -> Tensor:
        """Depth of each node."""
        return self.columns[2]


class _Tree:
    """The best paths of a tree, best first, and the rows of expanded nodes, in tensors of fixed sizes.

    Args:
        budget: number of paths.
        max_rows: most rows of expanded nodes.
        prefix: number of committed tokens.
        device: device of the tensors.
    """

    def __init__(self, budget: int, max_rows: int, prefix: int, device: torch.device) -> None:
        self._budget = budget
        self._prefix = prefix
        self._places = torch.arange(budget, device=device)
        self._score = torch.full((budget,), -torch.inf, dtype=torch.float64, device=device)  # -inf for no path
        # Tokens, parents, depths and rows; the values of places without a path may be used, but not seen.
        self._columns = torch.zeros(4, budget, dtype=torch.int64, device=device)
        self._columns[1::2] = -1  # ROOT, and no row
        self._seen = torch.eye(max_rows, dtype=torch.bool, device=device)
        self._positions = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def open_nodes(self, width: int, max_depth: int) -> _Chosen:
        """Return the best unexpanded nodes whose children could still enter the tree; see `Paths.frontier`."""
        _, _, depths, rows = self._columns
        # The last path is never open, so its place may be written to for all nodes that are not chosen.
        is_open = (rows < 0) & (depths < max_depth) & (self._score > self._score[-1])
        places = torch.where(is_open, self._places, self._budget).topk(width, largest=False).values
        nodes = places.clamp(max=self._budget - 1)
        return _Chosen(nodes, places < self._budget, self._score[nodes], self._columns.index_select(1, nodes))

    def next_rows(self, chosen: _Chosen, number: int) -> RowLayout:
        """Give each chosen node a row, and return the layout of the pass over these rows.

        Args:
            chosen: nodes to expand; the batch may have unused places.
            number: number of the pass, from 0.
        """
        rows, (_, above, depths, unchanged) = self._columns[3], chosen.columns
        width = len(chosen.nodes)
        begin, end = number * width, (number + 1) * width
        parent_rows = torch.where(above == ROOT, -1, rows[above.clamp(min=0)])
        seen = self._seen[parent_rows.clamp(min=0)] & (parent_rows >= 0)[:, None]
        self._seen[begin:end] |= seen
        self._positions[begin:end] = depths + (self._prefix - 1)
        new = torch.arange(begin, end, device=rows.device)
        rows.scatter_(0, chosen.nodes, torch.where(chosen.are_chosen, new, unchanged))
        return RowLayout(self._prefix, 0, self._seen[begin:end, :end], self._positions[:end])

    def add(self, chosen: _Chosen | None, weights: Tensor, tokens: Tensor) -> None:
        """Add children and keep the best paths; see `Paths.with_children`.

        Args:
            chosen: expanded nodes; None for the root.
            weights: log weights of the children [n, branch], float64.
            tokens: token ids of the children [n, branch].
        """
        edges = weights.clamp(max=LEAST_LOSS)
        if chosen is None:
            scores, parents, depths = edges, torch.full_like(tokens, ROOT), torch.ones_like(tokens)
        else:
            scores = torch.where(chosen.are_chosen[:, None], chosen.scores[:, None] + edges, -torch.inf)
            parents = chosen.nodes[:, None].expand_as(tokens)
            depths = (chosen.depths + 1)[:, None].expand_as(tokens)
        children = torch.stack([tokens, parents, depths, torch.full_like(tokens, -1)]).flatten(1)
        scores = torch.cat([self._score, scores.flatten()])
        best = scores.argsort(descending=True, stable=True)[: self._budget]
        columns = torch.cat([self._columns, children], dim=1).index_select(1, best)
        places = torch.full((len(scores) + 1,), ROOT, dtype=torch.int64, device=best.device)
        places.scatter_(0, best, self._places)  # ROOT, which is -1, reads the last entry
        columns[1] = places[columns[1]]
        self._score, self._columns = scores[best], columns

    def read(self) -> Paths:
        """Wait for the device, and return the paths on the CPU."""
        # One copy, because each one is a wait; a double holds every token id.
        score, *columns = torch.cat([self._score[None], self._columns.double()]).cpu()
        if score.isnan().any():  # NaN is larger than any number, so it is never cut
            raise ScoresNotFiniteError
        score = score[score > -torch.inf]
        token, parent, depth, row = (column[: len(score)].long() for column in columns)
        edge = torch.where(parent == ROOT, score, score - score[parent.clamp(min=0)]) if len(score) else score
        nothing = torch.zeros_like(token)
        ints = token, parent, depth, nothing, nothing, row, nothing - 1
        return Paths(torch.stack([score, edge]), torch.stack(ints))


class _Rule:
    """The rule that ends a growth, on a device; see `DraftPolicy.num_to_expand`.

    Args:
        tables: values that the rule depends on.
        packed: values of `ExpansionTables.packed`, on the device.
    """

    def __init__(self, tables: ExpansionTables, packed: Tensor) -> None:
        sizes = [len(part) for part in tables.parts]
        self._node_costs, self._pass_costs, self._children, self._slopes = packed.split(sizes)
        self._bin_width = tables.bin_width
        self._numbers = torch.arange(1, len(tables.pass_costs) + 1, device=packed.device)

    def worth_their_time(self, chosen: _Chosen) -> _Chosen:
        """Return the nodes, of which fewer are chosen if the time of others is worth more than their children."""
        scores = torch.where(chosen.are_chosen, chosen.scores, 0.0)
        last = len(self._children)
        place = (-scores / self._bin_width - 0.5).clamp(0.0, float(last))
        left = place.long().clamp(max=last - 1)
        gains = self._children[left] + self._slopes[left] * (place - left) - self._node_costs[chosen.nodes]
        values = torch.where(chosen.are_chosen, gains, -torch.inf).cumsum(0) - self._pass_costs
        best, count = values.max(0)
        return replace(chosen, are_chosen=chosen.are_chosen & (self._numbers <= count + 1) & (best > 0))
