"""Where a target's layers are: which stay in device memory, which in host memory, and which come from the disk."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from operator import neg

from specchat.models.sizes.geometry import layer_sizes
from specchat.records.model import Dtype, ModelSpec
from specchat.units import GIB

NUM_SLOTS = 2
# A third slot takes a resident layer's place. While one layer is computed and the next one waits, its fill goes on, so
# that a pass whose reading and computing take about as long stays as fast as its reads alone.
SLOTS = (NUM_SLOTS, 3)
_LARGEST_RESERVE = 4 * GIB


@dataclass(frozen=True)
class TierSizes:
    """How many layers lie in each tier between passes, as far as time depends on it.

    Attributes:
        num_layers: decoder layers, L.
        num_in_ram, num_on_disk: streamed layers in host memory, and on the disk.
        ram_bytes, disk_bytes: total bytes of either.
        slots: staging buffers.
    """

    num_layers: int
    num_in_ram: int
    num_on_disk: int
    ram_bytes: int
    disk_bytes: int
    slots: int

    @property
    def num_streamed(self) -> int:
        """Layers that are not resident."""
        return self.num_in_ram + self.num_on_disk


@dataclass(frozen=True)
class LayerSplit:
    """Which layers stay with the device: as many, evenly spread.

    Attributes:
        num_resident: layers that stay.
        slots: staging buffers for the others; 0 if there are none.
        num_bytes: of resident layers and slots.
    """

    num_resident: int
    slots: int
    num_bytes: int


class PlacementOptions:
    """Ways to divide a target's layers, and where the streamed ones then are.

    Args:
        sizes: bytes of its layers.
        slots: numbers of them to try.
    """

    def __init__(self, sizes: tuple[int, ...], slots: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._are_alike = min(sizes) == max(sizes)  # as in most models
        self._splits = {each: _SplitsBySlots(sizes, each, are_alike=self._are_alike) for each in slots}
        self._placements: dict[tuple[int, int, int], TierSizes] = {}

    @property
    def least_bytes(self) -> int:
        """Of resident layers and slots, with the first number of slots."""
        return next(iter(self._splits.values())).least_bytes

    def split(self, budgets: Sequence[int]) -> list[tuple[int, LayerSplit]]:
        """Return the splits that keep most layers resident, per slot count; a later budget counts if it keeps more.

        Args:
            budgets: bytes for resident layers and slots, by what else gives way; the one to prefer first.

        Returns:
            The index of a budget, and what it allows.
        """
        found = (each for splits in self._splits.values() for each in _growing(splits, budgets))
        return list(dict.fromkeys(found))

    def place(self, split: LayerSplit, host_budget: int) -> TierSizes:
        """With as many of the streamed layers in host memory as there is budget for.

        Args:
            split: one of `split`.
            host_budget: bytes.
        """
        num_in_ram = self._num_in_ram(split.num_resident, host_budget)
        key = split.num_resident, split.slots, num_in_ram
        if key not in self._placements:
            self._placements[key] = self._placement(*key)
        return self._placements[key]

    def streamed_sizes(self, num_resident: int) -> dict[int, int]:
        """Bytes of the layers that do not stay, by index."""
        resident = set(interleaved(num_resident, len(self._sizes)))
        return {i: size for i, size in enumerate(self._sizes) if i not in resident}

    def _num_in_ram(self, num_resident: int, host_budget: int) -> int:
        if self._are_alike:
            return min(len(self._sizes) - num_resident, host_budget // self._sizes[0])
        return len(keep_in_ram(self.streamed_sizes(num_resident), host_budget))

    def _placement(self, num_resident: int, slots: int, num_in_ram: int) -> TierSizes:
        num_on_disk = len(self._sizes) - num_resident - num_in_ram
        if self._are_alike:
            ram_bytes, disk_bytes = num_in_ram * self._sizes[0], num_on_disk * self._sizes[0]
        else:
            sizes = self.streamed_sizes(num_resident)
            ram_bytes = sum(sizes[i] for i in among(sizes, num_in_ram))
            disk_bytes = sum(sizes.values()) - ram_bytes
        return TierSizes(len(self._sizes), num_in_ram, num_on_disk, ram_bytes, disk_bytes, slots)


@lru_cache(maxsize=512)
def placement_options(target: ModelSpec, dtype: Dtype, slots: int | None) -> PlacementOptions:
    """Those of a model's layers; a search asks more than once.

    Args:
        target: sizes of the model.
        dtype: that the layers are stored in.
        slots: as asked for, or None.
    """
    return PlacementOptions(layer_sizes(target, dtype), SLOTS if slots is None else (slots,))


class _SplitsBySlots:
    """Splits for a fixed slot count, most resident layers first, and the bytes of each.

    With unequal layers, memory is not monotonic in the resident count, so bisect over its running minimum.
    """

    def __init__(self, sizes: tuple[int, ...], slots: int, *, are_alike: bool) -> None:
        self._slots = slots
        num_layers = len(sizes)
        # as many slots as layers, or more: the layers might as well stay
        self._counts = (num_layers, *range(num_layers - slots - 1, -1, -1))
        if are_alike:
            needs = [num_layers * sizes[0], *((count + slots) * sizes[0] for count in self._counts[1:])]
        else:
            needs = [_needed(sizes, count, slots) for count in self._counts]
        self._least: list[int] = list(accumulate(needs, min))

    @property
    def least_bytes(self) -> int:
        return self._least[-1]

    def highest(self, budget: int) -> LayerSplit | None:
        """The first split that takes no more."""
        index = bisect_left(self._least, -budget, key=neg)
        if index == len(self._least):
            return None
        return LayerSplit(self._counts[index], self._slots if index else 0, self._least[index])


def _growing(splits: _SplitsBySlots, budgets: Sequence[int]) -> Iterator[tuple[int, LayerSplit]]:
    """What each budget allows, if that is more layers than the budget before: nothing gives way for nothing."""
    most = -1
    for index, budget in enumerate(budgets):
        split = splits.highest(budget)
        if split is not None and split.num_resident > most:
            most = split.num_resident
            yield index, split


def _needed(sizes: Sequence[int], num_resident: int, slots: int) -> int:
    """Of resident layers, and of slots that hold the largest of the others."""
    resident = set(interleaved(num_resident, len(sizes)))
    streamed = [size for i, size in enumerate(sizes) if i not in resident]
    return sum(sizes) - sum(streamed) + slots * max(streamed, default=0)


def usable_ram(available_bytes: int) -> int:
    """Return the part of the available host memory that may be used or pinned.

    A reserve of 25%, at most 4 GiB, stays for the rest of the system and for Python and its libraries. It shrinks with
    the memory, so that small machines and containers can run models, too.
    """
    return available_bytes - min(_LARGEST_RESERVE, available_bytes // 4)


def keep_in_ram(sizes: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """The streamed layers that stay in host memory: as many as there is budget for.

    Args:
        sizes: bytes of the streamed layers, by index.
        budget: bytes that there are for them.
    """
    most = min(len(sizes), budget // min(sizes.values(), default=1))
    for count in range(most, 0, -1):
        kept = among(sizes, count)
        if sum(sizes[i] for i in kept) <= budget:
            return kept
    return ()


def among(streamed: Mapping[int, int], num_chosen: int) -> tuple[int, ...]:
    """So many of the streamed layers, spread evenly: while they are computed, the disk reads on."""
    layers = tuple(streamed)
    return tuple(layers[j] for j in interleaved(num_chosen, len(layers)))


@cache
def interleaved(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly among all, the last one not among them: of resident ones among streamed.

    While resident layers are computed, the next streamed ones come. Behind the last streamed layer nothing comes in a
    pass, so whatever is computed there leaves the link idle; and before the first one all slots are full already.
    """
    if not num_chosen:
        return ()
    offset = max(num_layers // 2, num_chosen)
    ends = [(i * num_chosen + offset) // num_layers for i in range(num_layers + 1)]
    return tuple(i for i in range(num_layers) if ends[i + 1] > ends[i])
