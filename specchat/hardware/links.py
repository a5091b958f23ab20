"""Measured rates of memory, disk and matmuls. cuda.py measures a GPU's links."""

import ctypes
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specchat.errors import SpecchatError
from specchat.hardware.disk import evict, read_raw, total_bytes
from specchat.hardware.machine import MatmulRate
from specchat.records.limits import MATMUL_ROWS
from specchat.units import MIB

if TYPE_CHECKING:
    import torch

_RAM_BYTES = 256 * MIB  # several times any processor's cache
_MIN_RAM_BYTES = 64 * MIB
_RAM_THREADS = 8  # enough to saturate the memory of any consumer machine
_RAM_COPIES, _RAM_SERIES = 4, 5

_DISK_BYTES = 512 * MIB
_MIN_DISK_BYTES = 64 * MIB
_DISK_SHARE = 8  # the temporary file takes at most 1/8 of the free space
_DISK_READS = 3

# The size of a layer's matrix in a 7B model.
_MATRIX = 4096
_MATMUL_S = 0.2  # per row count
_LEAST_ROWS = 4  # of a packed matmul
_PACKING_ROWS = 8  # with a hint of one row, oneDNN keeps float32 matrices as they are


def measure_ram_copy(available_bytes: int) -> float | None:
    """Measure the copy rate of all cores together, between buffers larger than any cache.

    Args:
        available_bytes: free memory; the buffers take at most 1/4 of it.

    Returns:
        Median bytes per second of several series; None where there is too little memory.
    """
    size = min(_RAM_BYTES, available_bytes // 8)
    if size < _MIN_RAM_BYTES:
        return None
    num_threads = min(_RAM_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    source, target = (ctypes.create_string_buffer(size) for _ in range(2))
    addresses = ctypes.addressof(source), ctypes.addressof(target)
    part = size // num_threads

    def copy(index: int) -> None:
        for _ in range(_RAM_COPIES):
            ctypes.memmove(addresses[1] + index * part, addresses[0] + index * part, part)

    def seconds() -> float:
        begin = time.perf_counter()
        list(pool.map(copy, range(num_threads)))
        return time.perf_counter() - begin

    with ThreadPoolExecutor(num_threads) as pool:
        seconds()  # touches all pages
        spent = statistics.median(seconds() for _ in range(_RAM_SERIES))
    return _RAM_COPIES * part * num_threads / spent


@dataclass(frozen=True)
class DiskRate:
    """Read rate of a disk.

    Attributes:
        is_cold: whether all bytes came from the disk itself, not from the page cache.
    """

    bytes_per_s: float
    is_cold: bool


def measure_disk_read(folder: Path) -> DiskRate | None:
    """Measure the read rate of files in `folder` in large chunks past the page cache, as layers are read.

    Existing weight files are used if they are large enough. Otherwise a temporary file is written.

    Returns:
        Median of three reads; None without permission or without room for a file.
    """
    with _files_to_read(folder) as files:
        if not files:
            return None
        reads = [_read_cold(files) for _ in range(_DISK_READS)]
    return DiskRate(statistics.median(rate for rate, _ in reads), all(cold for _, cold in reads))


def _read_cold(files: list[Path]) -> tuple[float, bool]:
    """Return bytes per second, and whether the page cache was empty."""
    try:
        evict(files)
        evicted = True
    except SpecchatError:  # the files stay in memory, or in another cache; direct reads may still work
        evicted = False
    read = read_raw(files, direct=True)
    return read.bytes_per_s, evicted


@contextmanager
def _files_to_read(folder: Path) -> Iterator[list[Path]]:
    """Yield existing weight files of enough bytes, or a temporary file; nothing if none can be written."""
    there: list[Path] = []
    for file in sorted(folder.rglob("*.safetensors")):
        if file.stat().st_size >= MIB and total_bytes(there) < _DISK_BYTES:
            there.append(file)
    if total_bytes(there) >= _DISK_BYTES:
        yield there
        return
    with tempfile.TemporaryDirectory(prefix="probe-", dir=_made(folder)) as temporary:
        yield _written(Path(temporary) / "read-me")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _written(file: Path) -> list[Path]:
    """Write random bytes, which no file system compresses, through to the disk."""
    size = min(_DISK_BYTES, shutil.disk_usage(file.parent).free // _DISK_SHARE)
    if size < _MIN_DISK_BYTES:
        return []
    block = os.urandom(16 * MIB)
    with file.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return [file]


@dataclass(frozen=True)
class MatmulRates:
    """Matmul rates by rows.

    Attributes:
        stored: rates with a matrix as a checkpoint stores it, as in layers that stream.
        packed: rates with a matrix that a CPU keeps packed or stored, whichever is faster, as in resident layers; empty
            where nothing can be packed.
    """

    stored: tuple[MatmulRate, ...] = ()
    packed: tuple[MatmulRate, ...] = ()


def measure_matmul(device: "torch.device", dtype: Literal["bf16", "fp32"]) -> MatmulRates:
    """Measure matmuls of tree-sized activations with a matrix of a layer's size."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    weight = torch.ones(_MATRIX, _MATRIX, dtype=kind, device=device)
    packed = _packed(weight)
    stored_rates, packed_rates = [], []
    for rows in MATMUL_ROWS:
        x = torch.ones(rows, _MATRIX, dtype=kind, device=device)
        stored_s = _median_seconds(partial(_multiply, partial(torch.nn.functional.linear, weight=weight), x))
        flop = 2 * rows * _MATRIX**2
        stored_rates.append(MatmulRate(rows, flop / stored_s))
        if packed is not None:
            packed_s = min(stored_s, _median_seconds(partial(_multiply, packed, x)))
            packed_rates.append(MatmulRate(rows, flop / packed_s))
    return MatmulRates(tuple(stored_rates), tuple(packed_rates))


def _multiply(way: "Callable[[torch.Tensor], torch.Tensor]", x: "torch.Tensor") -> None:
    """Compute a matmul, and wait for it."""
    import torch

    way(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _packed(weight: "torch.Tensor") -> "Callable[[torch.Tensor], torch.Tensor] | None":
    """Return the matmul of layers that are packed in a CPU's memory, with few rows padded; None where it is none."""
    import torch

    operators = torch.ops.mkldnn
    if weight.is_cuda or not torch.backends.mkldnn.is_available() or not hasattr(operators, "_reorder_linear_weight"):
        return None
    try:
        packed = operators._reorder_linear_weight(weight, _PACKING_ROWS)
    except RuntimeError:  # processors without kernels for the dtype
        return None

    def multiply(x: "torch.Tensor") -> "torch.Tensor":
        rows = torch.nn.functional.pad(x, (0, 0, 0, max(_LEAST_ROWS - len(x), 0)))
        out: torch.Tensor = operators._linear_pointwise(rows, packed, None, "none", [], "")
        return out

    return multiply


def _median_seconds(work: Callable[[], None]) -> float:
    work()  # the first call initializes libraries
    spent: list[float] = []
    begin = time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - begin < _MATMUL_S:
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)
