"""How long a pass takes by its rows: expected at first, then as measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

# What is measured at a size is the median of its last passes, and counts for less the longer ago it was: load changes
# within minutes. Beyond a time it is better guessed from other sizes.
_KEEP_PASSES = 32
_KEEP_SHARE = 0.99
_FORGET_AFTER = 300
# By how much expectations are off from one size to the next, beyond what they are off by as a whole: as a logarithm.
_DRIFT = 0.1
# The variance of a pass's logarithm is taken from pairs of passes of one size; a hiccup counts as no more than this.
_VARIANCE, _KEEP_VARIANCE = 0.01, 0.95
_MOST_OFF = 0.5
_LEAST_VARIANCE = 1e-4
_UNMEASURED = 0.1


class PassTimes:
    """Seconds of a pass by its rows: what was expected, times a correction that sizes near each other have in common.

    One measured pass corrects all sizes alike; many of them at several sizes give any shape that never falls, such as
    flat while layers are on their way and steep once computing takes longer.

    Args:
        expected: (rows, seconds), ascending.
        most_rows: that will be asked for.
    """

    def __init__(self, expected: Sequence[tuple[int, float]], most_rows: int) -> None:
        self._sizes = _sizes(most_rows)
        self._expected = _filled([rows for rows, _ in expected], [s for _, s in expected], self._sizes[-1])
        self._seconds = self._expected
        self._seen = [deque[tuple[int, float]](maxlen=_KEEP_PASSES) for _ in self._sizes]  # (pass, log correction)
        self._variance = _VARIANCE
        self._num_passes = 0

    def at(self, rows: int) -> float:
        """Expected seconds of a pass."""
        return self._seconds[rows]

    def add(self, rows: int, seconds: float) -> None:
        """One more pass; `learn` makes something of it."""
        self._num_passes += 1
        if rows < len(self._expected):
            correction = math.log(max(seconds, 1e-9) / self._expected[rows])
            seen = self._seen[self._nearest(rows)]
            if seen:
                off = min(abs(correction - seen[-1][1]), _MOST_OFF)
                self._variance = _KEEP_VARIANCE * self._variance + (1 - _KEEP_VARIANCE) * off**2 / 2
            seen.append((self._num_passes, correction))

    @property
    def measured(self) -> tuple[int, int]:
        """The least and the most rows, or about so many, of the passes that are not forgotten; (1, 1) without any."""
        known = [rows for place, rows in enumerate(self._sizes) if self._weight(place)]
        return (known[0], known[-1]) if known else (1, 1)

    def learn(self) -> None:
        """Corrects all sizes by the passes that were added."""
        weights = [self._weight(place) for place in range(len(self._sizes))]
        if not any(weights):
            return
        measured = [
            median(correction for _, correction in seen) if weight else 0.0
            for seen, weight in zip(self._seen, weights, strict=True)
        ]
        corrections = _smoothed(measured, weights, max(self._variance, _LEAST_VARIANCE) / _DRIFT**2)
        seconds = [
            self._expected[rows] * math.exp(correction)
            for rows, correction in zip(self._sizes, corrections, strict=True)
        ]
        certain = [weight + _UNMEASURED for weight in weights]
        self._seconds = _filled(self._sizes, never_falling(seconds, certain), self._sizes[-1])

    def _nearest(self, rows: int) -> int:
        above = min(bisect_left(self._sizes, rows), len(self._sizes) - 1)
        nearer_below = above > 0 and rows * rows < self._sizes[above - 1] * self._sizes[above]
        return above - 1 if nearer_below else above

    def _weight(self, place: int) -> float:
        """How much is known of a size, in passes just measured."""
        seen = self._seen[place]
        age = self._num_passes - seen[-1][0] if seen else _FORGET_AFTER
        return len(seen) * float(_KEEP_SHARE**age) if age < _FORGET_AFTER else 0.0


def _sizes(most_rows: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 ... until `most_rows` is reached."""
    sizes, power = [1], 2
    while sizes[-1] < most_rows:
        sizes += [power, power + power // 2]
        power *= 2
    return sizes


def _filled(rows: Sequence[int], seconds: Sequence[float], most_rows: int) -> list[float]:
    """Seconds for 0 to `most_rows` rows: straight lines between the given points, flat before them, on and on behind.

    Args:
        rows: ascending.
        seconds: for these.
        most_rows: of the last one.
    """
    filled = [seconds[0]] * (rows[0] + 1)
    slope = 0.0
    for (x0, y0), (x1, y1) in pairwise(zip(rows, seconds, strict=True)):
        slope = (y1 - y0) / (x1 - x0)
        filled += [y0 + slope * step for step in range(1, x1 - x0 + 1)]
    last, behind = filled[-1], most_rows + 1 - len(filled)
    return [*filled, *(last + slope * step for step in range(1, behind + 1))][: most_rows + 1]


def _smoothed(values: Sequence[float], weights: Sequence[float], stiffness: float) -> list[float]:
    """The sequence nearest to the values that changes slowly: least squares of both, deviations and changes.

    Args:
        values: one per place.
        weights: how much each of them counts; 0 where there is none, and not 0 everywhere.
        stiffness: how much changes from place to place count.
    """
    last = len(values) - 1
    diagonal, right = list[float](), list[float]()
    for place, (value, weight) in enumerate(zip(values, weights, strict=True)):  # tridiagonal: one sweep down ...
        around = stiffness * ((place > 0) + (place < last))
        share = stiffness / diagonal[-1] if place else 0.0
        diagonal.append(weight + around - stiffness * share)
        right.append(weight * value + (share * right[-1] if place else 0.0))
    smoothed = [right[last] / diagonal[last]]
    for place in range(last - 1, -1, -1):  # ... and one up
        smoothed.append((right[place] + stiffness * smoothed[-1]) / diagonal[place])
    return smoothed[::-1]


def never_falling(heights: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The never falling sequence nearest to the heights: neighbours out of order take their common mean.

    Source: the pool-adjacent-violators algorithm; M. Ayer et al., Annals of Mathematical Statistics 26, 1955.
    """
    pools: list[tuple[float, float, int]] = []  # height, weight, how many
    for height, weight in zip(heights, weights, strict=True):
        pools.append((height, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (ya, wa, na), (yb, wb, nb) = pools[-2:]
            pools[-2:] = [((ya * wa + yb * wb) / (wa + wb), wa + wb, na + nb)]
    return [height for height, _, count in pools for _ in range(count)]
