"""Reads experts from the files of a model into slots of any memory, in batches.

The computing thread begins the reads in each layer, so whatever they need besides the slot is worked out once: the
reads of each expert, with neighbours in a file together.

O_DIRECT needs page-aligned reads, but experts start anywhere in a file. So read an aligned window and copy the experts
out, as for layers of checkpoint shards. Reads through the page cache go directly into the slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from torch import Tensor

from specchat.engine.experts.batch import ReadBatch, ReadThreads
from specchat.engine.streaming.readers import OpenFiles, is_unbuffered, read_fully
from specchat.engine.streaming.slots import page_aligned
from specchat.models.packs.file_format import bytes_of
from specchat.models.weights.experts import Extent
from specchat.records.limits import EXPERT_WINDOW_BYTES, READ_THREADS

_PAGE = 4096
# Experts in one file that are no further apart are read together.
_LARGEST_GAP = 64 * 1024
_LEAST_READ = 256 * 1024
# A window holds the longest read, wherever it begins and ends within pages.
WINDOW_BYTES = EXPERT_WINDOW_BYTES + 2 * _PAGE
_DAMAGED = "delete the file and download it again"

# Byte ranges of a layer's experts: one tuple for each expert.
LayerExtents = Sequence[Sequence[Extent]]
# Verifies the bytes of a layer's file from `begin` to `end` before they are read; raises if they are damaged.
Verify = Callable[[int, int, int], None]
# Number of the file, start in the file, start in the slot, and size: plain numbers sort fast.
_Range = tuple[int, int, int, int]
# Start in the file, start in the slot, and size.
_Part = tuple[int, int, int]


# Reads a part of an expert into the slot that begins at a byte of the slab.
_ReadInto = Callable[[int], None]
# By decoder layer and expert; empty before an expert is read for the first time.
_Planned = Mapping[int, list[Sequence[_ReadInto]]]


@dataclass
class _Read:
    """One read of a file, and where the parts of it go.

    Attributes:
        file: number of the file to read.
        begin, end: bytes of the file.
        parts: parts by ascending start in the file.
    """

    file: int
    begin: int
    end: int
    parts: list[_Part] = field(default_factory=list)


class SlotMemory(Protocol):
    """Memory of slots, one after another.

    Attributes:
        slot_bytes: length of a slot.
        is_readable: whether files can be read directly into the slots.
        windows: memory in between, uint8, each for a read of `EXPERT_WINDOW_BYTES` that begins anywhere in a page.
    """

    slot_bytes: int
    is_readable: bool

    @property
    def windows(self) -> Iterable[Tensor]:
        """Memory in between, at least one window for each thread; asked for once."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Return bytes of the slots, to read a file into them."""

    def wait_for_window(self, window: Tensor) -> None:
        """Wait until what was copied out of a window has ended."""

    def copy(self, window: Tensor, parts: Sequence[tuple[int, int, int]]) -> None:
        """Copy parts of a window, or begin to: start in the window, start in the slots, and size."""

    def close(self) -> None:
        """Release the memory, after the last copy."""


class HostSlots:
    """Slots in host memory.

    Args:
        slab: memory of the slots, uint8 [slots * slot_bytes].
        slot_bytes: length of a slot.
    """

    is_readable = True

    def __init__(self, slab: Tensor, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._slab: Any = slab.numpy()
        self._bytes = bytes_of(slab)

    @property
    def windows(self) -> Iterable[Tensor]:
        """One window for each thread."""
        return [page_aligned(WINDOW_BYTES) for _ in range(READ_THREADS)]

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Return bytes of the slots."""
        return self._bytes[begin : begin + nbytes]

    def wait_for_window(self, window: Tensor) -> None:
        """Do nothing: copies have ended when `copy` returns."""

    def copy(self, window: Tensor, parts: Sequence[tuple[int, int, int]]) -> None:
        """Copy parts of a window; numpy's copies release the GIL and run on one thread."""
        source: Any = window.numpy()
        for begin, target, nbytes in parts:
            self._slab[target : target + nbytes] = source[begin : begin + nbytes]

    def close(self) -> None:
        """Do nothing: the memory is freed with the last tensor."""


class ExpertReader:
    """Reads experts into the slots of a slab, by threads.

    Args:
        extents: byte ranges of the experts, by decoder layer.
        memory: memory of the slots; closed together with the reader.
        cached: layers that are read through the page cache; the others bypass it.
        verify: verifies bytes of a layer's file before they are first read; None if they have no checksums.

    Attributes:
        expert_bytes: bytes that are read for one expert.
        wait_s: seconds that passes waited for experts.
    """

    def __init__(
        self,
        extents: Mapping[int, LayerExtents],
        memory: SlotMemory,
        cached: Collection[int] = (),
        verify: Verify | None = None,
    ) -> None:
        self._paths = list(dict.fromkeys(each.path for layer in extents.values() for own in layer for each in own))
        number = {path: file for file, path in enumerate(self._paths)}
        self._ranges: dict[int, list[list[_Range]]] = {
            layer: [
                _merged((number[each.path], each.begin, each.target, each.nbytes) for each in own) for own in experts
            ]
            for layer, experts in extents.items()
        }
        self.expert_bytes = sum(nbytes for *_, nbytes in next(iter(self._ranges.values()))[0])
        self._memory = memory
        self.wait_s = 0.0
        self._cached = set(cached)
        self._verify = verify
        # Reads of experts, worked out when they are first read: as few as possible, or enough for all threads.
        self._whole: _Planned = {layer: [()] * len(experts) for layer, experts in extents.items()}
        self._split: _Planned = {layer: [()] * len(experts) for layer, experts in extents.items()}
        self._opened: dict[tuple[int, bool], tuple[int, bool]] = {}  # descriptor, and whether it bypasses the cache
        self._windows = SimpleQueue[Tensor]()
        with ExitStack() as undo:
            self._files = OpenFiles()
            undo.callback(self._files.close)
            if self._cached < extents.keys() or not memory.is_readable:
                for window in memory.windows:
                    self._windows.put(window)
            self._threads = ReadThreads(READ_THREADS)
            undo.pop_all()

    def free_slots(self) -> None:
        """Do nothing: on a host, layers that used a slot have ended when their call returns."""

    def begin(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        is_few: bool,
        new_batch: Callable[[int], ReadBatch] = ReadBatch,
    ) -> ReadBatch:
        """Begin to read experts of a layer, and return at once.

        Args:
            layer: index of the decoder layer.
            experts: experts to read.
            slots: slot of each expert.
            is_few: whether these are too few for one thread each, so that several threads read one expert.
            new_batch: makes the batch for a number of tasks.
        """
        planned = (self._split if is_few else self._whole)[layer]
        tasks = [
            partial(read, slot * self._memory.slot_bytes)
            for expert, slot in zip(experts, slots, strict=True)
            for read in planned[expert] or self._plan(planned, layer, expert, is_few)
        ]
        return self._threads.begin(tasks, new_batch(len(tasks)))

    def wait_for(self, batch: ReadBatch) -> None:
        """Wait until the reads of a batch have ended, and raise the error of one of them."""
        if not batch.is_over:
            begin = time.perf_counter()
            batch.wait_until_over()
            self.wait_s += time.perf_counter() - begin
        batch.wait()

    def drain(self) -> None:
        """Wait until all reads have ended; a failed read counts as ended."""
        self._threads.drain()

    def close(self) -> None:
        """Wait for all reads, close the files, and release the memory."""
        self._threads.close()
        self._files.close()
        self._memory.close()

    def _plan(self, planned: list[Sequence[_ReadInto]], layer: int, expert: int, is_few: bool) -> Sequence[_ReadInto]:
        """Work out the reads of an expert, and keep them."""
        ranges = self._ranges[layer][expert]
        share = sum(nbytes for *_, nbytes in ranges) // READ_THREADS
        longest = min(max(share, _LEAST_READ), EXPERT_WINDOW_BYTES) if is_few else EXPERT_WINDOW_BYTES
        tasks: list[list[_ReadInto]] = []
        size = 0
        for read in _reads(ranges, longest):  # few tasks: each takes the computing thread a microsecond or two to queue
            size += read.end - read.begin
            if not tasks or size > longest:
                tasks.append([])
                size = read.end - read.begin
            tasks[-1].append(self._read(layer, read))
        planned[expert] = [task[0] if len(task) == 1 else partial(_read_all, task) for task in tasks]
        return planned[expert]

    def _read(self, layer: int, read: _Read) -> _ReadInto:
        key = read.file, layer in self._cached
        if key not in self._opened:
            file = self._files.open(self._paths[read.file], cached=key[1])
            self._opened[key] = file, is_unbuffered(file)
        file, unbuffered = self._opened[key]
        directly = self._memory.is_readable and not unbuffered
        return partial(self._read_parts if directly else self._read_window, layer, file, read)

    def _read_parts(self, layer: int, file: int, read: _Read, slot: int) -> None:
        """Read the parts of an expert directly into the slot that begins at byte `slot` of the memory."""
        if self._verify is not None:
            self._verify(layer, read.begin, read.end)
        for begin, target, nbytes in read.parts:
            memory = self._memory.view(slot + target, nbytes)
            read_fully(self._paths[read.file], file, memory, begin, nbytes, _DAMAGED)

    def _read_window(self, layer: int, file: int, read: _Read, slot: int) -> None:
        """Read a window of the file, and copy the parts of an expert to the slot at byte `slot` of the memory."""
        if self._verify is not None:
            self._verify(layer, read.begin, read.end)
        first = read.begin // _PAGE * _PAGE
        window = self._windows.get()
        try:
            self._memory.wait_for_window(window)
            memory = bytes_of(window)[: -(-(read.end - first) // _PAGE) * _PAGE]
            read_fully(self._paths[read.file], file, memory, first, read.end - first, _DAMAGED)
            parts = [(begin - first, slot + target, nbytes) for begin, target, nbytes in read.parts]
            self._memory.copy(window, parts)
        finally:
            self._windows.put(window)


def _read_all(reads: Sequence[_ReadInto], slot: int) -> None:
    for read in reads:
        read(slot)


def _reads(ranges: Sequence[_Range], longest: int) -> list[_Read]:
    """Return reads of at most `longest` bytes, with neighbours merged."""
    reads: list[_Read] = []
    last = _Read(-1, 0, 0)
    for file, begin, target, nbytes in ranges:
        for done in range(0, nbytes, longest):
            first, part = begin + done, min(longest, nbytes - done)
            if file != last.file or first - last.end > _LARGEST_GAP or first + part - last.begin > longest:
                last = _Read(file, first, first)
                reads.append(last)
            last.parts.append((first, target + done, part))
            last.end = first + part
    return reads


def _merged(ranges: Iterable[_Range]) -> list[_Range]:
    """Return the ranges of an expert with neighbours joined that follow each other in the file and in the slot."""
    merged: list[_Range] = []
    for file, begin, target, nbytes in sorted(ranges):
        if merged:
            last_file, first, to, size = merged[-1]
            if (file, begin, target) == (last_file, first + size, to + size):
                merged[-1] = file, first, to, size + nbytes
                continue
        merged.append((file, begin, target, nbytes))
    return merged
