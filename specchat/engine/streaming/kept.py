"""Layers that a model keeps in memory between passes, and can let go while it runs.

A resident layer that leaves passes through slots from then on, from its place in the plan: host memory or the disk. A
layer that is given back to the system is read from the disk in every pass. The bytes that passes compute with stay the
same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor

from specchat.engine.streaming.base import LayerStreamer, NoStreamer, StreamCounters
from specchat.engine.streaming.cpu import MappedStreamer, MixedStreamer, ThreadStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.readers import LayerReader
from specchat.engine.streaming.slots import page_aligned
from specchat.models.packs.file_format import disk_errors
from specchat.models.packs.pack import Pack, PackedLayer
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout, bind
from specchat.records.plan import Placement

# Slots of a model that kept all its layers: one is computed while the next one is read.
_NUM_SLOTS = 2


class KeptLayers(Protocol):
    """Layers in memory, which can leave it between passes."""

    @property
    def groups(self) -> Sequence[Mapping[int, int]]:
        """Bytes that the layers take, by index, in groups; memory that the system cannot reclaim by itself comes first.

        Layers that were expanded take more than they have in the file and in a slot.
        """

    def num_slots(self, given: Collection[int]) -> int:
        """Return the number of slots in host memory if these layers are given back, too."""

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return the bytes of these slots."""

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> LayerStreamer:
        """Stream resident layers from now on, and release host memory of layers; return the streamer of later passes.

        Args:
            leaving: resident layers that are streamed from now on.
            given: layers that are read from the disk whenever they are streamed; on a CPU, none of them stays resident.
        """

    def bring_back(self, returning: Sequence[int]) -> LayerStreamer:
        """Keep streamed layers resident from now on, as before they left, and return the streamer of later passes."""

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

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> LayerStreamer:
        """Fail: there is nothing to let go."""
        raise AssertionError(f"layers {leaving} and {given} cannot leave memory")

    def bring_back(self, returning: Sequence[int]) -> LayerStreamer:
        """Fail: no layer has left."""
        raise AssertionError(f"layers {returning} have never left")

    def close(self) -> None:
        """Do nothing: there are no files."""


class CpuTiers:
    """The layers of a model on the CPU: resident, mapped from the page cache, or read into slots.

    Args:
        layers: decoder layers.
        placement: tiers of the layers once all stages of a chat have ended; those in RAM are mapped if there is a pack.
        resident: indices of the layers that are resident at first.
        open_reader: opens the reader of layers, as soon as a layer is read into a slot.
        pack: pack of the weights; None reads the checkpoint.
        close_files: closes the checkpoint, whose files stay open for layers that are given back later.
        settle: prepares a resident layer whose parameters are bound.
        owned: indices of the layers of this device.

    Attributes:
        streamer: streamer of the passes; `restream` replaces it.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        placement: Placement,
        resident: Sequence[int],
        open_reader: Callable[[], LayerReader],
        pack: Pack | None,
        close_files: Callable[[], None],
        settle: Callable[[int], None],
        owned: Sequence[int],
    ) -> None:
        self._layers = layers
        self._owned = owned
        self._settle = settle
        self._sizes = [LayerLayout.of(layer).nbytes for layer in layers]
        self._more = [placement.more_bytes(index) for index in range(len(layers))]
        self._pack = pack
        self._verifier = None if pack is None else ChunkVerifier(pack)
        self._open_reader = open_reader
        self._close_files = close_files
        self._reader: LayerReader | None = None
        self._resident = list(resident)
        self._stays = set(placement.resident)  # resident layers that leave only when they are given back
        self._in_ram = set(placement.in_ram) if pack is not None else set()
        self._most_slots = placement.slots or _NUM_SLOTS
        self._slots: list[Tensor] = []
        self._slotted: ThreadStreamer | None = None
        self._in_place: MappedStreamer | None = None
        self.streamer = self._new_streamer()

    @property
    def groups(self) -> Sequence[Mapping[int, int]]:
        """Bytes of resident layers, and of mapped ones, whose pages the system can drop by itself."""
        resident = {index: self._sizes[index] + self._more[index] for index in self._resident}
        return [resident, {index: self._sizes[index] for index in self._mapped()}]

    def num_slots(self, given: Collection[int]) -> int:
        """Return the number of slots that streaming needs once these layers are given back, in any later stage."""
        return min(self._most_slots, len(self._through_slots(given)))

    def slot_bytes(self, given: Collection[int]) -> int:
        """Return the bytes of these slots."""
        sizes = (self._sizes[index] for index in self._through_slots(given))
        return self.num_slots(given) * max(sizes, default=0)

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> LayerStreamer:
        """Stream layers from now on, given ones from the disk, and return the streamer of all later passes."""
        unmapped = [index for index in self._mapped() if index in given]
        past = self._stop()
        self._resident = [index for index in self._resident if index not in leaving]
        assert not set(given) & set(self._resident), "what is given back to the system leaves, too"
        self._stays -= set(leaving)
        self._in_ram -= set(given)
        self.streamer = self._new_streamer(past)
        for index in unmapped:
            assert self._pack is not None
            _drop_pages(self._pack.layers[index])
        return self.streamer

    def bring_back(self, returning: Sequence[int]) -> LayerStreamer:
        """Read streamed layers into memory of their own, and return the streamer of all later passes."""
        past = self._stop()
        if self._reader is None:
            self._reader = self._open_reader()
        for index in returning:
            blob = page_aligned(self._sizes[index])
            for read in self._reader.chunks(index, blob):
                read()
            bind(self._layers[index], LayerLayout.of(self._layers[index]).views(blob))
            del blob  # settling may replace the layer's parameters
            self._settle(index)
        self._resident = sorted({*self._resident, *returning})
        self.streamer = self._new_streamer(past)
        return self.streamer

    def _stop(self) -> StreamCounters:
        """Stop reading ahead, and return the totals so far."""
        past = self.streamer.counters()
        if self._slotted is not None:
            self._slotted.stop()
        if self._in_place is not None:
            self._in_place.close()
        self._slotted = self._in_place = None
        return past

    def close(self) -> None:
        """Close the reader of layers, and the checkpoint."""
        if self._reader is not None:
            self._reader.close()
        self._close_files()

    def _mapped(self) -> list[int]:
        """Return the layers that passes compute on in the page cache now."""
        return sorted(self._in_ram - set(self._resident))

    def _through_slots(self, given: Collection[int] = ()) -> list[int]:
        """Return the layers that are read into slots, now or in a later stage, if some more are given back."""
        stays = (self._stays | self._in_ram) - set(given)
        return [index for index in self._owned if index not in stays]

    def _make_slots(self) -> list[Tensor]:
        """Return slots for the layers of all stages; present ones stay if they suffice."""
        count, nbytes = self.num_slots(()), self.slot_bytes(())
        if len(self._slots) < count or sum(slot.nbytes for slot in self._slots) < nbytes:
            self._slots = [page_aligned(nbytes // count) for _ in range(count)]
        return self._slots

    def _new_streamer(self, past: StreamCounters | None = None) -> LayerStreamer:
        """Bind the parameters of all streamed layers, which drops the memory that they had, and begin to read."""
        streamers: dict[int, LayerStreamer] = {}
        mapped = self._mapped()
        read = [index for index in self._through_slots() if index not in set(self._resident)]
        with ExitStack() as undo:
            if mapped:
                assert self._pack is not None and self._verifier is not None
                self._in_place = MappedStreamer(self._layers, mapped, self._pack, self._verifier)
                undo.callback(self._in_place.close)
                streamers |= dict.fromkeys(mapped, self._in_place)
            if read:
                if self._reader is None:
                    self._reader = self._open_reader()
                undo.callback(self._reader.close)
                slots = self._make_slots()
                self._slotted = ThreadStreamer(self._layers, read, len(slots), self._reader, slots)
                streamers |= dict.fromkeys(read, self._slotted)
            undo.pop_all()
        if past is not None or len(set(streamers.values())) > 1:
            return MixedStreamer(streamers, past)
        return next(iter(streamers.values()), NoStreamer())


class PinnedLayers:
    """The layers that a model on a GPU keeps in host memory, for this stage of a chat or a later one.

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

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> LayerStreamer:
        """Stream resident layers from now on, and release host memory of given ones; the streamer stays."""
        self._streamer.restream(leaving, given)
        return self._streamer

    def bring_back(self, returning: Sequence[int]) -> LayerStreamer:
        """Copy streamed layers into device memory of their own; the streamer stays."""
        self._streamer.bring_back(returning)
        return self._streamer

    def close(self) -> None:
        """Do nothing: the streamer owns its files."""


class KeptOnDevices(NothingKept):
    """The layers of several devices: none can be given back, but their files are closed.

    Args:
        parts: layers of each device.
        close_files: closes the checkpoint.
    """

    def __init__(self, parts: Sequence[KeptLayers], close_files: Callable[[], None]) -> None:
        self._parts = parts
        self._close_files = close_files

    def close(self) -> None:
        """Close the files that the streamers do not own, and the checkpoint."""
        for part in self._parts:
            part.close()
        self._close_files()


def _drop_pages(layer: PackedLayer) -> None:
    """Remove a layer from the page cache; nothing maps it any more."""
    with disk_errors(layer.path, "read"):
        file = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, layer.data_offset, layer.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
