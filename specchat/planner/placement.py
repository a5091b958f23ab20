"""Placement of a target's layers: in device memory, in host memory, or on disk."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from operator import neg

from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import layer_sizes
from specchat.planner.experts import ExpertTier
from specchat.records.microbatches import Stretch
from specchat.records.model import Dtype, ModelSpec
from specchat.units import GIB, MIB

NUM_SLOTS = 2
# A third slot takes the place of a resident layer. With it, reads continue while one layer is computed and the next one
# waits. So if reading and computing take about equal times, a pass takes only the time of its reads.
SLOTS = (NUM_SLOTS, 3)
# Host memory that is never pinned for a GPU.
_UNPINNED_BYTES = 8 * GIB
_LARGEST_RESERVE, _LEAST_CONFINED_RESERVE = 4 * GIB, 96 * MIB
_LEAST_EXPANDED = 0.5  # share of the layers


@dataclass(frozen=True)
class Share:
    """Numbers of layers of one device that stay in its memory, and that it streams."""

    num_resident: int = 0
    num_streamed: int = 0

    @property
    def num_layers(self) -> int:
        """Number of layers of the device."""
        return self.num_resident + self.num_streamed


@dataclass(frozen=True)
class TierSizes:
    """Layers and bytes in each tier between passes: the part of a placement that determines pass times.

    Attributes:
        num_layers: number of decoder layers, L.
        num_in_ram, num_on_disk: numbers of streamed layers in host memory and on disk.
        ram_bytes, disk_bytes: total bytes of these layers.
        slots: number of staging buffers.
        experts: experts that are read one by one, while everything else is resident; None if whole layers stream.
        num_expanded: number of resident layers whose quantized matrices take more memory to be faster.
        shares: numbers of layers of each device; empty for one device.
        num_hops: number of times that rows change the device in a pass.
        stretches: layers in sequence on one device, if passes over several devices may have microbatches.
    """

    num_layers: int
    num_in_ram: int = 0
    num_on_disk: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    slots: int = 0
    experts: ExpertTier | None = None
    num_expanded: int = 0
    shares: tuple[Share, ...] = ()
    num_hops: int = 0
    stretches: tuple[Stretch, ...] = ()

    @property
    def num_streamed(self) -> int:
        """Number of layers that are not resident."""
        return self.num_in_ram + self.num_on_disk


@dataclass(frozen=True)
class LayerSplit:
    """Split of the layers into resident and streamed ones; resident layers are spread evenly.

    Attributes:
        num_resident: number of resident layers.
        slots: number of staging buffers for streamed layers; 0 if all layers are resident.
        num_bytes: bytes of resident layers, of slots and of copies of streamed layers.
    """

    num_resident: int
    slots: int
    num_bytes: int


class PlacementOptions:
    """Options to split a target's layers and to place the streamed ones.

    Args:
        sizes: bytes of each layer.
        slots: slot counts to try.
        copies: bytes that each streamed layer takes besides, as a low-bit copy; empty without copies.
    """

    def __init__(self, sizes: tuple[int, ...], slots: tuple[int, ...], copies: tuple[int, ...] = ()) -> None:
        self._sizes = sizes
        self._is_uniform = min(sizes) == max(sizes)  # as in most models
        splits_alike = self._is_uniform and not copies
        copies = copies or (0,) * len(sizes)
        self._splits = {each: _SplitsBySlots(sizes, copies, each, is_uniform=splits_alike) for each in slots}
        self._placements: dict[tuple[int, int, int], TierSizes] = {}

    @property
    def least_bytes(self) -> int:
        """Least bytes of resident layers and slots, with the first slot count."""
        return next(iter(self._splits.values())).least_bytes

    def split(self, budgets: Sequence[int]) -> list[tuple[int, LayerSplit]]:
        """Return the split with most resident layers for each slot count; later budgets only if they keep more layers.

        Args:
            budgets: bytes available for resident layers and slots, in order of preference.

        Returns:
            Pairs of the index of a budget and the split that fits it.
        """
        found = (each for splits in self._splits.values() for each in _improving_splits(splits, budgets))
        return list(dict.fromkeys(found))

    def place(self, split: LayerSplit, host_budget: int) -> TierSizes:
        """Return the tier sizes of a split, with as many streamed layers in host memory as fit.

        Args:
            split: layer split, as `split` returns it.
            host_budget: bytes of host memory available for streamed layers.
        """
        num_in_ram = self._num_in_ram(split.num_resident, host_budget)
        key = split.num_resident, split.slots, num_in_ram
        if key not in self._placements:
            self._placements[key] = self._placement(*key)
        return self._placements[key]

    def streamed_bytes(self, split: LayerSplit) -> int:
        """Return the bytes of all streamed layers of a split."""
        if self._is_uniform:
            return (len(self._sizes) - split.num_resident) * self._sizes[0]
        return sum(self.streamed_sizes(split.num_resident).values())

    def streamed_sizes(self, num_resident: int) -> dict[int, int]:
        """Return the bytes of the streamed layers, by index."""
        resident = set(interleaved(num_resident, len(self._sizes)))
        return {i: size for i, size in enumerate(self._sizes) if i not in resident}

    def _num_in_ram(self, num_resident: int, host_budget: int) -> int:
        if self._is_uniform:
            return min(len(self._sizes) - num_resident, host_budget // self._sizes[0])
        return len(keep_in_ram(self.streamed_sizes(num_resident), host_budget))

    def _placement(self, num_resident: int, slots: int, num_in_ram: int) -> TierSizes:
        num_on_disk = len(self._sizes) - num_resident - num_in_ram
        if self._is_uniform:
            ram_bytes, disk_bytes = num_in_ram * self._sizes[0], num_on_disk * self._sizes[0]
        else:
            sizes = self.streamed_sizes(num_resident)
            ram_bytes = sum(sizes[i] for i in among(sizes, num_in_ram))
            disk_bytes = sum(sizes.values()) - ram_bytes
        return TierSizes(len(self._sizes), num_in_ram, num_on_disk, ram_bytes, disk_bytes, slots)


@lru_cache(maxsize=512)
def placement_options(
    target: ModelSpec, dtype: Dtype, slots: int | None, copy: ModelSpec | None = None
) -> PlacementOptions:
    """Return the placement options of a model; cached, because a search needs them several times.

    Args:
        target: sizes of the model.
        dtype: dtype of the stored layers.
        slots: requested slot count; None tries all of `SLOTS`.
        copy: sizes of the low-bit copy that streamed layers have on the device, or None.
    """
    copies = () if copy is None else layer_sizes(copy, dtype)
    return PlacementOptions(layer_sizes(target, dtype), SLOTS if slots is None else (slots,), copies)


class _SplitsBySlots:
    """Splits for a fixed slot count, most resident layers first, and the bytes of each.

    With unequal layers, memory is not monotonic in the resident count, so bisect over its running minimum.
    """

    def __init__(self, sizes: tuple[int, ...], copies: tuple[int, ...], slots: int, *, is_uniform: bool) -> None:
        self._slots = slots
        num_layers = len(sizes)
        # Skip splits with at least as many slots as streamed layers: these layers could as well be resident.
        self._counts = (num_layers, *range(num_layers - slots - 1, -1, -1))
        if is_uniform:
            needs = [num_layers * sizes[0], *((count + slots) * sizes[0] for count in self._counts[1:])]
        else:
            needs = [_split_bytes(sizes, copies, count, slots) for count in self._counts]
        self._running_min: list[int] = list(accumulate(needs, min))

    @property
    def least_bytes(self) -> int:
        return self._running_min[-1]

    def largest_within(self, budget: int) -> LayerSplit | None:
        """Return the split with most resident layers that fits the budget; None if none fits."""
        index = bisect_left(self._running_min, -budget, key=neg)
        if index == len(self._running_min):
            return None
        return LayerSplit(self._counts[index], self._slots if index else 0, self._running_min[index])


def _improving_splits(splits: _SplitsBySlots, budgets: Sequence[int]) -> Iterator[tuple[int, LayerSplit]]:
    """Yield the split for each budget that keeps more layers resident than all budgets before."""
    most = -1
    for index, budget in enumerate(budgets):
        split = splits.largest_within(budget)
        if split is not None and split.num_resident > most:
            most = split.num_resident
            yield index, split


def _split_bytes(sizes: Sequence[int], copies: Sequence[int], num_resident: int, slots: int) -> int:
    """Return the bytes of resident layers, of slots that hold the largest streamed layer, and of copies."""
    resident = set(interleaved(num_resident, len(sizes)))
    streamed = [i for i in range(len(sizes)) if i not in resident]
    held = sum(size for i, size in enumerate(sizes) if i in resident) + sum(copies[i] for i in streamed)
    return held + slots * max((sizes[i] for i in streamed), default=0)


def pinnable_ram(machine: Machine) -> int:
    """Return the host memory that a plan may use on a machine.

    What a GPU's layers take is pinned, so the system cannot swap it out or drop it, and a desktop without the rest
    stalls. 8 GiB stay for that, or a quarter of the memory on machines with less than 32 GiB.
    """
    usable = usable_ram(machine.ram_available_bytes, is_confined=machine.is_confined)
    total = machine.total_bytes - machine.device_total_bytes
    if machine.device == "cpu" or machine.is_confined or total <= 0:
        return usable
    return min(usable, total - min(_UNPINNED_BYTES, total // 4))


def usable_ram(available_bytes: int, *, is_confined: bool = False) -> int:
    """Return the part of the available host memory that may be used or pinned.

    A reserve of 25%, at most 4 GiB, stays for the rest of the system. It shrinks with the memory, so that small
    machines can run models, too. In a control group there is no rest of the system. Half of the reserve is left there
    for windows of readers and for what allocators do not reuse, and at least what `pressure.MemoryWatch` keeps free.

    Args:
        available_bytes: available memory without what this process will take for libraries.
        is_confined: whether a control group leaves less memory than the system does.
    """
    if not is_confined:
        return available_bytes - min(_LARGEST_RESERVE, available_bytes // 4)
    reserve = min(_LARGEST_RESERVE, max(available_bytes // 8, _LEAST_CONFINED_RESERVE))
    return max(available_bytes - reserve, 0)


def needed_ram(used_bytes: int, *, is_confined: bool) -> int:
    """Return the least available memory of which `usable_ram` leaves some bytes, or a few more."""
    if not is_confined:
        return used_bytes + min(_LARGEST_RESERVE, -(-used_bytes // 3))
    return used_bytes + min(_LARGEST_RESERVE, max(-(-used_bytes // 7), _LEAST_CONFINED_RESERVE))


def keep_in_ram(sizes: Mapping[int, int], budget: int) -> tuple[int, ...]:
    """Return the streamed layers to keep in host memory, as many as fit the budget.

    Args:
        sizes: bytes of the streamed layers, by index.
        budget: bytes available for these layers.
    """
    most = min(len(sizes), budget // min(sizes.values(), default=1))
    for count in range(most, 0, -1):
        kept = among(sizes, count)
        if sum(sizes[i] for i in kept) <= budget:
            return kept
    return ()


def among(streamed: Mapping[int, int], num_chosen: int) -> tuple[int, ...]:
    """Return `num_chosen` streamed layers, spread evenly: the disk reads others while these are computed."""
    layers = tuple(streamed)
    return tuple(layers[j] for j in interleaved(num_chosen, len(layers)))


def num_expanded(sizes: Sequence[int], expanded: Sequence[int], room: int) -> int:
    """Return how many resident layers take more memory to be faster: as many as fit, or none.

    Dequantizing and packing take a second per GB while loading, so a small share of the layers is not worth it.

    Args:
        sizes: bytes of each layer.
        expanded: bytes of each layer if it takes more memory.
        room: bytes that the plan leaves.
    """
    most = max(large - size for large, size in zip(expanded, sizes, strict=True))
    count = min(len(sizes), max(room, 0) // most) if most > 0 else len(sizes)
    return count if count >= _LEAST_EXPANDED * len(sizes) else 0


@cache
def interleaved(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Return `num_chosen` layers spread evenly, without the last layer unless all are chosen.

    The next streamed layers load while resident layers are computed. No layer loads after the last streamed one in a
    pass. Resident layers behind it would leave the link idle. Before the first streamed layer, all slots are full.
    """
    if not num_chosen:
        return ()
    offset = max(num_layers // 2, num_chosen)
    ends = [(i * num_chosen + offset) // num_layers for i in range(num_layers + 1)]
    return tuple(i for i in range(num_layers) if ends[i + 1] > ends[i])
