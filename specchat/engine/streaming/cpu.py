"""Streamed layers on a machine without a GPU: read from disk into slots, or computed where the page cache has them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specchat.engine.streaming.base import LayerStreamer, StreamCounters
from specchat.engine.streaming.readers import LayerReader
from specchat.engine.streaming.slots import SlotQueue, is_small, page_aligned
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack, PackedLayer
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout, bind

_READAHEAD_LAYERS = 2


class ThreadStreamer(LayerStreamer):
    """Reads layers into slots in host memory, ahead of the pass.

    Args:
        layers: the decoder layers; the streamed ones' parameters become views of slots.
        streamed: their indices, ascending.
        num_slots: slots to make.
        filler: reads layers.
    """

    def __init__(self, layers: Sequence[Any], streamed: Sequence[int], num_slots: int, filler: LayerReader) -> None:
        self._position = {index: j for j, index in enumerate(streamed)}
        layouts = [LayerLayout.of(layers[index]) for index in streamed]
        self._nbytes = [layout.nbytes for layout in layouts]
        slots = [page_aligned(max(self._nbytes)) for _ in range(num_slots)]
        for j, index in enumerate(streamed):
            bind(layers[index], layouts[j].views(slots[j % num_slots]))
        # A layer never changes its slot, so what fills it never changes either.
        works = [filler.chunks(index, slots[j % num_slots]) for j, index in enumerate(streamed)]
        small = [is_small(nbytes) for nbytes in self._nbytes]
        self._filler = filler
        self._num_bytes = 0
        self._queue = SlotQueue(works, small, num_slots, filler.num_workers)

    def acquire(self, index: int) -> None:
        """Waits until the layer is in its slot; errors of reading come out here."""
        j = self._position[index]
        self._queue.take(j)
        self._num_bytes += self._nbytes[j]

    def release(self, index: int) -> None:
        """Lets the next layer that lives in this slot be read."""
        self._queue.give_back(self._position[index])

    def restart(self) -> None:
        """Begins again with the first layers, once the reads under way have ended."""
        self._queue.restart()

    def counters(self) -> StreamCounters:
        """Bytes handed to passes and seconds that `acquire` waited."""
        return StreamCounters(self._num_bytes, self._queue.wait_s)

    def close(self) -> None:
        """Ends reading and closes what was read from."""
        self._queue.close()
        self._filler.close()


class MappedStreamer(LayerStreamer):
    """Computes on the page cache itself: parameters are views of mapped files, and nothing is copied.

    For packs that fit in free memory beside everything else. Waiting for pages happens inside the computing, so it is
    not counted apart.

    Args:
        layers: the decoder layers; the streamed ones' parameters become views of mapped files.
        streamed: their indices, ascending.
        pack: where they lie.
    """

    def __init__(self, layers: Sequence[Any], streamed: Sequence[int], pack: Pack) -> None:
        self._verifier = ChunkVerifier(pack)
        self._streamed = list(streamed)
        self._layers = pack.layers
        self._blobs = {index: _map(pack.layers[index]) for index in streamed}
        for index, blob in self._blobs.items():
            bind(layers[index], LayerLayout.of(layers[index]).views(blob))
        self._files = {index: os.open(pack.layers[index].path, os.O_RDONLY) for index in streamed}
        self._seen: set[int] = set()
        self._num_bytes = 0

    def acquire(self, index: int) -> None:
        """Asks the system to read ahead; checks the layer's data the first time."""
        self._num_bytes += self._layers[index].nbytes
        if index in self._seen:
            return
        self._seen.add(index)
        j = self._streamed.index(index)
        for ahead in self._streamed[j : j + 1 + _READAHEAD_LAYERS]:
            layer = self._layers[ahead]
            os.posix_fadvise(self._files[ahead], layer.data_offset, layer.nbytes, os.POSIX_FADV_WILLNEED)
        self._verifier.verify_layer(index, bytes_of(self._blobs[index]))

    def release(self, index: int) -> None:
        """The system decides what stays in the page cache."""

    def restart(self) -> None:
        """There is no order to begin again."""

    def counters(self) -> StreamCounters:
        """Bytes that passes used."""
        return StreamCounters(self._num_bytes, 0.0)

    def close(self) -> None:
        """Closes the files; the mappings go with the model."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _map(layer: PackedLayer) -> Tensor:
    """The layer's blob in the page cache: uint8 [nbytes], private, so that writing to it never reaches the file."""
    whole = torch.from_file(str(layer.path), shared=False, size=layer.path.stat().st_size, dtype=torch.uint8)
    return whole[layer.data_offset : layer.data_offset + layer.nbytes]


class MixedStreamer(LayerStreamer):
    """Layers that come by different ways, each way keeping its own order: some mapped, the others through slots.

    Args:
        ways: the streamer of every streamed layer, by the layer's index.
    """

    def __init__(self, ways: Mapping[int, LayerStreamer]) -> None:
        self._ways = ways
        self._streamers = tuple(dict.fromkeys(ways.values()))

    def acquire(self, index: int) -> None:
        """Waits for the layer, whichever way it comes."""
        self._ways[index].acquire(index)

    def release(self, index: int) -> None:
        """Hands the layer back."""
        self._ways[index].release(index)

    def restart(self) -> None:
        """Begins again on every way."""
        for streamer in self._streamers:
            streamer.restart()

    def counters(self) -> StreamCounters:
        """Totals of all ways."""
        totals = [streamer.counters() for streamer in self._streamers]
        return StreamCounters(sum(each.num_bytes for each in totals), sum(each.wait_s for each in totals))

    def close(self) -> None:
        """Closes all ways."""
        for streamer in self._streamers:
            streamer.close()
