"""Draft policies: whether to draft, how many nodes to grow and how many to verify.

A step takes some time and emits 1 + (accepted nodes) tokens. A node pays off if its probability of being accepted
exceeds its time multiplied by the best speed in tokens per second. (This rule maximizes a ratio of expectations:
W. Dinkelbach, "On Nonlinear Fractional Programming", Management Science 13, 1967.) Speeds, times and probabilities are
measured while answers are written. They only decide which rows are computed ahead, so they never change the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from specchat.engine.drafting.pass_times import PRIOR_WEIGHT, FadingRatio, PassTimes
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Step
from specchat.records.plan import Expectation

# Draft only if drafting is faster by this factor: on a busy machine both modes are often equally fast, and only
# drafting can lose without a bound.
_MARGIN = 1.1
# Probe the other mode after 4 steps; triple the interval after each probe that changes nothing, up to 1024 steps.
_PROBE_AFTER, _LONGER, _MAX_INTERVAL = 4, 3, 1024
# Do not probe plain decoding if drafting is faster by this factor: on a slow disk each probe would take seconds.
_FAR_FASTER = 2.0
# Number of bins for log weights; each bin has a width of 1, and the last bin also holds all lower weights.
_NUM_BINS = 10


class DraftPolicy(Protocol):
    """Decides how a drafter grows its tree."""

    @property
    def tree_budget(self) -> int:
        """Most draft nodes of a tree; memory is planned for this many."""

    def should_draft(self) -> bool:
        """Return whether to draft at all in this step."""

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """Return how many open nodes the draft expands in its next pass, best first; 0 ends the tree.

        Args:
            ranks: number of better nodes in the tree for each open node, best first; no more nodes than fit one pass.
            weights: log weights of the open nodes.
        """

    def num_to_verify(self, weights: Sequence[float]) -> int:
        """Return how many nodes the target verifies, best first.

        Args:
            weights: log weights of all nodes, best first.
        """

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Record the time of a draft pass over `rows` rows."""

    def record_step(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Record a finished step.

        Args:
            step: record of the step.
            tree: verified nodes.
            path: accepted nodes, root to leaf.
        """


@dataclass(frozen=True)
class FixedPolicy:
    """Always grows and verifies the `tree_budget` likeliest nodes."""

    tree_budget: int

    def should_draft(self) -> bool:
        """Return whether the tree budget allows any nodes."""
        return self.tree_budget > 0

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """Return the number of all open nodes."""
        return len(weights)

    def num_to_verify(self, weights: Sequence[float]) -> int:
        """Return the number of all nodes."""
        return len(weights)

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Do nothing: this policy uses no measurements."""

    def record_step(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Do nothing: this policy uses no measurements."""


class AdaptivePolicy:
    """Drafts while drafting pays off, else decodes plainly; both speeds are measured while answers are written.

    Args:
        tree_budget: most draft nodes of a tree.
        expected: prediction to start from.
    """

    def __init__(self, tree_budget: int, expected: Expectation) -> None:
        self.tree_budget = tree_budget
        self._expected = expected
        most_rows = 2 * max(tree_budget, expected.tree_nodes) + 1
        self._target_times = PassTimes(expected.pass_s, most_rows)
        self._draft_times = PassTimes(expected.draft_s, most_rows)
        self._acceptance = _Acceptance()
        self._drafted_per_s = FadingRatio()
        self._prefers_draft = self._drafts = True
        self._catches_up = self._probes_small_tree = False
        self._interval = self._steps_left = _PROBE_AFTER

    def should_draft(self) -> bool:
        """Return whether the mode in use, or the one being probed, is drafting."""
        return self.tree_budget > 0 and self._drafts

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """Return the best number of nodes: expected accepted children, minus the tokens that the time is worth."""
        tokens_per_s = self._tokens_per_s()
        best, best_value, gained = 0, 0.0, 0.0
        for count, (rank, weight) in enumerate(zip(ranks, weights, strict=True), 1):
            node_s = self._target_times.at(rank + 2) - self._target_times.at(rank + 1)
            gained += self._acceptance.of_children(weight) - tokens_per_s * node_s
            value = gained - tokens_per_s * self._draft_times.at(count)
            if value > best_value:
                best, best_value = count, value
        return best

    def num_to_verify(self, weights: Sequence[float]) -> int:
        """Return the best number of nodes: expected tokens, minus the tokens that the time of the pass is worth."""
        tokens_per_s = self._tokens_per_s()
        tokens = accumulate(map(self._acceptance.of, weights), initial=1.0)
        values = [expected - tokens_per_s * self._target_times.at(1 + nodes) for nodes, expected in enumerate(tokens)]
        best = values.index(max(values))
        return (best + 2) // 3 if self._probes_small_tree else best

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        """Learn how long a pass of the draft takes."""
        if rows <= self.tree_budget:
            self._draft_times.add(rows, seconds)

    def record_step(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Learn from a step, and choose the mode of the next one."""
        if step.new_rows != 1 or not step.token_ids:
            return  # a prompt's pass, or an interrupted one
        self._target_times.add(1 + step.tree_nodes, step.pass_s - step.draft_s)
        if self._drafts:
            self._record_drafted(step, tree)
            self._acceptance.add(tree, path)
            self._probes_small_tree = False
        self._choose_mode()

    def _record_drafted(self, step: Step, tree: TokenTree) -> None:
        """Count a drafted step, but not the first one after plain decoding, in which the draft catches up."""
        if not self._catches_up:
            # The mean of expected and emitted tokens halves the effect of luck, which matters because few steps decide.
            tokens = (1.0 + sum(map(self._acceptance.of, tree.weights)) + len(step.token_ids)) / 2
            self._drafted_per_s.add(tokens, step.pass_s)
        self._catches_up = False

    def _choose_mode(self) -> None:
        """Switch once the other mode is faster; sometimes probe the other mode, or trees of a third of the size."""
        self._steps_left -= 1
        is_probe = self._drafts != self._prefers_draft
        if self._steps_left > 0 and (is_probe or self._interval == _PROBE_AFTER):
            return  # too few steps to tell
        drafted, plain = self._speeds()
        prefers_draft = drafted > _MARGIN * plain
        if prefers_draft != self._prefers_draft:
            self._prefers_draft = prefers_draft
            self._use(draft=prefers_draft, steps=self._interval)
        elif is_probe or (self._steps_left <= 0 and self._is_far_faster(drafted / plain)):
            self._interval = min(_LONGER * self._interval, _MAX_INTERVAL)
            self._probes_small_tree = prefers_draft
            self._use(draft=prefers_draft, steps=self._interval)
        elif self._steps_left <= 0:
            self._use(draft=not self._drafts, steps=1)

    def _is_far_faster(self, drafted_by_plain: float) -> bool:
        """Return whether drafting is fast enough to postpone the next probe of plain decoding."""
        is_certain = self._interval == _PROBE_AFTER or (
            self._target_times.is_measured(1) and self._interval < _MAX_INTERVAL
        )
        return drafted_by_plain > _FAR_FASTER and is_certain

    def _use(self, *, draft: bool, steps: int) -> None:
        self._catches_up = draft and not self._drafts
        self._drafts, self._steps_left = draft, steps + self._catches_up

    def _tokens_per_s(self) -> float:
        """Return the speed of the faster mode, which tells how many tokens a second is worth."""
        return max(self._speeds())

    def _speeds(self) -> tuple[float, float]:
        """Return tokens per second with and without drafting, measured or at first predicted from pass times."""
        expected = self._expected
        rows = max(round(expected.tree_nodes / expected.draft_passes), 1)
        step_s = self._target_times.at(1 + expected.tree_nodes) + expected.draft_passes * self._draft_times.at(rows)
        return self._drafted_per_s.value(expected.tokens_per_step / step_s), 1 / self._target_times.at(1)


class _Acceptance:
    """The share of nodes that were accepted, counted in bins by the draft's log weight of their paths."""

    def __init__(self) -> None:
        self._accepted = [
            FadingRatio(PRIOR_WEIGHT * math.exp(-place - 0.5), PRIOR_WEIGHT) for place in range(_NUM_BINS)
        ]
        self._expanded = FadingRatio(PRIOR_WEIGHT - 1, PRIOR_WEIGHT)

    def of(self, weight: float) -> float:
        """Return the probability for a log weight, interpolated between bins; a lower weight never has a higher one."""
        place = min(max(-weight - 0.5, 0.0), _NUM_BINS - 1.0)
        left = min(int(place), _NUM_BINS - 2)
        heavier, lighter = (self._accepted[each].value(0.0) for each in (left, left + 1))
        return heavier + (min(lighter, heavier) - heavier) * (place - left)

    def of_children(self, weight: float) -> float:
        """Return the probability that a child of the node is accepted."""
        return self.of(weight) * self._expanded.value(0.0)

    def add(self, tree: TokenTree, path: Sequence[int]) -> None:
        """Count the nodes of a verified tree, and which of them were accepted."""
        bins = [_bin(weight) for weight in tree.weights]
        for place in set(bins):
            self._accepted[place].add(sum(bins[node] == place for node in path), bins.count(place))
        parents = set(tree.parents)
        self._expanded.add(len(path), sum(node in parents for node in (ROOT, *path)))


def _bin(weight: float) -> int:
    return int(min(-weight, _NUM_BINS - 1))
