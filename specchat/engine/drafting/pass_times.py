"""The time of a pass by its number of rows: a predicted curve, corrected by measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# Old measurements fade by this factor with every new one: load and subject change within minutes.
_KEEP = 0.98
# Weight of a predicted value: it counts like this number of measurements.
PRIOR_WEIGHT = 4.0


class FadingRatio:
    """A ratio of two sums in which the latest terms count most.

    Means, not medians: preempted passes are part of the time that an answer takes on a busy machine.
    """

    def __init__(self, numerator: float = 0.0, denominator: float = 0.0) -> None:
        self._numerator, self._denominator = numerator, denominator

    def add(self, numerator: float, denominator: float) -> None:
        """Add one term to each sum, and let the earlier ones fade."""
        self._numerator = _KEEP * self._numerator + numerator
        self._denominator = _KEEP * self._denominator + denominator

    def value(self, prior: float, weight: float = 0.0) -> float:
        """Return the ratio, blended with a prior of the given weight; the prior itself if nothing was added."""
        denominator = self._denominator + weight
        return (self._numerator + prior * weight) / denominator if denominator else prior


class PassTimes:
    """Seconds of a pass by its number of rows.

    The first measured pass corrects the whole curve. Later passes correct it by size: each power of two has its own
    correction, which starts from the correction of the whole curve. Between measured sizes, corrections are
    interpolated.

    Args:
        predicted: (rows, seconds) pairs, ascending.
        max_rows: largest number of rows to look up.
    """

    def __init__(self, predicted: Sequence[tuple[int, float]], max_rows: int) -> None:
        self._curve = _interpolated(predicted, max_rows)
        self._places = [math.log2(max(rows, 1)) for rows in range(max_rows + 1)]
        self._common = FadingRatio()
        self._measured: dict[int, FadingRatio] = {}
        self._corrections = [1.0] * (max_rows.bit_length() + 2)  # for 1, 2, 4, ... rows

    def at(self, rows: int) -> float:
        """Return the expected seconds of a pass."""
        place = self._places[rows]
        left = int(place)
        lower, upper = self._corrections[left : left + 2]
        return self._curve[rows] * (lower + (upper - lower) * (place - left))

    def is_measured(self, rows: int) -> bool:
        """Return whether a pass of about this size was measured."""
        return round(self._places[rows]) in self._measured

    def add(self, rows: int, seconds: float) -> None:
        """Learn from one measured pass."""
        correction = seconds / self._curve[rows]
        self._common.add(correction, 1.0)
        size = round(self._places[rows])
        self._measured.setdefault(size, FadingRatio())
        for each, ratio in self._measured.items():  # old measurements of other sizes fade too
            is_measured = float(each == size)
            ratio.add(is_measured * correction, is_measured)
        common = self._common.value(1.0)
        known = [(place, self._measured[place].value(common, PRIOR_WEIGHT)) for place in sorted(self._measured)]
        self._corrections = _interpolated(known, len(self._corrections) - 1, extrapolate=False)


def _interpolated(points: Sequence[tuple[int, float]], last: int, *, extrapolate: bool = True) -> list[float]:
    """Return values at 0 to `last`: linear between points, constant before them; after them linear if `extrapolate`."""
    first_place, first_height = points[0]
    heights, slope = [first_height] * (first_place + 1), 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        slope = (y1 - y0) / (x1 - x0)
        heights += [y0 + slope * step for step in range(1, x1 - x0 + 1)]
    end, missing = heights[-1], last + 1 - len(heights)
    return [*heights, *(end + extrapolate * slope * step for step in range(1, missing + 1))]
