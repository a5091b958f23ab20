"""Layer readers: they split a layer into read tasks that threads run in parallel, from packs or checkpoint shards."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from torch import Tensor

from specchat.engine.streaming.slots import SlotQueue, is_small, page_aligned
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.packs.file_format import bytes_of, disk_error, disk_errors
from specchat.models.packs.pack import Pack
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.reader import WeightReader
from specchat.records.limits import NUM_READERS, READ_THREADS, READ_WINDOW_BYTES

_PAGE = 4096
_DAMAGED_SHARD = "delete the file and download it again"
_DAMAGED_PACK = "delete the file; specchat writes it again"


class LayerReader(Protocol):
    """Source of the bytes of streamed layers.

    Attributes:
        num_workers: number of threads that may run read tasks at the same time.
    """

    num_workers: int

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Return the read tasks that together fill `slot` (uint8, at least the layer's bytes) with layer `index`."""

    def close(self) -> None:
        """Release files; called once, after the last read task."""


class CheckpointLayerReader:
    """Reads layers from a checkpoint's shards one at a time, with casts and merges as needed.

    Args:
        reader: weight reader of the checkpoint, closed together with this object.
        layouts: layout of each layer that may be read, by layer index.
    """

    num_workers = 1

    def __init__(self, reader: WeightReader, layouts: Mapping[int, LayerLayout]) -> None:
        self._reader = reader
        self._layouts = layouts
        self._reading = threading.Lock()  # the slots of several devices have a thread each

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Return one read task for the whole layer."""
        return [partial(self._read, index, self._layouts[index].views(slot))]

    def _read(self, index: int, views: Mapping[str, Tensor]) -> None:
        with self._reading:
            self._reader.read_layer(index, views)

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


class PackLayerReader:
    """Reads packed layers in large aligned chunks, past the page cache if possible, except small layers.

    Args:
        pack: pack to read, with one file per layer and page-aligned data.
    """

    num_workers = READ_THREADS

    def __init__(self, pack: Pack) -> None:
        self._layers = pack.layers
        self._verifier = ChunkVerifier(pack)
        self._files = OpenFiles()

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Return one read task for each of the layer's chunks, in file order."""
        layer = self._layers[index]
        file = self._files.open(layer.path, cached=is_small(layer.nbytes))
        memory = bytes_of(slot)
        spans = [layer.chunk(chunk) for chunk in range(layer.num_chunks)]
        return [
            partial(self._read, index, chunk, file, memory[begin:end], layer.data_offset + begin)
            for chunk, (begin, end) in enumerate(spans)
        ]

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _read(self, index: int, chunk: int, file: int, memory: memoryview, begin: int) -> None:
        read_fully(self._layers[index].path, file, memory, begin, len(memory), _DAMAGED_PACK)
        self._verifier.verify(index, chunk, memory)


class ShardLayerReader:
    """Reads layers of a streamable checkpoint: the tensors' bytes, directly from its shards.

    O_DIRECT needs page-aligned reads, but tensors start anywhere in a shard and must be aligned in the slot. So read an
    aligned window and copy the layer's tensors out; the copy is cheap next to the read. Reads through the page cache go
    directly into the slot.

    Args:
        reader: weight reader of a streamable checkpoint, closed together with this object.
        layouts: layout of each layer that may be read, by layer index.
        cached: indices of the layers that fit in the page cache.
    """

    num_workers = NUM_READERS

    def __init__(self, reader: WeightReader, layouts: Mapping[int, LayerLayout], cached: Collection[int]) -> None:
        assert reader.is_streamable
        self._reader = reader
        self._layouts = layouts
        small = {index for index, layout in layouts.items() if is_small(layout.nbytes)}
        self._cached = small | set(cached)
        self._held = {index: reader.held(index) for index in layouts}
        self._files = OpenFiles()
        self._windows = SimpleQueue[Tensor]()
        if self._cached < layouts.keys():
            for _ in range(self.num_workers):
                self._windows.put(page_aligned(READ_WINDOW_BYTES))

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Return one read task for each shard window that contains bytes of the layer, in file order."""
        offsets = dict(zip(self._layouts[index].names, self._layouts[index].offsets, strict=True))
        tensors = [(info, offsets[name]) for name, info in self._reader.places(index).items()]
        is_cached = index in self._cached
        tasks = [self._task(path, extents, slot, cached=is_cached) for path, extents in _windows(tensors)]
        return [*tasks, partial(self._copy_held, index, slot)] if self._held[index] else tasks

    def _copy_held(self, index: int, slot: Tensor) -> None:
        """Copy the small parameters that are kept in memory because they are not stored as the model has them."""
        views = self._layouts[index].views(slot)
        for name, tensor in self._held[index].items():
            views[name].copy_(tensor)

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()
        self._files.close()

    def _task(self, path: Path, extents: Sequence[_Extent], slot: Tensor, *, cached: bool) -> Callable[[], None]:
        file = self._files.open(path, cached=cached)
        if is_unbuffered(file):
            return partial(self._read_window, path, file, extents, slot.numpy())
        memory = bytes_of(slot)
        return partial(_read_extents, path, file, [(memory[e.target : e.target + e.nbytes], e.begin) for e in extents])

    def _read_window(self, path: Path, file: int, extents: Sequence[_Extent], target: Any) -> None:
        begin, end = extents[0].begin // _PAGE * _PAGE, extents[-1].begin + extents[-1].nbytes
        window = self._windows.get()
        try:
            memory = bytes_of(window)[: -(-(end - begin) // _PAGE) * _PAGE]
            read_fully(path, file, memory, begin, end - begin, _DAMAGED_SHARD)
            source: Any = window.numpy()
            for extent in extents:  # numpy's copies release the GIL and run on one thread
                skip = extent.begin - begin
                target[extent.target : extent.target + extent.nbytes] = source[skip : skip + extent.nbytes]
        finally:
            self._windows.put(window)


class SharedReader:
    """One reader of layers for several devices, opened for the first of them and closed by the last one.

    Args:
        open_reader: opens the reader.
        num_parts: number of devices that may ask for it.
    """

    def __init__(self, open_reader: Callable[[], LayerReader], num_parts: int) -> None:
        self._open = open_reader
        self._reader: LayerReader | None = None
        self._using: set[int] = set()
        self._num_parts = num_parts

    def part(self, number: int, _cached: Collection[int] = ()) -> LayerReader:
        """Return the reader for one device."""
        assert 0 <= number < self._num_parts
        if self._reader is None:
            self._reader = self._open()
        self._using.add(number)
        return _PartOfReader(self._reader, partial(self._close, number))

    def _close(self, number: int) -> None:
        self._using.discard(number)
        if not self._using and self._reader is not None:
            self._reader.close()


class _PartOfReader:
    """One device's part of a shared reader; a second `close` does nothing."""

    def __init__(self, reader: LayerReader, close: Callable[[], None]) -> None:
        self.num_workers = reader.num_workers
        self.chunks = reader.chunks
        self.close = close


def layer_reader_for(
    layers: Sequence[Any], reader: WeightReader, pack: Pack | None, cached: Collection[int]
) -> LayerReader:
    """Return the layer reader for a pack or a checkpoint; the result owns the files that it reads.

    Args:
        layers: decoder layers, any of which may be read.
        reader: weight reader of the checkpoint; unused with a pack.
        pack: pack of the weights; None reads the checkpoint.
        cached: indices of the layers that fit in the page cache.
    """
    if pack is not None:
        return PackLayerReader(pack)
    layouts = {index: LayerLayout.of(layer) for index, layer in enumerate(layers)}
    return ShardLayerReader(reader, layouts, cached) if reader.is_streamable else CheckpointLayerReader(reader, layouts)


def read_layers(reader: LayerReader, blobs: Mapping[int, Tensor]) -> None:
    """Fill memory with layers, by the reader's threads.

    Args:
        reader: reader of the layers.
        blobs: memory of each layer, uint8 [nbytes], by index.
    """
    tasks = [reader.chunks(index, blob) for index, blob in blobs.items()]
    queue = SlotQueue(tasks, [is_small(blob.nbytes) for blob in blobs.values()], len(blobs), reader.num_workers)
    try:
        for j in range(len(blobs)):
            queue.take(j)
    finally:
        queue.close()


# --- files ---------------------------------------------------------------------------------------------------------


class OpenFiles:
    """File descriptors by path, for reads through the page cache or past it."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._closing = ExitStack()

    def open(self, path: Path, *, cached: bool) -> int:
        """Return a descriptor; unless `cached`, it bypasses the page cache where the file system supports that."""
        if (path, cached) not in self._open:
            with disk_errors(path, "read"):
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if cached else open_unbuffered(path)
            self._closing.callback(os.close, file)
            self._open[path, cached] = file
        return self._open[path, cached]

    def close(self) -> None:
        """Close the files."""
        self._closing.close()
        self._open.clear()


def open_unbuffered(path: Path) -> int:
    """Open a file past the page cache, or normally where the file system refuses O_DIRECT (tmpfs, FUSE)."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)
    try:
        os.preadv(file, [bytes_of(page_aligned(_PAGE))], 0)  # some file systems refuse only on the first read
    except OSError:
        os.close(file)
        return os.open(path, flags)
    return file


def is_unbuffered(file: int) -> bool:
    """Return whether an open file's reads bypass the page cache."""
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def read_fully(path: Path, file: int, memory: memoryview, begin: int, least: int, hint: str) -> None:
    """Fill `memory` with the file's bytes from `begin` on; if the file ends earlier, `least` bytes are enough.

    Raises:
        CorruptCheckpointError: the file ends before `begin + least`.
        ModelError: the file cannot be read.
    """
    done = 0
    while True:
        try:  # no context manager here: it costs 1 us, which adds up for small layers
            done += os.preadv(file, [memory[done:] if done else memory], begin + done)
        except OSError as error:
            raise disk_error(error, path, "read", hint) from error
        if done >= least:
            return
        # One call reads less than 2 GiB, and unbuffered reads must resume at a page boundary.
        whole = done // _PAGE * _PAGE
        if whole == 0 or os.fstat(file).st_size < begin + least:
            raise CorruptCheckpointError(f"{path} is truncated", hint)
        done = whole


def _read_extents(path: Path, file: int, extents: Sequence[tuple[memoryview, int]]) -> None:
    for memory, begin in extents:
        read_fully(path, file, memory, begin, len(memory), _DAMAGED_SHARD)


# --- windows of shards ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Extent:
    """A byte range of one tensor: its start in the file, its start in the slot (`target`), and its size."""

    path: Path
    begin: int
    target: int
    nbytes: int

    @property
    def window(self) -> tuple[Path, int]:
        """Window of the file that contains the extent."""
        return self.path, self.begin // READ_WINDOW_BYTES


def _windows(tensors: Sequence[tuple[TensorInfo, int]]) -> Iterator[tuple[Path, list[_Extent]]]:
    """Yield the extents of each window, ordered by file and offset.

    Args:
        tensors: tensors with their offsets in the slot.
    """
    extents = [extent for info, target in tensors for extent in _extents(info, target)]
    extents.sort(key=lambda extent: (extent.path, extent.begin))
    for (path, _), group in groupby(extents, key=lambda extent: extent.window):
        yield path, list(group)


def _extents(info: TensorInfo, target: int) -> Iterator[_Extent]:
    """Split a tensor at window boundaries."""
    begin, end = info.offset, info.offset + info.nbytes
    while begin < end:
        cut = min(end, (begin // READ_WINDOW_BYTES + 1) * READ_WINDOW_BYTES)
        yield _Extent(info.file, begin, target + begin - info.offset, cut - begin)
        begin = cut
