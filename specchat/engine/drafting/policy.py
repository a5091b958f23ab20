"""How far a tree is worth growing: to a fixed number of nodes, or for as long as its nodes pay for their time.

A step takes time t and emits 1 + (expected accepted nodes) tokens. At the best quotient of the two, the last node's
probability of being accepted is just what its time is worth: with `rate` tokens per second so far, a node that costs c
seconds pays if its probability exceeds `rate * c`, and a pass of the draft pays if its nodes' children are together
expected to bring more than `rate` times its time. (The stopping rule of a ratio of expectations: W. Dinkelbach, "On
Nonlinear Fractional Programming", Management Science 13, 1967.) Rate, times and probabilities are all measured while
answers are written. Only which rows are computed ahead depends on them, so the text never does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from specchat.engine.drafting.pass_times import PassTimes, never_falling
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Step
from specchat.records.plan import Expectation

# What is measured is forgotten at these rates, per step: load and subject change within minutes.
_KEEP_RATE = 0.97
_KEEP_COUNTS = 0.995

# What was expected counts as so many steps at first, and for less with every step that is measured.
_EXPECTED_STEPS = 4.0
_KEEP_EXPECTED, _LEAST_WEIGHT = 0.8, 1e-6
# Where nothing is known. Only how the figures compare matters: the first passes correct them all alike.
_TYPICAL = Expectation(
    pass_s=((1, 1.0), (65, 1.5)),
    draft_s=((1, 0.05), (17, 0.07)),
    tree_nodes=32,
    draft_passes=6.0,
    tokens_per_step=3.0,
)
_HIT_RATE = 0.7
_PRIOR_WEIGHT = 4.0

# Sizes that no step has had for long are tried where, at no more time than the best one, they would bring so much more.
_TRY_SIZE_EVERY = 4
_WORTH_KNOWING, _FURTHER = 1.05, 1.5
# Where plain decoding looks nearly as fast as drafting, each is tried for a moment while the other is in use: after so
# many steps, then after so many times as many each time.
_NEARLY = 0.6
_TRY_AFTER, _LONGER, _TRY_AT_LAST = 4, 3, 1024
_TRY_UNLIKELY_AFTER = 100
_TRIAL_STEPS = 3

_BIN_WIDTH = 0.5
_NUM_BINS = 20


class Growth(Protocol):
    """Decides how a drafter grows its tree."""

    @property
    def max_nodes(self) -> int:
        """The most nodes a tree may have; what memory was planned for."""

    def begins(self) -> bool:
        """Whether to draft at all for this step."""

    def expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """How many of the best open nodes the draft should read in its next pass; 0 ends the growth.

        Args:
            ranks: how many better nodes there are than each of the open ones; best first, as many as one pass may take.
            weights: their log weights.
        """

    def cut(self, weights: Sequence[float]) -> int:
        """How many of the best nodes to have verified; their log weights, best first."""

    def drafted(self, rows: int, seconds: float) -> None:
        """A pass of the draft took so long."""

    def verified(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """A step has ended.

        Args:
            step: its record.
            tree: the nodes that it verified.
            path: those that were accepted.
        """


@dataclass(frozen=True)
class FixedGrowth:
    """The `max_nodes` likeliest nodes, whatever they cost."""

    max_nodes: int

    def begins(self) -> bool:
        """Whenever there may be nodes."""
        return self.max_nodes > 0

    def expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """All of them."""
        return len(weights)

    def cut(self, weights: Sequence[float]) -> int:
        """All of them."""
        return len(weights)

    def drafted(self, rows: int, seconds: float) -> None:
        """Makes no difference."""

    def verified(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Makes no difference."""


class PayingGrowth:
    """For as long as the next nodes' expected accepted tokens pay for their time.

    Args:
        max_nodes: the most nodes a tree may have.
        expected: of steps, before any is measured; None if nothing is known.
    """

    def __init__(self, max_nodes: int, expected: Expectation | None = None) -> None:
        self.max_nodes = max_nodes
        self._expected = expected or _TYPICAL
        self._expected_weight = _EXPECTED_STEPS
        self._acceptance = _Acceptance()
        most_rows = 2 * max(max_nodes, self._expected.tree_nodes)
        self._draft = PassTimes(self._expected.draft_s, most_rows)
        self._target = PassTimes(self._expected.pass_s, most_rows)
        self._hits, self._visits = _PRIOR_WEIGHT * _HIT_RATE, _PRIOR_WEIGHT
        self._num_steps = 0
        self._ways = _Ways()

    def begins(self) -> bool:
        """Whether drafting has been faster than plain decoding, or is to be tried again."""
        return self.max_nodes > 0 and self._ways.uses_draft

    def expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """Those whose children are expected to bring more than they take."""
        rate, hit_rate = self._rate(), self._hit_rate()
        best_value = gained = 0.0
        best = 0
        for count, (rank, weight) in enumerate(zip(ranks, weights, strict=True), 1):
            gained += hit_rate * self._acceptance.of(weight) - rate * self._node_s(rank + 1)
            value = gained - rate * self._draft.at(count)
            if value > best_value:
                best_value, best = value, count
        return best

    def cut(self, weights: Sequence[float]) -> int:
        """The number of nodes at which expected tokens, less what their time is worth, are most."""
        tokens = list(accumulate((self._acceptance.of(weight) for weight in weights), initial=1.0))
        best = self._best(tokens)
        return self._unknown_size(best, tokens) or best

    def drafted(self, rows: int, seconds: float) -> None:
        """Learns what a pass of the draft takes."""
        if rows <= self.max_nodes:
            self._draft.add(rows, seconds)

    def verified(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Learns what a pass of the target takes, and how often nodes of such weights are accepted."""
        self._draft.learn()
        if step.new_rows > self.max_nodes or not step.token_ids:
            return  # a long prompt's pass says nothing of a tree's
        self._num_steps += 1
        self._expected_weight = max(_KEEP_EXPECTED * self._expected_weight, _LEAST_WEIGHT)
        if self._num_steps > 1:  # the first pass finds nothing in caches
            self._target.add(step.new_rows + step.tree_nodes, step.pass_s - step.draft_s)
            self._target.learn()
        promised = 1.0 + sum(self._acceptance.of(weight) for weight in tree.weights)
        if len(tree):
            self._acceptance.add(tree.weights, path)
            parents = set(tree.parents)
            self._hits = _KEEP_COUNTS * self._hits + len(path)
            self._visits = _KEEP_COUNTS * self._visits + sum(node in parents for node in (ROOT, *path))
        self._ways.step(len(step.token_ids), promised, step.pass_s, plain_s=self._target.at(1))

    def _best(self, tokens: Sequence[float]) -> int:
        """The size that pays best, by the tokens expected of each."""
        rate, alone_s = self._rate(), self._target.at(1)
        values = [expected - rate * (self._target.at(1 + nodes) - alone_s) for nodes, expected in enumerate(tokens)]
        return values.index(max(values))

    def _unknown_size(self, best: int, tokens: Sequence[float]) -> int:
        """A size other than the best one that is worth a try: never measured, and much better if it cost little."""
        if not best or self._num_steps % _TRY_SIZE_EVERY != _TRY_SIZE_EVERY - 1:
            return 0
        larger, smaller = min(2 * best, len(tokens) - 1), best // 2
        least_rows, most_rows = self._target.measured
        if 1 + larger > _FURTHER * most_rows and tokens[larger] > _WORTH_KNOWING * tokens[best]:
            return larger
        return smaller if _FURTHER * (1 + smaller) < least_rows else 0

    def _rate(self) -> float:
        """Tokens per second that a moment is worth: those of the faster way."""
        expected, weight = self._expected, self._expected_weight
        rows = max(round(expected.tree_nodes / expected.draft_passes), 1)
        expected_s = self._target.at(1 + expected.tree_nodes) + expected.draft_passes * self._draft.at(rows)
        drafted = self._ways.drafted.with_more(weight * expected.tokens_per_step, weight * expected_s)
        return max(drafted, self._ways.plain_per_s or 1 / self._target.at(1))

    def _hit_rate(self) -> float:
        """How often the token drawn behind an accepted node is among its children."""
        return self._hits / self._visits

    def _node_s(self, num_nodes: int) -> float:
        """What one node more than `num_nodes` adds to a pass; little while the pass waits for layers anyway."""
        return self._target.at(2 + num_nodes) - self._target.at(1 + num_nodes)


class _Rate:
    """Tokens per second over the last steps."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """One more step."""
        self._tokens = _KEEP_RATE * self._tokens + tokens
        self._seconds = _KEEP_RATE * self._seconds + seconds

    def with_more(self, tokens: float, seconds: float) -> float:
        """As if steps of so many tokens and seconds had been among the last."""
        return (self._tokens + tokens) / (self._seconds + seconds)

    @property
    def per_s(self) -> float:
        """0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0


class _Ways:
    """Which of drafting and plain decoding is the faster one, and when the other is tried."""

    def __init__(self) -> None:
        self.uses_draft = True
        self.drafted = _Rate()
        self._plain = _Rate()
        self._prefers_draft = True
        self._interval = self._left = _TRY_AFTER
        self._num_steps = 0

    @property
    def plain_per_s(self) -> float:
        """Tokens per second without a draft; 0 as long as that was not tried."""
        return self._plain.per_s

    def step(self, tokens: int, promised: float, seconds: float, plain_s: float) -> None:
        """A step has ended.

        Args:
            tokens: emitted.
            promised: that the tree was expected to bring: where few steps have to tell, luck is left out.
            seconds: taken.
            plain_s: what a step without a draft takes, as far as that is known.
        """
        self._num_steps += 1
        self._left -= 1
        on_trial = self.uses_draft != self._prefers_draft
        if self.uses_draft and not (on_trial and self._left + 1 == _TRIAL_STEPS):
            # the first step of a trial does not count: the draft has to read first what was written without it
            self.drafted.add(promised if on_trial else (promised + tokens) / 2, seconds)
        elif not self.uses_draft:
            self._plain.add(tokens, seconds)
        if self._left > 0:
            return
        if on_trial:
            self._judge()
        elif self._prefers_draft and 1 / plain_s < self._nearly * self.drafted.per_s:
            self._left = self._interval
        else:
            self._begin_trial()

    @property
    def _nearly(self) -> float:
        """How fast plain decoding must look to be worth a trial; what was never tried may be faster than it looks."""
        return _NEARLY if self._plain.per_s or self._num_steps < _TRY_UNLIKELY_AFTER else _NEARLY / 2

    def _begin_trial(self) -> None:
        self.uses_draft = not self.uses_draft
        if self.uses_draft:
            self.drafted = _Rate()
        else:
            self._plain = _Rate()
        self._left = _TRIAL_STEPS

    def _judge(self) -> None:
        prefers_draft = self.drafted.per_s > self._plain.per_s
        changed = prefers_draft != self._prefers_draft
        self._interval = _TRY_AFTER if changed else min(_LONGER * self._interval, _TRY_AT_LAST)
        self._prefers_draft = self.uses_draft = prefers_draft
        self._left = self._interval


class _Acceptance:
    """How likely a node is accepted, by its log weight: counted in bins, starting from the weight itself."""

    def __init__(self) -> None:
        prior = [math.exp(-_BIN_WIDTH * (i + 0.5)) for i in range(_NUM_BINS)]
        self._offered = [_PRIOR_WEIGHT] * _NUM_BINS
        self._accepted = [_PRIOR_WEIGHT * p for p in prior]
        self._probability = prior

    def of(self, weight: float) -> float:
        """Probability that a node of this log weight (at most 0) is accepted; straight lines from bin to bin."""
        place = -weight / _BIN_WIDTH - 0.5
        if place <= 0.0:
            return self._probability[0]
        if place >= _NUM_BINS - 1:
            return self._probability[-1]
        left = int(place)
        at_left, at_right = self._probability[left : left + 2]
        return at_left + (at_right - at_left) * (place - left)

    def add(self, weights: Sequence[float], path: Sequence[int]) -> None:
        """Nodes that were verified, and which of them were accepted."""
        self._offered = [_KEEP_COUNTS * each for each in self._offered]
        self._accepted = [_KEEP_COUNTS * each for each in self._accepted]
        for weight in weights:
            self._offered[_bin(weight)] += 1.0
        for node in path:
            self._accepted[_bin(weights[node])] += 1.0
        seen = [accepted / offered for accepted, offered in zip(self._accepted, self._offered, strict=True)]
        # a heavier node is never the less likely one
        self._probability = never_falling(seen[::-1], self._offered[::-1])[::-1]


def _bin(weight: float) -> int:
    return min(int(-weight / _BIN_WIDTH), _NUM_BINS - 1) if weight > -1e9 else _NUM_BINS - 1
