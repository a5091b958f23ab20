"""What fills slots from files, in pieces that threads read at the same time: packs, or a checkpoint's shards."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from torch import Tensor

from specchat.engine.streaming.slots import is_small, page_aligned
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
_DAMAGED_PACK = "delete that file: it is made anew"


class LayerReader(Protocol):
    """Where the bytes of streamed layers come from.

    Attributes:
        num_workers: threads that may run chunks at the same time.
    """

    num_workers: int

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """Pieces of work that together fill `slot` (uint8, at least the layer's bytes) with layer `index`."""

    def close(self) -> None:
        """Called once, when nothing will be read any more."""


class CheckpointLayerReader:
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


class PackLayerReader:
    """Reads packed layers in large aligned chunks, past the page cache where that can be; small ones through it.

    Args:
        pack: one file per layer, its data page-aligned.
    """

    num_workers = READ_THREADS

    def __init__(self, pack: Pack) -> None:
        self._layers = pack.layers
        self._verifier = ChunkVerifier(pack)
        self._files = _Files()

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """One piece of work for each of the layer's chunks, in file order."""
        layer = self._layers[index]
        file = self._files.open(layer.path, cached=is_small(layer.nbytes))
        memory = bytes_of(slot)
        spans = [layer.chunk(chunk) for chunk in range(layer.num_chunks)]
        return [
            partial(self._read, index, chunk, file, memory[begin:end], layer.data_offset + begin)
            for chunk, (begin, end) in enumerate(spans)
        ]

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def _read(self, index: int, chunk: int, file: int, memory: memoryview, begin: int) -> None:
        _read(self._layers[index].path, file, memory, begin, len(memory), _DAMAGED_PACK)
        self._verifier.verify(index, chunk, memory)


class ShardLayerReader:
    """Reads layers of a checkpoint that serves as it is: tensor by tensor the bytes of its shards.

    A shard's tensors begin anywhere, while reads past the page cache begin and end at pages, and computing wants
    tensors aligned. So a window of the shard is read at a time, and what of it is the layer's is copied to its place:
    beside a read that takes longer this is cheap. Through the page cache, the bytes go to their places by themselves.

    Args:
        reader: the checkpoint, which serves as it is; closed with this.
        layouts: of every layer that may be read.
        cached: indices of the layers that the page cache has room for.
    """

    num_workers = NUM_READERS

    def __init__(self, reader: WeightReader, layouts: Mapping[int, LayerLayout], cached: Collection[int]) -> None:
        assert reader.is_streamable
        self._reader = reader
        self._layouts = layouts
        small = {index for index, layout in layouts.items() if is_small(layout.nbytes)}
        self._cached = small | set(cached)
        self._files = _Files()
        self._windows = SimpleQueue[Tensor]()
        if self._cached < layouts.keys():
            for _ in range(self.num_workers):
                self._windows.put(page_aligned(READ_WINDOW_BYTES))

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        """One piece of work for each window of a shard that has something of the layer, in file order."""
        offsets = dict(zip(self._layouts[index].names, self._layouts[index].offsets, strict=True))
        tensors = [(info, offsets[name]) for name, info in self._reader.places(index).items()]
        is_cached = index in self._cached
        return [self._work(path, pieces, slot, cached=is_cached) for path, pieces in _windows(tensors)]

    def close(self) -> None:
        """Closes the shards."""
        self._reader.close()
        self._files.close()

    def _work(self, path: Path, pieces: Sequence[_Piece], slot: Tensor, *, cached: bool) -> Callable[[], None]:
        file = self._files.open(path, cached=cached)
        if is_unbuffered(file):
            return partial(self._read_window, path, file, pieces, slot.numpy())
        memory = bytes_of(slot)
        return partial(_read_pieces, path, file, [(memory[p.target : p.target + p.nbytes], p.begin) for p in pieces])

    def _read_window(self, path: Path, file: int, pieces: Sequence[_Piece], target: Any) -> None:
        begin, end = pieces[0].begin // _PAGE * _PAGE, pieces[-1].begin + pieces[-1].nbytes
        window = self._windows.get()
        try:
            memory = bytes_of(window)[: -(-(end - begin) // _PAGE) * _PAGE]
            _read(path, file, memory, begin, end - begin, _DAMAGED_SHARD)
            source: Any = window.numpy()
            for piece in pieces:  # numpy's copies leave the interpreter's lock to others, and are one thread's work
                skip = piece.begin - begin
                target[piece.target : piece.target + piece.nbytes] = source[skip : skip + piece.nbytes]
        finally:
            self._windows.put(window)


def layer_reader_for(
    layers: Sequence[Any], streamed: Sequence[int], reader: WeightReader, pack: Pack | None, cached: Collection[int]
) -> LayerReader:
    """What reads layers for every pass; closes the files that it reads from.

    Args:
        layers: the decoder layers.
        streamed: indices of those to be read.
        reader: of the checkpoint; not used where there is a pack.
        pack: the weights repacked, if they have been.
        cached: indices of the layers that the page cache has room for.
    """
    if pack is not None:
        return PackLayerReader(pack)
    layouts = {index: LayerLayout.of(layers[index]) for index in streamed}
    return ShardLayerReader(reader, layouts, cached) if reader.is_streamable else CheckpointLayerReader(reader, layouts)


# --- files ---------------------------------------------------------------------------------------------------------


class _Files:
    """Open files, each for reading through the page cache or past it."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._closing = ExitStack()

    def open(self, path: Path, *, cached: bool) -> int:
        """A descriptor; one that bypasses the page cache is only had where the file system has nothing against it."""
        if (path, cached) not in self._open:
            with disk_errors(path, "read"):
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if cached else open_unbuffered(path)
            self._closing.callback(os.close, file)
            self._open[path, cached] = file
        return self._open[path, cached]

    def close(self) -> None:
        """Closes them."""
        self._closing.close()
        self._open.clear()


def open_unbuffered(path: Path) -> int:
    """A descriptor that bypasses the page cache; an ordinary one where the file system refuses (tmpfs, FUSE)."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)
    try:
        os.preadv(file, [bytes_of(page_aligned(_PAGE))], 0)  # some refuse only now
    except OSError:
        os.close(file)
        return os.open(path, flags)
    return file


def is_unbuffered(file: int) -> bool:
    """Whether an open file's reads bypass the page cache."""
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def _read(path: Path, file: int, memory: memoryview, begin: int, least: int, hint: str) -> None:
    """Fills memory with the file's bytes from `begin` on: all of it, or `least` bytes where the file ends.

    Raises:
        CorruptCheckpointError: the file has ended before.
        ModelError: it cannot be read.
    """
    done = 0
    while True:
        try:  # a context manager takes a microsecond, and several between passes: much for a small layer
            done += os.preadv(file, [memory[done:] if done else memory], begin + done)
        except OSError as error:
            raise disk_error(error, path, "read", hint) from error
        if done >= least:
            return
        # One call moves less than 2 GiB, and what bypasses the page cache goes on at a page.
        whole = done // _PAGE * _PAGE
        if whole == 0 or os.fstat(file).st_size < begin + least:
            raise CorruptCheckpointError(f"{path} has lost its end", hint)
        done = whole


def _read_pieces(path: Path, file: int, pieces: Sequence[tuple[memoryview, int]]) -> None:
    for memory, begin in pieces:
        _read(path, file, memory, begin, len(memory), _DAMAGED_SHARD)


# --- windows of shards ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Bytes of one tensor: where they begin in their file, where in the slot, and how many they are."""

    path: Path
    begin: int
    target: int
    nbytes: int

    @property
    def window(self) -> tuple[Path, int]:
        """The part of the file that it lies in."""
        return self.path, self.begin // READ_WINDOW_BYTES


def _windows(tensors: Sequence[tuple[TensorInfo, int]]) -> Iterator[tuple[Path, list[_Piece]]]:
    """What lies in the same window of the same file, by file and offset.

    Args:
        tensors: and where each belongs in the slot.
    """
    pieces = [piece for info, target in tensors for piece in _pieces(info, target)]
    pieces.sort(key=lambda piece: (piece.path, piece.begin))
    for (path, _), group in groupby(pieces, key=lambda piece: piece.window):
        yield path, list(group)


def _pieces(info: TensorInfo, target: int) -> Iterator[_Piece]:
    """A tensor, cut where a window ends."""
    begin, end = info.offset, info.offset + info.nbytes
    while begin < end:
        cut = min(end, (begin // READ_WINDOW_BYTES + 1) * READ_WINDOW_BYTES)
        yield _Piece(info.file, begin, target + begin - info.offset, cut - begin)
        begin = cut
