"""Layers that a model keeps in host memory between passes, and can give back to the system while it runs.

A layer that is given back passes through slots from then on, read from the disk in every pass. The bytes that passes
compute with stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from specchat.engine.streaming.base import LayerStreamer, NoStreamer, StreamCounters
from specchat.engine.streaming.cpu import MappedStreamer, MixedStreamer, ThreadStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.readers import LayerReader
from specchat.models.packs.file_format import disk_errors
from specchat.models.packs.pack import Pack, PackedLayer
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout
from specchat.records.plan import Placement

# Slots of a model that kept all its layers: one is computed while the next one is read.
_NUM_SLOTS = 2


class KeptLayers(Protocol):
    """Layers in host memory, which can be given back between passes."""

    @property
    def groups(self) -> Sequence[Mapping[int, int]]:
        """Bytes of the layers by index, in groups; memory that the system cannot reclaim by itself comes first."""

    def num_slots(self, given: Collection[int]) -> int:
        """Return the number of slots in host memory if these layers are given back, too."""

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return the bytes of these slots."""

    def give_back(self, given: Collection[int]) -> LayerStreamer:
        """Release the memory of layers, and return the streamer of all later passes."""

    def close(self) -> None:
        """Close the files that the streamer does not own."""


class NothingKept:
    """No layer can be given back."""

    groups: Sequence[Mapping[int, int]] = ()

    def num_slots(self, given: Collection[int]) -> int:
        """Return 0."""
        return 0

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return 0."""
        return 0

    def give_back(self, given: Collection[int]) -> LayerStreamer:
        """Fail: there is nothing to give back."""
        raise AssertionError(f"layers {given} are not kept in host memory")

    def close(self) -> None:
        """Do nothing: there are no files."""


class CpuTiers:
    """The layers of a model on the CPU: resident, mapped from the page cache, or read into slots.

    Args:
        layers: decoder layers.
        placement: tiers of the layers; those in RAM are mapped if there is a pack.
        open_reader: opens the reader of layers, as soon as a layer is read into a slot.
        pack: pack of the weights; None reads the checkpoint.
        close_files: closes the checkpoint, whose files stay open for layers that are given back later.

    Attributes:
        streamer: streamer of the passes; `give_back` replaces it.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        placement: Placement,
        open_reader: Callable[[], LayerReader],
        pack: Pack | None,
        close_files: Callable[[], None],
    ) -> None:
        self._layers = layers
        self._sizes = [LayerLayout.of(layer).nbytes for layer in layers]
        self._pack = pack
        self._verifier = None if pack is None else ChunkVerifier(pack)
        self._open_reader = open_reader
        self._close_files = close_files
        self._reader: LayerReader | None = None
        self._resident = list(placement.resident)
        self._mapped = list(placement.in_ram) if pack is not None else []
        self._read = [index for index in placement.streamed if index not in set(self._mapped)]
        self._most_slots = placement.slots or _NUM_SLOTS
        self._slotted: ThreadStreamer | None = None
        self._in_place: MappedStreamer | None = None
        self.streamer = self._new_streamer()

    @property
    def groups(self) -> Sequence[Mapping[int, int]]:
        """Bytes of resident layers, and of mapped ones, whose pages the system can drop by itself."""
        return [{index: self._sizes[index] for index in group} for group in (self._resident, self._mapped)]

    def num_slots(self, given: Collection[int]) -> int:
        """Return the number of slots if these layers are given back, too."""
        return min(self._most_slots, len(self._read) + len(given))

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return the bytes of these slots."""
        return self.num_slots(given) * max((self._sizes[index] for index in (*self._read, *given)), default=0)

    def give_back(self, given: Collection[int]) -> LayerStreamer:
        """Release the memory of layers, and return the streamer of all later passes."""
        past, unmapped = self.streamer.counters(), [index for index in self._mapped if index in given]
        if self._slotted is not None:
            self._slotted.stop()
        if self._in_place is not None:
            self._in_place.close()
        self._slotted = self._in_place = None
        self._resident = [index for index in self._resident if index not in given]
        self._mapped = [index for index in self._mapped if index not in given]
        self._read = sorted({*self._read, *given})
        self.streamer = self._new_streamer(past)
        for index in unmapped:
            assert self._pack is not None
            _drop_pages(self._pack.layers[index])
        return self.streamer

    def close(self) -> None:
        """Close the reader of layers, and the checkpoint."""
        if self._reader is not None:
            self._reader.close()
        self._close_files()

    def _new_streamer(self, past: StreamCounters | None = None) -> LayerStreamer:
        """Bind the parameters of all streamed layers, which drops the memory that they had, and begin to read."""
        streamers: dict[int, LayerStreamer] = {}
        with ExitStack() as undo:
            if self._mapped:
                assert self._pack is not None and self._verifier is not None
                self._in_place = MappedStreamer(self._layers, self._mapped, self._pack, self._verifier)
                undo.callback(self._in_place.close)
                streamers |= dict.fromkeys(self._mapped, self._in_place)
            if self._read:
                if self._reader is None:
                    self._reader = self._open_reader()
                undo.callback(self._reader.close)
                self._slotted = ThreadStreamer(self._layers, self._read, self.num_slots(()), self._reader)
                streamers |= dict.fromkeys(self._read, self._slotted)
            undo.pop_all()
        if past is not None or len(set(streamers.values())) > 1:
            return MixedStreamer(streamers, past)
        return next(iter(streamers.values()), NoStreamer())


class PinnedLayers:
    """The streamed layers that a model on a GPU keeps in host memory.

    Args:
        streamer: streamer of the model, which releases the layers.
    """

    def __init__(self, streamer: CudaStreamer) -> None:
        self._streamer = streamer

    @property
    def groups(self) -> Sequence[Mapping[int, int]]:
        """Bytes of the layers, which the system cannot reclaim while they are pinned."""
        return [self._streamer.kept]

    def num_slots(self, given: Collection[int]) -> int:
        """Return the number of slots in host memory if these layers are given back, too."""
        return self._streamer.host_slots(given)[0]

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return the bytes of these slots."""
        num_slots, nbytes = self._streamer.host_slots(given)
        return num_slots * nbytes

    def give_back(self, given: Collection[int]) -> LayerStreamer:
        """Release the memory of layers; the streamer stays."""
        self._streamer.give_up(given)
        return self._streamer

    def close(self) -> None:
        """Do nothing: the streamer owns its files."""


def _drop_pages(layer: PackedLayer) -> None:
    """Remove a layer from the page cache; nothing maps it any more."""
    with disk_errors(layer.path, "read"):
        file = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, layer.data_offset, layer.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
