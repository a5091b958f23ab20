"""Microbatches: parts of a pass's rows that several devices compute at the same time.

While the first microbatch moves on to the next device, the second one is computed with the same loaded layers. Layers
are read once for a pass, however many microbatches it has.
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Microbatches:
    """The number of microbatches of a pass, by the number of its rows.

    Attributes:
        counts: (rows, microbatches), rows ascending: what passes of at least these rows are cut into. Passes of fewer
            rows than the first ones stay whole.
    """

    counts: tuple[tuple[int, int], ...] = ()

    def count(self, num_rows: int) -> int:
        """Return the number of microbatches of a pass."""
        found = 1
        for rows, count in self.counts:
            if rows <= num_rows:
                found = count
        return min(found, num_rows)


WHOLE_PASSES = Microbatches()


@dataclass(frozen=True)
class Stretch:
    """Layers in sequence on one device, which a microbatch passes before the next one follows.

    Attributes:
        device: number of the device.
        first: index of the first layer.
        num_layers: number of layers.
        num_streamed: number of these layers that stream, at most 1: their slots serve all microbatches.
    """

    device: int
    first: int
    num_layers: int
    num_streamed: int

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return self.first + self.num_layers - 1


def stretches_of(owner: tuple[int, ...], streamed: frozenset[int]) -> tuple[Stretch, ...]:
    """Return the stretches of a model's layers, in order.

    Args:
        owner: number of the device of each layer.
        streamed: indices of the layers that stream.
    """
    found, first, num_streamed = list[Stretch](), 0, 0
    for index, device in enumerate(owner):
        streams = index in streamed
        if index and (device != owner[index - 1] or (streams and num_streamed)):
            found.append(Stretch(owner[first], first, index - first, num_streamed))
            first, num_streamed = index, 0
        num_streamed += streams
    return (*found, Stretch(owner[first], first, len(owner) - first, num_streamed))


def cuts_of(num_rows: int, count: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges [begin, end) of rows of each microbatch; equal up to a row, in the order of the pass."""
    return tuple(pairwise(num_rows * number // count for number in range(count + 1)))
