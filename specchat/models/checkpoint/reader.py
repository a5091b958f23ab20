"""Reading tensors of a checkpoint into memory that the caller owns."""

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specchat.closing import Closeable
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.dtypes import STORED_DTYPES, stored_torch_dtype
from specchat.models.checkpoint.json_file import fail_to_read
from specchat.models.checkpoint.mapped_file import MappedFile
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo, fail_truncated
from specchat.units import MIB

if TYPE_CHECKING:
    import torch


class TensorReader(Closeable):
    """Reader of a checkpoint's tensors that needs a bounded amount of memory beside the destination.

    Files are opened on first use. Any number of threads may `read` at once. Only one thread at a time may `read_into`,
    because its calls share the staging buffer.
    """

    def __init__(self, checkpoint: Checkpoint, staging_bytes: int = 8 * MIB) -> None:
        """Create a reader of `checkpoint`.

        Args:
            checkpoint: checkpoint whose headers were checked by `open_checkpoint`.
            staging_bytes: size of the staging buffer, in bytes; at least 8, the widest value.
        """
        assert staging_bytes >= 8
        self._tensors = checkpoint.tensors
        self._folder = checkpoint.folder
        self._staging_bytes = staging_bytes
        self._staging: torch.Tensor | None = None
        self._fds: dict[Path, int] = {}
        self._opening = threading.Lock()  # several threads may use a file first
        self._closed = False

    def close(self) -> None:
        """Close the files and free the staging buffer; a second call does nothing."""
        self._closed = True
        self._staging = None
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, key: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return a tensor as saved, in new CPU memory.

        Args:
            key: name of the tensor.
            dtype: dtype of a tensor that must be restored; None for float32. Other tensors keep their dtype.

        Raises:
            CorruptCheckpointError: a missing tensor, or a file that was truncated after its header was read.
            ModelError: the file cannot be read.
        """
        import torch

        info = self._find(key)
        if info.restore is not None:
            stored = torch.empty(info.nbytes, dtype=torch.uint8)
            self._fill(info, 0, _bytes_of(stored))
            return info.restore(stored, dtype or torch.float32)
        out = torch.empty(info.shape, dtype=stored_torch_dtype(info.dtype), device="cpu")
        self.read_into(key, out)
        return out

    def mapped(self, key: str, dtype: "torch.dtype | None" = None) -> "tuple[torch.Tensor, MappedFile | None]":
        """Return a tensor as saved, memory-mapped, so that only the pages in use take memory.

        The tensor is read instead if it must be restored, if its offset is not aligned to its dtype, or if the system
        cannot map the file.

        Args:
            key: name of the tensor.
            dtype: dtype of a tensor that must be restored, as for `read`.

        Returns:
            The tensor, and its file, which the caller checks before each use and closes; None if the tensor was read.

        Raises:
            CorruptCheckpointError, ModelError: the faults that `read` reports.
        """
        import torch

        info = self._find(key)
        stored, file_bytes = stored_torch_dtype(info.dtype), os.fstat(self._fd(info.file)).st_size
        if info.restore is not None or info.offset % stored.itemsize:
            return self.read(key, dtype), None
        if file_bytes < info.offset + info.nbytes:
            fail_truncated(info.file, info.offset + info.nbytes, file_bytes)
        try:
            pages = torch.from_file(str(info.file), shared=False, size=file_bytes, dtype=torch.uint8)
        except RuntimeError:
            return self.read(key), None
        tensor = pages[info.offset : info.offset + info.nbytes].view(stored).view(info.shape)
        return tensor, MappedFile(info.file, info.offset + info.nbytes)

    def are_equal(self, key: str, other: str) -> bool:
        """Return whether two tensors are stored as the same bytes, reading a bounded number of bytes at a time.

        Raises:
            CorruptCheckpointError, ModelError: the faults that `read` reports.
        """
        left, right = self._find(key), self._find(other)
        if (left.dtype, left.shape, left.nbytes) != (right.dtype, right.shape, right.nbytes):
            return False
        step = self._staging_bytes
        blocks = bytearray(step), bytearray(step)
        for begin in range(0, left.nbytes, step):
            size = min(step, left.nbytes - begin)
            for info, block in zip((left, right), blocks, strict=True):
                self._fill(info, begin, memoryview(block)[:size])
            if blocks[0][:size] != blocks[1][:size]:
                return False
        return True

    def read_into(self, key: str, out: "torch.Tensor") -> None:
        """Fill `out` with a tensor's values in row-major order, converted to the dtype of `out`.

        Args:
            key: name of the tensor.
            out: destination with equally many elements, of any shape, strides, dtype and device. Reads go directly into
                contiguous CPU memory of the saved dtype, and else through the staging buffer, piece by piece.

        Raises:
            CorruptCheckpointError: a missing tensor, another number of elements, or a file that was truncated after its
                header was read.
            ModelError: the file cannot be read.
        """
        info = self._find(key)
        if out.numel() != math.prod(info.shape):
            raise CorruptCheckpointError(
                f"tensor {key!r} in {info.file} has shape {list(info.shape)}, but the model expects {list(out.shape)}",
                hint="config.json and the weights do not match; download both again",
            )
        out = out.detach()
        if info.restore is not None:
            out.copy_(self.read(key, out.dtype).view(out.shape))
        elif out.dtype == stored_torch_dtype(info.dtype) and out.device.type == "cpu" and out.is_contiguous():
            self._fill(info, 0, _bytes_of(out))
        else:
            self._convert(info, out)

    def _find(self, key: str) -> TensorInfo:
        info = self._tensors.get(key)
        if info is None:
            raise CorruptCheckpointError(
                f"the checkpoint in {self._folder} has no tensor {key!r}",
                hint="the download may be incomplete; download the model again",
            )
        return info

    def _convert(self, info: TensorInfo, out: "torch.Tensor") -> None:
        """Read through the staging buffer: cast and copy as many values at a time as it holds."""
        width = STORED_DTYPES[info.dtype].nbytes
        step = self._staging_bytes // width
        done = 0  # bytes of the tensor
        for piece in _flat_pieces(out):
            for start in range(0, piece.numel(), step):
                part = piece[start : start + step]
                raw = self._staging_view(part.numel() * width)
                self._fill(info, done, _bytes_of(raw))
                # The copy must be synchronous, because the next iteration overwrites the staging buffer.
                part.copy_(raw.view(stored_torch_dtype(info.dtype)))
                done += raw.numel()

    def _staging_view(self, num_bytes: int) -> "torch.Tensor":
        """Return the first `num_bytes` of the staging buffer, which torch aligns for every dtype."""
        import torch

        if self._staging is None:
            self._staging = torch.empty(self._staging_bytes, dtype=torch.uint8, device="cpu")
        return self._staging[:num_bytes]

    def _fill(self, info: TensorInfo, skip: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes, starting at byte `skip` of the tensor."""
        fd = self._fd(info.file)
        done = 0
        while done < len(buffer):  # one call moves at most 2 GiB on Linux
            try:
                count = os.preadv(fd, [buffer[done:]], info.offset + skip + done)
            except OSError as exc:
                fail_to_read(info.file, exc)
            if count == 0:
                fail_truncated(info.file, info.offset + info.nbytes, os.fstat(fd).st_size)
            done += count

    def _fd(self, file: Path) -> int:
        assert not self._closed, "read from a closed TensorReader"
        with self._opening:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as exc:
                    fail_to_read(file, exc)
            return self._fds[file]


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """Return a writable view of a contiguous CPU tensor's memory."""
    import torch

    # numpy's view keeps the storage alive, unlike ctypes. reshape of contiguous memory never copies.
    # Any: before Python 3.12, numpy's types lack the buffer protocol.
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _flat_pieces(out: "torch.Tensor") -> Iterator["torch.Tensor"]:
    """Yield one-dimensional views that cover `out` in row-major order; one view if `out` is contiguous."""
    if out.is_contiguous():
        yield out.view(-1)
    elif out.dim() == 1:
        yield out
    else:
        for part in out.unbind(0):
            yield from _flat_pieces(part)
