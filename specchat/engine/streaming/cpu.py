"""Layer streamers for the CPU: layers are read from disk into slots, or mapped from the page cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specchat.engine.streaming.base import LayerStreamer, StreamCounters, total
from specchat.engine.streaming.readers import LayerReader
from specchat.engine.streaming.slots import SlotQueue, is_small, page_aligned
from specchat.models.checkpoint.mapped_file import MappedFile
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack, PackedLayer
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout, bind

_READAHEAD_LAYERS = 2


class ThreadStreamer(LayerStreamer):
    """Reads layers into slots in host memory, ahead of the pass.

    Args:
        layers: decoder layers; the parameters of streamed layers become views of slots.
        streamed: indices of the streamed layers, ascending.
        num_slots: number of slots to allocate.
        reader: reader of layers, closed together with this streamer.
        slots: slots to use instead, each as large as the largest layer; None to allocate them.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        streamed: Sequence[int],
        num_slots: int,
        reader: LayerReader,
        slots: Sequence[Tensor] | None = None,
    ) -> None:
        self._position = {index: j for j, index in enumerate(streamed)}
        layouts = [LayerLayout.of(layers[index]) for index in streamed]
        self._nbytes = [layout.nbytes for layout in layouts]
        if slots is None:
            slots = [page_aligned(max(self._nbytes)) for _ in range(num_slots)]
        for j, index in enumerate(streamed):
            bind(layers[index], layouts[j].views(slots[j % num_slots]))
        # A layer always uses the same slot, so its read tasks are built once.
        tasks = [reader.chunks(index, slots[j % num_slots]) for j, index in enumerate(streamed)]
        small = [is_small(nbytes) for nbytes in self._nbytes]
        self._reader = reader
        self._num_bytes = 0
        self._queue = SlotQueue(tasks, small, num_slots, reader.num_workers)

    def acquire(self, index: int) -> None:
        """Wait until the layer is in its slot, and raise errors of its read tasks."""
        j = self._position[index]
        self._queue.take(j)
        self._num_bytes += self._nbytes[j]

    def release(self, index: int) -> None:
        """Start reading the next layer of this slot."""
        self._queue.give_back(self._position[index])

    def restart(self) -> None:
        """Start again with the first layers, after the current read tasks have ended."""
        self._queue.restart()

    def counters(self) -> StreamCounters:
        """Return the bytes that passes used, and the seconds that `acquire` waited and that reads took."""
        return StreamCounters(self._num_bytes, self._queue.wait_s, link_s=self._queue.busy_s)

    def stop(self) -> None:
        """Stop reading; the layer reader stays open."""
        self._queue.close()

    def close(self) -> None:
        """Stop reading and close the layer reader."""
        self.stop()
        self._reader.close()


class MappedStreamer(LayerStreamer):
    """Computes on pages of the page cache: parameters are views of mapped files, and nothing is copied.

    For packed layers that fit in free memory. The time of page faults is part of the compute time and not counted as
    waiting.

    Args:
        layers: decoder layers; the parameters of streamed layers become views of mapped files.
        streamed: indices of the streamed layers, ascending.
        pack: pack that holds the layers.
        verifier: verifier of the pack.
    """

    def __init__(self, layers: Sequence[Any], streamed: Sequence[int], pack: Pack, verifier: ChunkVerifier) -> None:
        self._verifier = verifier
        self._streamed = list(streamed)
        self._layers = pack.layers
        self._blobs = {index: _map(pack.layers[index]) for index in streamed}
        for index, blob in self._blobs.items():
            bind(layers[index], LayerLayout.of(layers[index]).views(blob))
        self._files = {index: _file_of(pack.layers[index]) for index in streamed}
        self._seen: set[int] = set()
        self._num_bytes = 0

    def acquire(self, index: int) -> None:
        """Request readahead and verify the layer's checksums, on first use only.

        Raises:
            CorruptCheckpointError: the file was cut short; the system ends programs that read lost pages of a file.
        """
        self._files[index].check()
        self._num_bytes += self._layers[index].nbytes
        if index in self._seen:
            return
        self._seen.add(index)
        j = self._streamed.index(index)
        for ahead in self._streamed[j : j + 1 + _READAHEAD_LAYERS]:
            layer = self._layers[ahead]
            os.posix_fadvise(self._files[ahead].descriptor, layer.data_offset, layer.nbytes, os.POSIX_FADV_WILLNEED)
        self._verifier.verify_layer(index, bytes_of(self._blobs[index]))

    def release(self, index: int) -> None:
        """Do nothing: the system decides which pages stay in the page cache."""

    def restart(self) -> None:
        """Do nothing: mapped layers need no order."""

    def counters(self) -> StreamCounters:
        """Return the bytes that passes used; waiting is not measured."""
        return StreamCounters(self._num_bytes, 0.0)

    def close(self) -> None:
        """Close the files; the mappings live as long as the model."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _file_of(layer: PackedLayer) -> MappedFile:
    return MappedFile(layer.path, layer.data_offset + layer.nbytes)


def _map(layer: PackedLayer) -> Tensor:
    """Map the layer's blob from its file, uint8 [nbytes]; the mapping is private, so writes never reach the file."""
    whole = torch.from_file(str(layer.path), shared=False, size=layer.path.stat().st_size, dtype=torch.uint8)
    return whole[layer.data_offset : layer.data_offset + layer.nbytes]


class MixedStreamer(LayerStreamer):
    """Combines streamers, each with its own order of layers: some layers are mapped, the others read into slots.

    Args:
        by_layer: streamer of each streamed layer, by layer index.
        past: totals of the streamers that these replace; None at first.
    """

    def __init__(self, by_layer: Mapping[int, LayerStreamer], past: StreamCounters | None = None) -> None:
        self._by_layer = by_layer
        self._past = past or StreamCounters(0, 0.0)
        self._streamers = tuple(dict.fromkeys(by_layer.values()))

    def acquire(self, index: int) -> None:
        """Wait for the layer, by its own streamer."""
        self._by_layer[index].acquire(index)

    def release(self, index: int) -> None:
        """Release the layer to its own streamer."""
        self._by_layer[index].release(index)

    def restart(self) -> None:
        """Restart every streamer."""
        for streamer in self._streamers:
            streamer.restart()

    def counters(self) -> StreamCounters:
        """Return the totals of all streamers, and of those before them."""
        return total([self._past, *(streamer.counters() for streamer in self._streamers)])

    def close(self) -> None:
        """Close all streamers."""
        for streamer in self._streamers:
            streamer.close()
