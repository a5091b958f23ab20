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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from specchat.config import Step
from specchat.engine.tree import ROOT, TokenTree

# What is measured is forgotten at these rates, per step: load and subject change within minutes.
_KEEP_RATE = 0.97
_KEEP_TIMES = 64
_KEEP_PASSES = 8
_KEEP_SIZES = 300
_KEEP_COUNTS = 0.995

# Before anything is measured.
_FIRST_NODES = 64
_HIT_RATE = 0.7

# The first steps offer trees of different sizes, or the cost of a node could not be told from that of a pass.
_EXPLORED = (1.0, 0.25)
# Where plain decoding looks nearly as fast as drafting, each is tried for a moment while the other is in use: after so
# many steps, then after twice as many each time.
_NEARLY = 0.6
_TRY_AFTER, _TRY_AT_LAST = 16, 1024
# What a few drafted steps emit says little; plain ones all emit one token. The first step of a trial is not counted:
# a draft has to read first what was written without it.
_TRIAL_STEPS = {"draft": 8, "plain": 3}

_BIN_WIDTH = 0.5
_NUM_BINS = 20
_PRIOR_WEIGHT = 8.0


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
    """

    def __init__(self, max_nodes: int) -> None:
        self.max_nodes = max_nodes
        self._acceptance = _Acceptance()
        self._draft, self._target = _LinearTime(), _Curve()
        self._hits, self._visits = _PRIOR_WEIGHT * _HIT_RATE, _PRIOR_WEIGHT
        self._num_steps = 0
        self._trials = _Trials()

    def begins(self) -> bool:
        """Whether drafting has been faster than plain decoding, or is to be tried again."""
        return self.max_nodes > 0 and (self._exploring() or self._trials.uses_draft)

    def expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        """Those whose children are expected to bring more than they take."""
        if self._exploring():
            return sum(rank < _FIRST_NODES for rank in ranks)
        rate, hit_rate = self._rate(), self._hit_rate()
        surplus = -rate * self._draft.fixed_s
        count = 0
        for rank, weight in zip(ranks, weights, strict=True):
            gain = hit_rate * self._acceptance.of(weight) - rate * (self._draft.each_s + self._node_s(rank + 1))
            if gain <= 0:
                break
            surplus += gain
            count += 1
        return count if surplus > 0 else 0

    def cut(self, weights: Sequence[float]) -> int:
        """The number of nodes at which expected tokens, less what their time is worth, are most."""
        if self._exploring():
            share = _EXPLORED[min(self._num_steps, len(_EXPLORED) - 1)]
            return min(len(weights), max(1, int(share * min(self.max_nodes, _FIRST_NODES))))
        rate = self._rate()
        alone_s = self._target.at(1)
        best_value = tokens = 0.0
        best = 0
        for node, weight in enumerate(weights):
            tokens += self._acceptance.of(weight)
            value = tokens - rate * (self._target.at(2 + node) - alone_s)
            if value > best_value:
                best_value, best = value, node + 1
        return best

    def drafted(self, rows: int, seconds: float) -> None:
        """Learns what a pass of the draft takes."""
        if rows <= self.max_nodes:
            self._draft.add(rows, seconds)

    def verified(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        """Learns what a pass of the target takes, and how often nodes of such weights are accepted."""
        if step.new_rows > self.max_nodes or not step.token_ids:
            return  # a long prompt's pass says nothing of a tree's
        self._num_steps += 1
        self._target.add(step.new_rows + step.tree_nodes, step.pass_s - step.draft_s)
        if len(tree):
            self._acceptance.add(tree.weights, path)
            parents = set(tree.parents)
            self._hits = _KEEP_COUNTS * self._hits + len(path)
            self._visits = _KEEP_COUNTS * self._visits + sum(node in parents for node in (ROOT, *path))
        if not self._exploring():
            self._trials.step(len(step.token_ids), step.pass_s, plain_s=self._target.at(1))

    def _exploring(self) -> bool:
        return self._num_steps < len(_EXPLORED)

    def _rate(self) -> float:
        """Tokens per second that a moment is worth."""
        return self._trials.best_per_s

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

    @property
    def per_s(self) -> float:
        """0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One more step."""
        self._tokens = _KEEP_RATE * self._tokens + tokens
        self._seconds = _KEEP_RATE * self._seconds + seconds


class _Trials:
    """Which way of decoding is the faster one, and when the other is tried."""

    def __init__(self) -> None:
        self.uses_draft = True
        self._prefers_draft = True
        self._rates = {True: _Rate(), False: _Rate()}
        self._interval = self._left = _TRY_AFTER

    @property
    def best_per_s(self) -> float:
        """Tokens per second of the faster one."""
        return max(rate.per_s for rate in self._rates.values())

    @property
    def _on_trial(self) -> bool:
        return self.uses_draft != self._prefers_draft

    def step(self, tokens: int, seconds: float, plain_s: float) -> None:
        """A step has ended.

        Args:
            tokens: emitted.
            seconds: taken.
            plain_s: what a step without a draft is expected to take.
        """
        self._left -= 1
        if not (self._on_trial and self._left + 1 == _TRIAL_STEPS["draft" if self.uses_draft else "plain"]):
            self._rates[self.uses_draft].add(tokens, seconds)
        if self._left > 0:
            return
        if self._on_trial:
            self._judge()
        elif self._prefers_draft and 1 / plain_s < _NEARLY * self.best_per_s:
            self._left = self._interval
        else:
            self.uses_draft = not self.uses_draft
            self._rates[self.uses_draft] = _Rate()
            self._left = _TRIAL_STEPS["draft" if self.uses_draft else "plain"]

    def _judge(self) -> None:
        prefers_draft = self._rates[True].per_s > self._rates[False].per_s
        changed = prefers_draft != self._prefers_draft
        self._interval = _TRY_AFTER if changed else min(2 * self._interval, _TRY_AT_LAST)
        self._prefers_draft = self.uses_draft = prefers_draft
        self._left = self._interval


class _Curve:
    """Seconds of a pass over the target by its rows, as measured at sizes within factors of two of each other.

    Any shape that never falls: flat while layers are on their way, steep once computing takes longer.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, int, float]]] = {}  # size class -> (step, rows, seconds)
        self._num_steps = 0
        self._points: list[tuple[float, float]] = []

    def add(self, rows: int, seconds: float) -> None:
        """One more pass."""
        self._num_steps += 1
        self._seen.setdefault((rows - 1).bit_length(), deque(maxlen=_KEEP_PASSES)).append(
            (self._num_steps, rows, seconds)
        )
        points = []
        for _, seen in sorted(self._seen.items()):
            if seen[-1][0] < self._num_steps - _KEEP_SIZES:
                continue  # too long ago: better guessed from its neighbours, and tried again
            points.append((sum(rows for _, rows, _ in seen) / len(seen), median(s for _, _, s in seen), len(seen)))
        self._points = _never_falling(points)

    def at(self, rows: float) -> float:
        """Expected seconds of a pass."""
        if len(self._points) == 1:  # half of it for being a pass, half for its rows
            ((known, seconds),) = self._points
            return seconds * (0.5 + 0.5 * rows / known)
        above = next((i for i, (known, _) in enumerate(self._points) if known >= rows), len(self._points) - 1)
        (x0, y0), (x1, y1) = self._points[max(above, 1) - 1 : max(above, 1) + 1]
        return max(y0 + (y1 - y0) * (rows - x0) / (x1 - x0), 0.0)


def _never_falling(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """The never falling sequence nearest to the points' heights: neighbours out of order take their common mean.

    Args:
        points: (x, y, weight), by x.

    Source: the pool-adjacent-violators algorithm; M. Ayer et al., Annals of Mathematical Statistics 26, 1955.
    """
    pools: list[tuple[float, int, list[float]]] = []  # height, weight, the x in it
    for x, y, weight in points:
        pools.append((y, weight, [x]))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (ya, wa, xa), (yb, wb, xb) = pools[-2:]
            pools[-2:] = [((ya * wa + yb * wb) / (wa + wb), wa + wb, xa + xb)]
    return [(x, y) for y, _, xs in pools for x in xs]


class _LinearTime:
    """Seconds of a pass as a constant plus so much per row, fitted to the last passes."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=_KEEP_TIMES)
        self.fixed_s = self.each_s = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """One more pass.

        Ordinary least squares; a slope that is lost in the noise counts as none, and passes of one size are taken to
        cost half for being passes and half for their rows.
        """
        self._seen.append((rows, seconds))
        n = len(self._seen)
        mean_rows = sum(r for r, _ in self._seen) / n
        mean_s = sum(s for _, s in self._seen) / n
        variance = sum((r - mean_rows) ** 2 for r, _ in self._seen)
        if variance < 1.0:
            self.each_s = mean_s / (2 * mean_rows)
        else:
            slope = sum((r - mean_rows) * (s - mean_s) for r, s in self._seen) / variance
            self.each_s = min(max(slope, 0.0), mean_s / mean_rows)
        self.fixed_s = mean_s - self.each_s * mean_rows

    def at(self, rows: int) -> float:
        """Expected seconds of a pass."""
        return self.fixed_s + self.each_s * rows


class _Acceptance:
    """How likely a node is accepted, by its log weight: counted in bins, starting from the weight itself."""

    def __init__(self) -> None:
        prior = [math.exp(-_BIN_WIDTH * (i + 0.5)) for i in range(_NUM_BINS)]
        self._offered = [_PRIOR_WEIGHT] * _NUM_BINS
        self._accepted = [_PRIOR_WEIGHT * p for p in prior]
        self._probability = prior

    def of(self, weight: float) -> float:
        """Probability that a node of this log weight (at most 0) is accepted."""
        return self._probability[_bin(weight)]

    def add(self, weights: Sequence[float], path: Sequence[int]) -> None:
        """Nodes that were verified, and which of them were accepted."""
        self._offered = [_KEEP_COUNTS * each for each in self._offered]
        self._accepted = [_KEEP_COUNTS * each for each in self._accepted]
        for weight in weights:
            self._offered[_bin(weight)] += 1.0
        for node in path:
            self._accepted[_bin(weights[node])] += 1.0
        most = 0.0
        for i in reversed(range(_NUM_BINS)):  # a heavier node is never the less likely one
            most = max(most, self._accepted[i] / self._offered[i])
            self._probability[i] = most


def _bin(weight: float) -> int:
    return min(int(-weight / _BIN_WIDTH), _NUM_BINS - 1) if weight > -1e9 else _NUM_BINS - 1
