"""The files of a pack, byte by byte, and how to write them so that an incomplete file never passes for a complete one.

A data file is standard safetensors. Its header is padded with spaces so that the data begin at a multiple of a page.
Each tensor begins at a multiple of 256 from there. The format allows no holes, so the gaps are tensors of zeros named
`__pad__.<file>.<n>`. The data's length is a multiple of a page too, so a layer is read or mapped as one block.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specchat.errors import AllocationError, DoesNotFitError, ModelError, SpecchatError, is_lack_of_memory
from specchat.files import open_regular
from specchat.models.checkpoint.dtypes import stored_name
from specchat.models.checkpoint.layout import LAYER_ALIGNMENT, TENSOR_ALIGNMENT, aligned
from specchat.records.limits import READ_CHUNK_BYTES

NOT_QUANTIZED = "none"  # stands for quantizer and version
PAD_PREFIX = "__pad__."
TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

PACK_HINT = (
    "check permissions and the disk, or set SPECCHAT_CACHE_DIR to another folder; packs may be deleted at any time"
)


@contextmanager
def disk_errors(path: Path, verb: str, hint: str = PACK_HINT) -> Iterator[None]:
    """Convert errors of the operating system about `path`; `verb` as in "cannot write x"."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, verb, hint) from error


def disk_error(error: OSError, path: Path, verb: str, hint: str = PACK_HINT) -> SpecchatError:
    """Return specchat's error for an error of the operating system."""
    message = f"cannot {verb} {path}: {error.strerror or error}"
    if is_lack_of_memory(error):
        return AllocationError(message, "close other programs, or use a smaller --vram or --ctx")
    if error.errno in _FULL:
        hint = "free some space, or set SPECCHAT_CACHE_DIR to a folder on a larger disk; complete files are kept"
        return DoesNotFitError(message, hint)
    return ModelError(message, hint)


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of a data file; `offset` counts bytes from the start of the data."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileLayout:
    """Positions of the tensors in a data file.

    Attributes:
        name: file name.
        tensors: tensors by ascending offset.
        nbytes: length of the data in bytes, without the header.
    """

    name: str
    tensors: tuple[PlacedTensor, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor]) -> "FileLayout":
        """Return the layout of a file for these tensors (or meta tensors) in the given order, as in `LayerLayout`."""
        placed, end = [], 0
        for key, tensor in tensors.items():
            begin = aligned(end, TENSOR_ALIGNMENT)
            placed.append(PlacedTensor(key, tensor.dtype, tuple(tensor.shape), begin, tensor.nbytes))
            end = begin + tensor.nbytes
        return cls(name, tuple(placed), aligned(end, LAYER_ALIGNMENT))

    def header(self) -> bytes:
        """Return the bytes before the data: length, JSON, spaces; a multiple of a page."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        for tensor in self.tensors:
            span = [tensor.offset, tensor.offset + tensor.nbytes]
            entries[tensor.key] = _entry(stored_name(tensor.dtype), tensor.shape, span)
        for number, (begin, end) in enumerate(self._gaps()):
            entries[f"{PAD_PREFIX}{Path(self.name).stem}.{number}"] = _entry("U8", (end - begin,), [begin, end])
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = aligned(8 + len(text), LAYER_ALIGNMENT) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield begin and end of the bytes between tensors."""
        end = 0
        for tensor in self.tensors:
            if end < tensor.offset:
                yield end, tensor.offset
            end = tensor.offset + tensor.nbytes
        if end < self.nbytes:
            yield end, self.nbytes


def _entry(dtype: str, shape: Sequence[int], span: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": span}


@dataclass(frozen=True)
class FileRecord:
    """A pack's record of one of its files.

    Attributes:
        name: file name within the pack's folder.
        data_offset: bytes before the data (the header).
        nbytes: bytes of data.
        header_crc32: checksum of the bytes before the data.
        crc32s: checksums of the data, one per READ_CHUNK_BYTES.
    """

    name: str
    data_offset: int
    nbytes: int
    header_crc32: int
    crc32s: tuple[int, ...]

    @property
    def file_nbytes(self) -> int:
        """Length of the whole file."""
        return self.data_offset + self.nbytes

    def fault(self, folder: Path) -> str | None:
        """Describe what is wrong with the file's size or header, without reading the data; None if nothing is.

        Raises:
            ModelError: the file exists but cannot be read.
        """
        path = folder / self.name
        with disk_errors(path, "read"):
            try:
                with open_regular(path) as stream:
                    nbytes = os.fstat(stream.fileno()).st_size
                    header = stream.read(self.data_offset)
            except FileNotFoundError:
                return f"{path} is missing"
        if nbytes != self.file_nbytes:
            return f"{path} has {nbytes} bytes instead of {self.file_nbytes}"
        return None if zlib.crc32(header) == self.header_crc32 else f"{path} has a damaged header"

    def good_chunks(self, folder: Path, *, from_disk: bool = False) -> Iterator[bool]:
        """Yield for each chunk of the file's data whether it matches its checksum.

        Args:
            folder: folder of the pack.
            from_disk: whether to bypass the page cache, which may hide a bad disk.

        Raises:
            ModelError: the file cannot be read.
        """
        path = folder / self.name
        with disk_errors(path, "read"), path.open("rb", buffering=0) as stream:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            stream.seek(self.data_offset)
            buffer = memoryview(bytearray(min(self.nbytes, READ_CHUNK_BYTES)))
            for index, crc32 in enumerate(self.crc32s):
                begin, end = chunk_span(self.nbytes, index)
                yield _read_into(stream, buffer[: end - begin]) and zlib.crc32(buffer[: end - begin]) == crc32

    def describes(self, layout: FileLayout) -> bool:
        """Return whether the recorded file has exactly this layout."""
        header = layout.header()
        found = (self.name, self.data_offset, self.nbytes, self.header_crc32)
        return found == (layout.name, len(header), layout.nbytes, zlib.crc32(header))


def _read_into(stream: RawIOBase, buffer: memoryview) -> bool:
    """Fill the buffer; return False if the file ends early."""
    filled = 0
    while filled < len(buffer) and (count := stream.readinto(buffer[filled:])):
        filled += count
    return filled == len(buffer)


def chunk_span(nbytes: int, index: int) -> tuple[int, int]:
    """Return begin and end of the index-th chunk of `nbytes` of data."""
    return index * READ_CHUNK_BYTES, min((index + 1) * READ_CHUNK_BYTES, nbytes)


def write_tensors(
    folder: Path, layout: FileLayout, tensors: Mapping[str, Tensor], wrote: Callable[[int], None]
) -> FileRecord:
    """Write one data file atomically; it is durable under its name on return.

    Args:
        folder: folder of the pack.
        layout: names, dtypes and shapes of `tensors`, which are requested one at a time in this order.
        tensors: CPU tensors by key.
        wrote: receives the number of data bytes after each write.

    Raises:
        DoesNotFitError: the disk is full; an older file of the same name is kept.
        ModelError: the file cannot be written; an older file of the same name is kept.
    """
    header = layout.header()
    with _new_file(folder / layout.name) as fd:
        write_all(fd, header, folder / layout.name)
        writer = _ChunkWriter(fd, folder / layout.name, wrote)
        for piece in _pieces(layout, tensors):
            writer.write(piece)
        writer.flush()
    return FileRecord(layout.name, len(header), layout.nbytes, zlib.crc32(header), tuple(writer.crc32s))


def write_small(folder: Path, name: str, data: bytes) -> FileRecord:
    """Write a small file atomically and durably; errors as in `write_tensors`."""
    with _new_file(folder / name) as fd:
        write_all(fd, data, folder / name)
    sums = tuple(zlib.crc32(data[i : i + READ_CHUNK_BYTES]) for i in range(0, len(data), READ_CHUNK_BYTES))
    return FileRecord(name, 0, len(data), zlib.crc32(b""), sums)


def _pieces(layout: FileLayout, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield the data of a file from start to end."""
    end = 0
    for placed in layout.tensors:
        yield memoryview(bytes(placed.offset - end))
        tensor = tensors[placed.key]
        assert (tensor.dtype, tuple(tensor.shape)) == (placed.dtype, placed.shape), placed.key
        yield bytes_of(tensor)
        end = placed.offset + placed.nbytes
    yield memoryview(bytes(layout.nbytes - end))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the values of a CPU tensor in row-major order as bytes, without a copy if it is contiguous."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()  # as in TensorReader
    return memoryview(array)


class _ChunkWriter:
    """Sequential writer that keeps a checksum per chunk. `crc32s` is complete after `flush`."""

    def __init__(self, fd: int, path: Path, wrote: Callable[[int], None]) -> None:
        self.crc32s: list[int] = []
        self._fd = fd
        self._path = path
        self._wrote = wrote
        self._crc32 = 0
        self._filled = 0

    def write(self, data: memoryview) -> None:
        while data:
            part = data[: READ_CHUNK_BYTES - self._filled]
            write_all(self._fd, part, self._path)
            self._crc32 = zlib.crc32(part, self._crc32)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == READ_CHUNK_BYTES:
                self.flush()

    def flush(self) -> None:
        if self._filled:
            self.crc32s.append(self._crc32)
            self._wrote(self._filled)
            self._crc32 = self._filled = 0


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Open a temporary file that is synced and renamed if the block succeeds, and deleted if it fails."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with disk_errors(path, "write"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        try:
            yield fd
            with disk_errors(path, "write"):
                os.fsync(fd)
        finally:
            os.close(fd)
        with disk_errors(path, "write"):
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # keep the first error; the next build clears the folder
            temporary.unlink(missing_ok=True)
        raise


def write_all(fd: int, data: bytes | memoryview, path: Path) -> None:
    """Write all of `data`; errors name `path`."""
    view = memoryview(data)
    with disk_errors(path, "write"):
        while view:  # one call moves at most 2 GiB on Linux
            view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that names in it are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
