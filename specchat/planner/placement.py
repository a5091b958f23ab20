"""Where a target's layers are: which stay in device memory, which in host memory, and which come from the disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from specchat.config import Dtype, ModelSpec
from specchat.models.geometry import layer_bytes
from specchat.planner.memory import Workload, build_ledger, host_embedding_bytes, lookup_bytes
from specchat.units import GIB

NUM_SLOTS = 2
# A third slot takes a resident layer's place. While one layer is computed and the next one waits, its fill goes on, so
# that a pass whose reading and computing take about as long stays as fast as its reads alone.
SLOTS = (NUM_SLOTS, 3)


@dataclass(frozen=True)
class Placement:
    """Where the target's layers are, as far as time depends on it.

    Attributes:
        num_layers: L.
        num_in_ram, num_on_disk: streamed layers by where they are between passes.
        ram_bytes, disk_bytes: their sizes together.
        slots: staging buffers.
    """

    num_layers: int
    num_in_ram: int
    num_on_disk: int
    ram_bytes: int
    disk_bytes: int
    slots: int


@dataclass(frozen=True)
class Placed:
    """Layers that stay, the workload with its slots, and the sum of its ledger."""

    work: Workload
    resident: tuple[int, ...]
    device_bytes: int


class Shelves:
    """Ways to divide a target's layers into resident and streamed ones.

    Args:
        target: its sizes.
        dtype: that they are stored in.
        slots: as asked for, or None.
        embeddings_room: host memory that the input embeddings may take.
    """

    def __init__(self, target: ModelSpec, dtype: Dtype, slots: int | None, embeddings_room: int) -> None:
        self.dtype: Dtype = dtype
        self.sizes = tuple(layer_bytes(target, i, dtype) for i in range(target.num_layers))
        self.target = target
        self._slots = SLOTS if slots is None else (slots,)
        self._embeddings_room = embeddings_room

    def fill(self, draft: ModelSpec | None, work: Workload, budget: int) -> list[Placed]:
        """For every number of slots the most layers that the budget lets stay, and more where embeddings make room."""
        ways = self._ways(draft, work)
        return list(dict.fromkeys(placed for slots in self._slots for placed in self._growing(ways, slots, budget)))

    def least_bytes(self, draft: ModelSpec | None, work: Workload) -> int:
        """What it takes to run at all."""
        beside = min(beside for _, beside in self._ways(draft, work))
        return beside + min(need for _, need, _ in self._divisions(self._slots[0]))

    def _ways(self, draft: ModelSpec | None, work: Workload) -> list[tuple[Workload, int]]:
        """With bytes of everything but layers and slots: all on the device, and if that can be without embeddings."""
        beside = sum(item.bytes for item in build_ledger(self.target, draft, work, ()))
        apart = replace(work, host_embeddings=True)
        if not self.target.lookup_params or host_embedding_bytes(self.target, apart) > self._embeddings_room:
            return [(work, beside)]
        return [(work, beside), (apart, beside - lookup_bytes(self.target, self.dtype))]

    def _growing(self, ways: Sequence[tuple[Workload, int]], slots: int, budget: int) -> Iterator[Placed]:
        """What each way allows, if that is more layers than the way before: embeddings do not move for nothing.

        Bringing their rows is not priced: it takes less than a thousandth of a step that streams.
        """
        most = -1
        for work, beside in ways:
            placed = self._most_resident(work, slots, beside, budget)
            if placed is not None and len(placed.resident) > most:
                most = len(placed.resident)
                yield placed

    def _most_resident(self, work: Workload, slots: int, beside: int, budget: int) -> Placed | None:
        for num_resident, need, slots_needed in self._divisions(slots):
            if beside + need <= budget:
                resident = interleaved(num_resident, len(self.sizes))
                return Placed(replace(work, slots=slots_needed), resident, beside + need)
        return None

    def _divisions(self, slots: int) -> Iterator[tuple[int, int, int]]:
        """(resident layers, bytes with slots, slots), most resident ones first."""
        for count, slots_needed in _divisions(len(self.sizes), slots):
            resident_bytes, largest = self._needs[count]
            yield count, resident_bytes + slots_needed * largest, slots_needed

    @cached_property
    def _needs(self) -> list[tuple[int, int]]:
        """By the number of resident layers: their bytes, and the largest streamed one's."""
        return [_resident_bytes(self.sizes, count) for count in range(len(self.sizes) + 1)]


def _resident_bytes(sizes: Sequence[int], count: int) -> tuple[int, int]:
    if min(sizes) == max(sizes):  # as in most models
        return count * sizes[0], sizes[0] if count < len(sizes) else 0
    resident = set(interleaved(count, len(sizes)))
    streamed = [size for i, size in enumerate(sizes) if i not in resident]
    return sum(sizes) - sum(streamed), max(streamed, default=0)


def _divisions(num_layers: int, slots: int) -> Iterator[tuple[int, int]]:
    """Ways to divide layers into resident and streamed ones, best first: (resident, slots)."""
    yield num_layers, 0
    for num_streamed in range(slots + 1, num_layers + 1):  # as many slots as layers: they might as well stay
        yield num_layers - num_streamed, slots


def usable_ram(available_bytes: int) -> int:
    """What may be taken, or pinned, of the host's available memory without the rest of the system feeling it."""
    return max(available_bytes - max(4 * GIB, available_bytes // 10), 0)


def keep_in_ram(sizes: Mapping[int, int], room: int) -> tuple[int, ...]:
    """The streamed layers that stay in host memory, spread evenly: while they are computed, the disk reads on.

    Args:
        sizes: bytes of the streamed layers, by index.
        room: bytes that there are for them.
    """
    streamed = tuple(sizes)
    most = min(len(streamed), room // min(sizes.values(), default=1))
    for count in range(most, 0, -1):
        kept = tuple(streamed[j] for j in interleaved(count, len(streamed)))
        if sum(sizes[i] for i in kept) <= room:
            return kept
    return ()


@cache
def interleaved(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly among all, the last one not among them: of resident ones among streamed.

    While resident layers are computed, the next streamed ones come. Behind the last streamed layer nothing comes in a
    pass, so whatever is computed there leaves the link idle; and before the first one all slots are full already.
    """
    offset = max(num_layers // 2, num_chosen)
    ends = [(i * num_chosen + offset) // num_layers for i in range(num_layers + 1)]
    return tuple(i for i in range(num_layers) if ends[i + 1] > ends[i])
