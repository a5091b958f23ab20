"""The time of a pass by its number of rows: a predicted curve, corrected by measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# Old measurements fade by this factor with every new one: load and subject change within minutes.
_KEEP = 0.98
# Load comes and goes within seconds. Times that are measured at different times are compared by the load at each time.
_KEEP_LOAD = 0.8
# A size that is hardly known tells this share of what a known one tells about the load.
_LEAST_TRUST = 0.05
# How the times of sizes compare changes more slowly than the load, which is shared by all sizes.
_KEEP_SHAPE = 0.995
# Weight of a predicted value: it counts like this number of measurements.
PRIOR_WEIGHT = 4.0
# The same for sizes above the largest measured one, about which a prediction knows less.
_FAR_PRIOR_WEIGHT = 1.0
# Sizes above the largest measured one are taken to cost less than predicted, so that they are tried: this is the
# exponent of the predicted ratio. On a disk, 128 rows were predicted to take 1.7 times as long as 64, and took as long.
# Where computing takes over, the trial costs one pass.
_OPTIMISM = 0.5


class FadingRatio:
    """A ratio of two sums in which the latest terms count most.

    Means, not medians: preempted passes are part of the time that an answer takes on a busy machine.
    """

    def __init__(self, numerator: float = 0.0, denominator: float = 0.0, keep: float = _KEEP) -> None:
        self._numerator, self._denominator, self._keep = numerator, denominator, keep

    def add(self, numerator: float, denominator: float) -> None:
        """Add one term to each sum, and let the earlier ones fade."""
        self._numerator = self._keep * self._numerator + numerator
        self._denominator = self._keep * self._denominator + denominator

    @property
    def total(self) -> float:
        """Denominator: how much the ratio rests on."""
        return self._denominator

    def value(self, prior: float) -> float:
        """Return the ratio; the prior if nothing was added."""
        return self._numerator / self._denominator if self._denominator else prior


class PassTimes:
    """Seconds of a pass by its number of rows.

    A pass corrects two things. The level is shared by all sizes: it follows the load of the machine. The shape has a
    factor for each power of two, which is only learned from passes of this size: it does not fade while other sizes are
    measured. Between measured sizes, factors are interpolated. A size of up to twice the largest measured one is taken
    to need little more time than that one. So it is tried where this would pay, and then it is measured.

    Args:
        predicted: (rows, seconds) pairs, ascending.
        max_rows: largest number of rows to look up.
    """

    def __init__(self, predicted: Sequence[tuple[int, float]], max_rows: int) -> None:
        self._curve = _interpolated(predicted, max_rows)
        self._places = [math.log2(max(rows, 1)) for rows in range(max_rows + 1)]
        self._level, self._load = FadingRatio(), FadingRatio(keep=_KEEP_LOAD)
        self._shape: dict[int, FadingRatio] = {}
        self._corrections = [1.0] * (max_rows.bit_length() + 2)  # for 1, 2, 4, ... rows

    def at(self, rows: int) -> float:
        """Return the expected seconds of a pass."""
        place = self._places[rows]
        left = int(place)
        lower, upper = self._corrections[left : left + 2]
        return self._curve[rows] * (lower + (upper - lower) * (place - left))

    @property
    def level(self) -> float:
        """How many times the predicted seconds passes take, on average over the last ones."""
        return self._level.value(1.0)

    @property
    def load(self) -> float:
        """The same over the last few passes only: the load of the machine at the last pass."""
        return self._load.value(1.0)

    def is_measured(self, rows: int) -> bool:
        """Return whether a pass of about this size was measured."""
        return round(self._places[rows]) in self._shape

    def add(self, rows: int, seconds: float) -> None:
        """Learn from one measured pass."""
        correction, size = seconds / self._curve[rows], round(self._places[rows])
        if size not in self._shape:
            believed = self._corrections[size] / self.level
            weight = _FAR_PRIOR_WEIGHT if self._shape and size > max(self._shape) else PRIOR_WEIGHT
            self._shape[size] = FadingRatio(weight * believed, weight, _KEEP_SHAPE)
        trust = max(1 - PRIOR_WEIGHT / self._shape[size].total, _LEAST_TRUST)
        for level in (self._level, self._load):
            level.add(trust * correction / self._shape[size].value(1.0), trust)
        self._shape[size].add(correction / self.load, 1.0)
        known = [(place, self.level * self._shape[place].value(1.0)) for place in sorted(self._shape)]
        known.append(self._beyond(*known[-1]))
        self._corrections = _interpolated(known, len(self._corrections) - 1, extrapolate=False)

    def _beyond(self, place: int, correction: float) -> tuple[int, float]:
        """Return the next power of two above the largest measured one, and the correction to try it with."""
        curve, last = self._curve, len(self._curve) - 1
        ratio = curve[min(2 ** (place + 1), last)] / curve[min(2**place, last)]
        return place + 1, correction * ratio ** (_OPTIMISM - 1)


def _interpolated(points: Sequence[tuple[int, float]], last: int, *, extrapolate: bool = True) -> list[float]:
    """Return values at 0 to `last`: linear between points, constant before them; after them linear if `extrapolate`."""
    first_place, first_height = points[0]
    heights, slope = [first_height] * (first_place + 1), 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        slope = (y1 - y0) / (x1 - x0)
        heights += [y0 + slope * step for step in range(1, x1 - x0 + 1)]
    end, missing = heights[-1], last + 1 - len(heights)
    return [*heights, *(end + extrapolate * slope * step for step in range(1, missing + 1))]
