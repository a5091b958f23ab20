"""Predict passes whose rows are computed in microbatches, and choose their number.

Devices take turns: stretch by stretch, and within a stretch microbatch by microbatch. Every microbatch reads a layer's
weights from device memory again, so with few rows it takes as long as the whole pass would. Then a pass stays whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from specchat.records.microbatches import Microbatches, Stretch

COUNTS = (2, 3, 4, 6, 8)
# A pass is cut if that is expected to save this share of its time: less than predictions are wrong by.
_LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Hop:
    """The way of rows from one device to the next.

    Attributes:
        fixed_s: seconds of a message without rows.
        row_s: seconds of each row.
    """

    fixed_s: float
    row_s: float


def pipelined_s(
    stretches: Sequence[Stretch], stretch_s: Callable[[Stretch, int], float], hop: Hop, rows: int, count: int
) -> float:
    """Return the seconds in which all rows pass all stretches, without waiting for layers.

    Args:
        stretches: stretches of all layers, in order; rows begin and end on device 0.
        stretch_s: function from a stretch and a number of rows to seconds.
        hop: way between two devices.
        rows: rows of the pass.
        count: number of microbatches.
    """
    each = -(-rows // count)
    free: dict[int, float] = {}  # when a device has computed what it was given
    sent: dict[int, float] = {}  # when the rows that a device has sent are on their way
    ready, device = [0.0] * count, 0
    for stretch in (*stretches, None):
        owner = 0 if stretch is None else stretch.device
        seconds = 0.0 if stretch is None else stretch_s(stretch, each)
        for number in range(count):
            if owner != device:
                sent[device] = max(ready[number], sent.get(device, 0.0)) + each * hop.row_s
                ready[number] = sent[device] + hop.fixed_s
            ready[number] = free[owner] = max(ready[number], free.get(owner, 0.0)) + seconds
        device = owner
    return max(ready)


def choose_microbatches(seconds: Callable[[int, int], float], most_rows: int) -> Microbatches:
    """Return the number of microbatches that takes least time, for passes of any number of rows.

    Args:
        seconds: function from rows and a number of microbatches to the seconds of a pass.
        most_rows: most rows of a pass.
    """
    found = list[tuple[int, int]]()
    rows, last = 2, 1
    while rows <= most_rows:
        of_rows = partial(seconds, rows)
        count = best_count(of_rows, rows)
        if count != last and of_rows(count) < (1 - _LEAST_GAIN / 2) * of_rows(last):
            found.append((rows, count))
            last = count
        rows = max(rows + 1, rows * 5 // 4)
    return Microbatches(tuple(found))


def best_count(seconds: Callable[[int], float], rows: int) -> int:
    """Return the number of microbatches that takes least time; a larger one only where it clearly gains."""
    best, best_s = 1, seconds(1)
    for count in COUNTS:
        if count <= rows and (found_s := seconds(count)) < (1 - _LEAST_GAIN) * best_s:
            best, best_s = count, found_s
    return best
