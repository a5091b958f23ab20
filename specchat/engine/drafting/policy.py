"""Draft policies: whether to draft, how many nodes to grow and how many to verify.

A pass over n sequences takes some time and emits n + (accepted nodes) tokens. A node pays off if its probability of
being accepted exceeds its time multiplied by the best speed in tokens per second. (This rule maximizes a ratio of
expectations: W. Dinkelbach, "On Nonlinear Fractional Programming", Management Science 13, 1967.) The rule does not ask
whose tree the node is in. So all trees of a pass share one threshold, and they shrink as the number of sequences grows.
Speeds, times and probabilities are measured while answers are written. They only decide which rows are computed ahead,
so they never change the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Protocol

import torch
from torch import Tensor

from specchat.engine.drafting.pass_times import PRIOR_WEIGHT, FadingRatio, PassTimes
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Step
from specchat.records.plan import Expectation, Plan

# Draft only if drafting is faster by this factor: on a busy machine both modes are often equally fast, and only
# drafting can lose without a bound.
_MARGIN = 1.1
# Probe the other mode after 4 steps, and three times as long after each probe that changes nothing, until probes lose
# this share of the speed. So modes that are about equally fast are compared often, because load and subject change.
_PROBE_AFTER, _LONGER, _PROBE_SHARE = 4, 3, 0.005
# Probe plain decoding only every 1024 steps if drafting is faster by this factor: on a slow disk each probe would take
# seconds. The first probe comes later the faster drafting is: the more the prediction would have to be wrong.
_FAR_FASTER, _MAX_INTERVAL = 2.0, 1024
# A probe takes this many steps, but one where drafting is far faster: a single pass on a busy machine tells little.
_PROBE_STEPS = 3
# Size of trees to probe after plain decoding, beside the best one: times of smaller sizes that are never tried stay
# predictions.
_PROBED_SIZE = 1 / 3
# Bins for log weights, by width and number; the last bin also holds all lower weights.
_BIN_WIDTH, _NUM_BINS = 0.5, 20
# What share of drafting is exposed changes with the sizes of trees: older steps fade by this factor.
_KEEP_EXPOSED = 0.9
# Passes of up to this many rows have an expected time of their own: trees, and short prompts beside them.
_MOST_ROWS = 512


@dataclass(frozen=True)
class Roots:
    """The target's next pass without draft nodes.

    Attributes:
        num_sequences: number of sequences.
        num_rows: rows of their committed tokens: one for each sequence, more for a prompt.
    """

    num_sequences: int = 1
    num_rows: int = 1


ONE_ROOT = Roots()


@dataclass(frozen=True)
class ExpansionTables:
    """What `DraftPolicy.num_to_expand` depends on, for a device that decides without the host.

    Attributes:
        node_costs: tokens that the time of one more row of the target's pass is worth, by number of better nodes.
        pass_costs: tokens that the time of a draft pass is worth, for 1, 2, ... rows.
        children: probability that a child of a node is accepted, by the bins of the node's log weight.
        slopes: change of this probability towards the next bin.
        bin_width: width of the bins; they begin at half of it.
    """

    node_costs: Sequence[float]
    pass_costs: Sequence[float]
    children: Sequence[float]
    slopes: Sequence[float]
    bin_width: float = _BIN_WIDTH

    @property
    def parts(self) -> tuple[Sequence[float], ...]:
        """All tables."""
        return self.node_costs, self.pass_costs, self.children, self.slopes

    def packed(self) -> Tensor:
        """Return the values of all tables, one after another, float64."""
        return torch.tensor([*chain.from_iterable(self.parts)], dtype=torch.float64)


class DraftPolicy(Protocol):
    """Decides how a drafter grows the trees of a pass."""

    @property
    def tree_budget(self) -> int:
        """Most draft nodes of a pass; memory is planned for this many."""

    def may_join(self, prompt_rows: int, roots: Roots) -> bool:
        """Return whether one more prompt should join a pass, rather than wait for the next one.

        Args:
            prompt_rows: rows of the prompt.
            roots: the pass without the prompt and without nodes, of at least one sequence.
        """

    @property
    def tokens_per_s(self) -> float:
        """Tokens that a second is worth; 0 if time does not count."""

    def should_draft(self) -> bool:
        """Return whether to draft at all in this step."""

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return how many open nodes the draft expands in its next pass, best first; 0 ends the trees.

        Args:
            ranks: number of better nodes in the trees for each open node, best first; no more nodes than fit one pass.
            weights: log weights of the open nodes.
            roots: the target's pass without nodes.
        """

    def expansion_tables(self, width: int, roots: Roots = ONE_ROOT) -> ExpansionTables | None:
        """Return what `num_to_expand` depends on; None if it always expands all open nodes.

        Args:
            width: most open nodes of a pass.
            roots: the target's pass without nodes.
        """

    def num_to_verify(self, weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return how many nodes the target verifies, best first.

        Args:
            weights: log weights of all nodes of all trees, best first.
            roots: the target's pass without nodes.
        """

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Record the time of a draft pass over `rows` rows."""

    def record_pass(self, steps: Sequence[Step], trees: Sequence[TokenTree], paths: Sequence[Sequence[int]]) -> None:
        """Record a finished pass.

        Args:
            steps: record of the pass for each sequence.
            trees: verified nodes of each sequence.
            paths: accepted nodes of each sequence, root to leaf.
        """


@dataclass(frozen=True)
class FixedPolicy:
    """Always grows and verifies the `tree_budget` likeliest nodes.

    Attributes:
        tree_budget: nodes of a pass.
        free_rows: assumed number of rows that a pass may have at no cost.
        tokens_per_s: tokens that a second is worth; 0 if time does not count.
    """

    tree_budget: int
    free_rows: int = 1
    tokens_per_s: float = 0.0

    def may_join(self, prompt_rows: int, roots: Roots) -> bool:
        """Return whether the rows cost nothing."""
        return roots.num_rows + prompt_rows <= self.free_rows

    def should_draft(self) -> bool:
        """Return whether the tree budget allows any nodes."""
        return self.tree_budget > 0

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return the number of all open nodes."""
        return len(weights)

    def expansion_tables(self, width: int, roots: Roots = ONE_ROOT) -> None:
        """Return None: all open nodes are expanded."""
        return

    def num_to_verify(self, weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return the number of all nodes."""
        return len(weights)

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Do nothing: this policy uses no measurements."""

    def record_pass(self, steps: Sequence[Step], trees: Sequence[TokenTree], paths: Sequence[Sequence[int]]) -> None:
        """Do nothing: this policy uses no measurements."""


def fixed_policy(plan: Plan) -> FixedPolicy:
    """Return the policy of trees of the planned size; while layers stream, a chunk of rows is taken to be free."""
    return FixedPolicy(plan.work.tree_budget, plan.work.chunk_rows if plan.placement.streamed else 1)


class AdaptivePolicy:
    """Drafts while drafting pays off, else decodes plainly; both speeds are measured while answers are written.

    Args:
        tree_budget: most draft nodes of a pass.
        expected: prediction to start from.
        max_sequences: most sequences of a pass.
    """

    def __init__(self, tree_budget: int, expected: Expectation, max_sequences: int = 1) -> None:
        self.tree_budget = tree_budget
        self._expected = expected
        self._most_rows = max(2 * max(tree_budget, expected.tree_nodes) + max_sequences, _MOST_ROWS)
        self._target_times = PassTimes(expected.pass_s, self._most_rows)
        self._draft_times = PassTimes(expected.draft_s, self._most_rows)
        self._exposed = FadingRatio(keep=_KEEP_EXPOSED)  # share of drafting that makes steps longer
        self._acceptance = _Acceptance()
        # Speeds are measured at any number of sequences and compared by what was predicted for these numbers.
        alone = self._predicted_per_s(1)
        self._gains = [self._predicted_per_s(max(num, 1)) / alone for num in range(max_sequences + 1)]
        self._drafted_per_s = FadingRatio()
        self._prefers_draft = self._drafts = True
        self._catches_up = False
        self._size_factor = 1.0  # of the next trees, beside the best size
        self._num_nodes = min(tree_budget, expected.tree_nodes)  # of all trees in the last pass
        self._interval = self._steps_left = _PROBE_AFTER

    def may_join(self, prompt_rows: int, roots: Roots) -> bool:
        """Return whether waiting saves less time than a seat that stays empty loses: its share of a pass.

        The prompt must be read anyway. Waiting saves the time of rows that the next pass has room for at no cost,
        beside trees of the last size.
        """
        nodes = self._num_nodes if self.should_draft() else 0
        now_s = self._rows_s(roots.num_rows + nodes, prompt_rows)
        later_s = self._rows_s(roots.num_sequences + nodes, prompt_rows)
        return now_s - later_s <= self._pass_s(roots.num_rows + nodes) / (roots.num_sequences + 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that a second is worth: the speed of the faster mode for a single sequence."""
        return self._tokens_per_s()

    def should_draft(self) -> bool:
        """Return whether the mode in use, or the one being probed, is drafting."""
        return self.tree_budget > 0 and self._drafts

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return the best number of nodes: expected accepted children, minus the tokens that the time is worth."""
        tokens_per_s, first = self._tokens_per_s(roots.num_sequences), self._known_rows(roots)
        best, best_value, gained = 0, 0.0, 0.0
        for count, (rank, weight) in enumerate(zip(ranks, weights, strict=True), 1):
            rows = first + rank
            node_s = self._target_times.at(rows + 1) - self._target_times.at(rows)
            gained += self._acceptance.of_children(weight) - tokens_per_s * node_s
            value = gained - tokens_per_s * self._exposed_s(count)
            if value > best_value:
                best, best_value = count, value
        return best

    def expansion_tables(self, width: int, roots: Roots = ONE_ROOT) -> ExpansionTables:
        """Return the times of passes, in tokens, and what is known of accepted nodes."""
        tokens_per_s, first = self._tokens_per_s(roots.num_sequences), self._known_rows(roots)
        times = [self._target_times.at(first + rank) for rank in range(self.tree_budget + 1)]
        children, slopes = self._acceptance.children_by_bin()
        return ExpansionTables(
            node_costs=[tokens_per_s * (after - before) for before, after in pairwise(times)],
            pass_costs=[tokens_per_s * self._exposed_s(rows) for rows in range(1, width + 1)],
            children=children,
            slopes=slopes,
        )

    def num_to_verify(self, weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        """Return the best number of nodes: expected tokens, minus the tokens that the time of the pass is worth."""
        tokens_per_s, first = self._tokens_per_s(roots.num_sequences), self._known_rows(roots)
        tokens = accumulate(map(self._acceptance.of, weights), initial=float(roots.num_sequences))
        values = [
            expected - tokens_per_s * self._target_times.at(first + nodes) for nodes, expected in enumerate(tokens)
        ]
        best = values.index(max(values))
        return min(math.ceil(self._size_factor * best), len(weights))

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Learn how long a pass of the draft takes."""
        if rows <= self.tree_budget:
            self._draft_times.add(rows, seconds)

    def record_pass(self, steps: Sequence[Step], trees: Sequence[TokenTree], paths: Sequence[Sequence[int]]) -> None:
        """Learn from a pass, and choose the mode of the next one."""
        if not any(step.new_rows == 1 and step.token_ids for step in steps):
            return  # only prompts, or interrupted
        rows = sum(step.new_rows + step.tree_nodes for step in steps)
        if rows <= self._most_rows:
            self._target_times.add(rows, steps[0].pass_s - steps[0].exposed_draft_s)
        if self._drafts:
            if steps[0].draft_s > 0:
                self._exposed.add(steps[0].exposed_draft_s, steps[0].draft_s)
            if rows <= self._most_rows:
                self._record_drafted(steps, trees, rows)
            for tree, path in zip(trees, paths, strict=True):
                self._acceptance.add(tree, path)
            self._size_factor = 1.0
            self._num_nodes = sum(step.tree_nodes for step in steps)
        self._choose_mode(len(steps))

    def _record_drafted(self, steps: Sequence[Step], trees: Sequence[TokenTree], rows: int) -> None:
        """Count a drafted pass, but not the first one after plain decoding, in which the draft catches up."""
        if not self._catches_up:
            # The mean of expected and emitted tokens halves the effect of luck, which matters because few steps decide.
            accepted = sum(self._acceptance.of(weight) for tree in trees for weight in tree.weights)
            tokens = (len(steps) + accepted + sum(len(step.token_ids) for step in steps)) / 2
            joining = sum(step.new_rows - 1 for step in steps)  # rows of prompts, whose time is not the trees'
            joining_s = self._target_times.at(rows) - self._target_times.at(rows - joining)
            seconds = max(steps[0].pass_s - joining_s, 0.0)
            self._drafted_per_s.add(tokens, self._gains[len(steps)] * seconds / self._target_times.load)
        self._catches_up = False

    def _choose_mode(self, num_sequences: int) -> None:
        """Switch once the other mode is faster; sometimes probe the other mode, or trees of another size."""
        self._steps_left -= 1
        is_probe = self._drafts != self._prefers_draft
        if self._steps_left > 0 and (is_probe or self._interval == _PROBE_AFTER):
            return  # too few steps to tell
        drafted, plain = self._speeds(num_sequences)
        prefers_draft = drafted > _MARGIN * plain
        if prefers_draft != self._prefers_draft:
            self._prefers_draft = prefers_draft
            self._use(draft=prefers_draft, steps=self._interval)
        elif is_probe or (self._steps_left <= 0 and self._is_far_faster(drafted / plain)):
            self._interval = self._longer_interval(drafted, plain)
            self._size_factor = _PROBED_SIZE if prefers_draft else 1.0
            self._use(draft=prefers_draft, steps=self._interval)
        elif self._steps_left <= 0:
            self._use(draft=not self._drafts, steps=1 if drafted > _FAR_FASTER * plain else _PROBE_STEPS)

    def _longer_interval(self, drafted: float, plain: float) -> int:
        """Return the steps until the next probe: more each time, until probes take no more than their share."""
        longer = min(_LONGER * self._interval, _MAX_INTERVAL)
        if drafted > _FAR_FASTER * plain:
            return longer
        lost_steps = _PROBE_STEPS * (1 - min(drafted, plain) / max(drafted, plain))
        return min(longer, max(math.ceil(lost_steps / _PROBE_SHARE), 2 * _PROBE_AFTER))

    def _is_far_faster(self, drafted_by_plain: float) -> bool:
        """Return whether drafting is fast enough to postpone the next probe of plain decoding."""
        is_known = self._target_times.is_measured(1) and self._interval < _MAX_INTERVAL
        return drafted_by_plain > _FAR_FASTER and (is_known or self._interval <= drafted_by_plain**2)

    def _use(self, *, draft: bool, steps: int) -> None:
        self._catches_up = draft and not self._drafts
        self._drafts, self._steps_left = draft, steps + self._catches_up

    def _exposed_s(self, rows: int) -> float:
        """Return the time by which a draft pass makes the step longer: none of it while layers are read anyway."""
        return self._exposed.value(1.0) * self._draft_times.at(rows)

    def _rows_s(self, before: int, rows: int) -> float:
        """Return the time that further rows add to a pass of `before` rows."""
        return self._pass_s(before + rows) - self._pass_s(before)

    def _pass_s(self, rows: int) -> float:
        """Return the time of a pass without nodes; rows beyond the known ones are taken to cost as much as those."""
        known = min(rows, self._most_rows)
        return self._target_times.at(known) * rows / known

    def _known_rows(self, roots: Roots) -> int:
        """Return the rows of the pass without nodes, as far as times of passes with nodes are known."""
        return min(roots.num_rows, self._most_rows - self.tree_budget)

    def _tokens_per_s(self, num_sequences: int = 1) -> float:
        """Return the speed of the faster mode, which tells how many tokens a second is worth."""
        return max(self._speeds(num_sequences))

    def _speeds(self, num_sequences: int) -> tuple[float, float]:
        """Return tokens per second with and without drafting, measured or at first predicted from pass times."""
        by_level = self._gains[num_sequences] / self._target_times.level
        drafted_per_s = by_level * self._drafted_per_s.value(self._predicted_per_s(num_sequences) / by_level)
        return drafted_per_s, num_sequences / self._target_times.at(num_sequences)

    def _predicted_per_s(self, num_sequences: int) -> float:
        """Return the predicted speed with drafting: any number of sequences shares the same number of nodes.

        The accepted nodes of a tree grow with the logarithm of its size, as in the planner. So fewer of the nodes are
        accepted if fewer sequences share them.
        """
        expected, nodes = self._expected, max(self._expected.tree_nodes, 1)
        rows = max(round(nodes / expected.draft_passes), 1)
        pass_s = self._target_times.at(num_sequences + nodes)
        step_s = pass_s + expected.draft_passes * self._exposed_s(rows)
        accepted = expected.tokens_per_step - expected.num_sequences
        shares = [num * math.log1p(nodes / num) for num in (num_sequences, expected.num_sequences)]
        return (num_sequences + accepted * shares[0] / shares[1]) / step_s


class _Acceptance:
    """The share of nodes that were accepted, counted in bins by the draft's log weight of their paths."""

    def __init__(self) -> None:
        self._accepted = [
            FadingRatio(PRIOR_WEIGHT * math.exp(-_BIN_WIDTH * (place + 0.5)), PRIOR_WEIGHT)
            for place in range(_NUM_BINS)
        ]
        self._expanded = FadingRatio(PRIOR_WEIGHT - 1, PRIOR_WEIGHT)

    def of(self, weight: float) -> float:
        """Return the probability for a log weight, interpolated between bins; a lower weight never has a higher one."""
        place = min(max(-weight / _BIN_WIDTH - 0.5, 0.0), _NUM_BINS - 1.0)
        left = min(int(place), _NUM_BINS - 2)
        heavier, lighter = (self._accepted[each].value(0.0) for each in (left, left + 1))
        return heavier + (min(lighter, heavier) - heavier) * (place - left)

    def of_children(self, weight: float) -> float:
        """Return the probability that a child of the node is accepted."""
        return self.of(weight) * self._expanded.value(0.0)

    def children_by_bin(self) -> tuple[list[float], list[float]]:
        """Return `of_children` at all bins but the last one, and what is added to it towards the next bin."""
        expanded = self._expanded.value(0.0)
        values = [ratio.value(0.0) for ratio in self._accepted]
        slopes = [(min(lighter, heavier) - heavier) * expanded for heavier, lighter in pairwise(values)]
        return [value * expanded for value in values[:-1]], slopes

    def add(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Count the nodes of a verified tree, and which of them were accepted."""
        bins = [_bin(weight) for weight in tree.weights]
        for place in set(bins):
            self._accepted[place].add(sum(bins[node] == place for node in path), bins.count(place))
        parents = set(tree.parents)
        self._expanded.add(len(path), sum(node in parents for node in (ROOT, *path)))


def _bin(weight: float) -> int:
    return int(min(-weight / _BIN_WIDTH, _NUM_BINS - 1))
