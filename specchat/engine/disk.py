"""Streamed layers on a machine without a GPU: read from disk into slots, or computed where the page cache has them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from specchat.engine.streamer import LayerStreamer, StreamCounters
from specchat.errors import CorruptCheckpointError
from specchat.models.pack import Pack, PackedLayer
from specchat.models.pack_format import bytes_of
from specchat.models.pack_verify import ChunkVerifier
from specchat.models.weights import LayerLayout, WeightReader, bind

_PAGE = 4096
# Two requests in flight keep an NVMe drive busy; more gain nothing and take processor time from computing.
# Measured, cold, 16 MB each: 1.9-2.8 GB/s at 0.05 processor seconds per GB.
_NUM_READERS = 2
_READAHEAD_LAYERS = 2


class LayerFiller(Protocol):
    """Where the bytes of streamed layers come from.

    Attributes:
        num_workers: threads that may run chunks at the same time.
    """

    num_workers: int

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Pieces of work that together fill `slot` (uint8, at least the layer's bytes) with layer `index`."""

    def close(self) -> None:
        """Called once, when nothing will be read any more."""


class ThreadStreamer(LayerStreamer):
    """Fills slots in host memory from worker threads.

    Releasing a slot queues the chunks of the layer that lives there next, and the workers take chunks in that order.
    So the queue runs on across layers and passes: while the last chunks of one layer are read, the first of the next
    are under way, and the disk never waits at a layer's end.

    Args:
        layers: the decoder layers; the streamed ones' parameters become views of slots.
        streamed: their indices, ascending.
        num_slots: slots to make.
        filler: reads layers.
    """

    def __init__(self, layers: Sequence[Any], streamed: Sequence[int], num_slots: int, filler: LayerFiller) -> None:
        self._position = {index: j for j, index in enumerate(streamed)}
        layouts = [LayerLayout.of(layers[index]) for index in streamed]
        self._nbytes = [layout.nbytes for layout in layouts]
        slots = [_page_aligned(max(self._nbytes)) for _ in range(num_slots)]
        for j, index in enumerate(streamed):
            bind(layers[index], layouts[j].views(slots[j % num_slots]))
        # A layer never changes its slot, so what fills it never changes either.
        self._works = [filler.chunks(index, slots[j % num_slots]) for j, index in enumerate(streamed)]
        self._filler = filler
        self._queue: SimpleQueue[tuple[int, int, Callable[[], None]] | None] = SimpleQueue()  # (epoch, j, work)
        self._changed = threading.Condition()
        # Below, only the computing thread writes the first group; the condition guards the second. `_holds[s]` is the
        # streamed layer whose bytes slot s has, None while it is free or being filled; reading it needs no lock.
        self._num_bytes = 0
        self._wait_s = 0.0
        self._holds: list[int | None] = [None] * num_slots
        self._unread = [0] * len(streamed)
        self._epoch = 0
        self._num_running = 0
        self._error: BaseException | None = None
        self._fill_first_slots()
        self._threads = [
            threading.Thread(target=self._work, name=f"specchat-streamer-{i}", daemon=True)
            for i in range(filler.num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def acquire(self, index: int) -> None:
        """Waits until the layer is in its slot; errors of the workers come out here."""
        j = self._position[index]
        slot = j % len(self._holds)
        if self._holds[slot] != j:
            self._wait_for(slot, j)
        self._num_bytes += self._nbytes[j]

    def release(self, index: int) -> None:
        """Queues the next layer that lives in this slot: N further on, or the slot's own first in the next pass."""
        j = self._position[index]
        slot = j % len(self._holds)
        self._holds[slot] = None
        following = j + len(self._holds)
        self._fill(following if following < len(self._works) else slot)

    def restart(self) -> None:
        """Begins again with the first layers, once the chunks under way have ended."""
        with self._changed:
            self._epoch += 1  # makes what is queued void
            self._changed.wait_for(lambda: self._num_running == 0)
            self._holds = [None] * len(self._holds)
        self._fill_first_slots()

    def counters(self) -> StreamCounters:
        """Bytes handed to passes and seconds that `acquire` waited."""
        return StreamCounters(self._num_bytes, self._wait_s)

    def close(self) -> None:
        """Ends the workers, waits for them, and closes what they read from."""
        with self._changed:
            self._epoch += 1
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._filler.close()

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._holds), len(self._works))):
            self._fill(j)

    def _fill(self, j: int) -> None:
        self._unread[j] = len(self._works[j])
        for work in self._works[j]:
            self._queue.put((self._epoch, j, work))

    def _wait_for(self, slot: int, j: int) -> None:
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._holds[slot] == j or self._error is not None)
        self._wait_s += time.perf_counter() - begin
        if self._holds[slot] != j:
            assert self._error is not None
            raise self._error

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            epoch, j, work = chunk
            with self._changed:
                if epoch != self._epoch or self._error is not None:
                    continue
                self._num_running += 1
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - carried to the computing thread, which raises it
                self._error = error
            self._end(epoch, j)

    def _end(self, epoch: int, j: int) -> None:
        with self._changed:
            self._num_running -= 1
            if epoch == self._epoch and self._error is None:  # a piece that failed must not complete its layer
                self._unread[j] -= 1
                if self._unread[j] == 0:
                    self._holds[j % len(self._holds)] = j
            self._changed.notify_all()


def _page_aligned(num_bytes: int) -> Tensor:
    """Zeroed uint8 memory that starts at a page, as unbuffered reads require."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Unbuffered reads pin the pages they write to one by one: 2.1-2.4 GB/s into huge pages, 0.8-1.6 into small.
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping for as long as it is used


class CheckpointFiller:
    """Reads layers from a checkpoint's own shards, casting and merging as needed, one layer at a time.

    Args:
        reader: the checkpoint; closed with this.
        layouts: of every layer that may be read.
    """

    num_workers = 1

    def __init__(self, reader: WeightReader, layouts: Mapping[int, LayerLayout]) -> None:
        self._reader = reader
        self._layouts = layouts

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """One piece: the whole layer."""
        return [partial(self._reader.read_layer, index, self._layouts[index].views(slot))]

    def close(self) -> None:
        """Closes the shards."""
        self._reader.close()


class PackFiller:
    """Reads packed layers in large aligned chunks, past the page cache where the file system allows it.

    Args:
        pack: one file per layer, its data page-aligned.
    """

    num_workers = _NUM_READERS

    def __init__(self, pack: Pack) -> None:
        self._layers = pack.layers
        self._verifier = ChunkVerifier(pack)
        self._files: dict[int, int] = {}

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """One piece of work for each of the layer's chunks, in file order."""
        layer = self._layers[index]
        if index not in self._files:
            self._files[index] = _open_unbuffered(layer.path)
        memory = bytes_of(slot)
        spans = [layer.chunk(chunk) for chunk in range(layer.num_chunks)]
        return [partial(self._read, index, chunk, memory[slice(*span)]) for chunk, span in enumerate(spans)]

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _read(self, index: int, chunk: int, memory: memoryview) -> None:
        layer = self._layers[index]
        begin, done = layer.data_offset + layer.chunk(chunk)[0], 0
        while done < len(memory):
            num_read = os.preadv(self._files[index], [memory[done:]], begin + done)
            if num_read == 0:
                raise CorruptCheckpointError(f"{layer.path} has lost its end", hint="delete that file: it is made anew")
            done += num_read
        self._verifier.verify(index, chunk, memory)


def _open_unbuffered(path: Path) -> int:
    """A descriptor that bypasses the page cache; an ordinary one where the file system refuses (tmpfs, FUSE)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)
    try:
        os.preadv(file, [bytes_of(_page_aligned(_PAGE))], 0)  # some refuse only now
    except OSError:
        os.close(file)
        return os.open(path, os.O_RDONLY)
    return file


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
