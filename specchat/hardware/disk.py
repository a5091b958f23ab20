"""Cold files for measurements: eviction from the page cache, proof of it, and raw reads at full disk speed."""

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import psutil

from specchat.errors import NotAvailableError, SpecchatError
from specchat.records.limits import READ_CHUNK_BYTES, READ_THREADS
from specchat.units import MIB

MAX_RESIDENT_SHARE = 0.01

_QUIET_S = 0.05
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class RawRead:
    """A timed read of whole files, without processing.

    Attributes:
        num_bytes: bytes read.
        seconds: time of the read.
        direct: whether every byte came past the page cache (O_DIRECT).
    """

    num_bytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_s(self) -> float:
        """Read rate in bytes per second."""
        return self.num_bytes / self.seconds


def total_bytes(files: Iterable[Path]) -> int:
    """Return the total size of files."""
    return sum(file.stat().st_size for file in files)


def evict(files: Sequence[Path]) -> float:
    """Evict files from the page cache and return the share of their pages that remains.

    Raises:
        NotAvailableError: this system cannot evict files.
        SpecchatError: more than 1% of the pages remain: another program uses the files, or the file system has a cache.
    """
    if not hasattr(os, "posix_fadvise"):
        raise NotAvailableError("this system cannot evict files from the page cache", hint="measure without --cold")
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        _wait_until_quiet()
        for file in files:
            _evict(file)
        share = resident_share(files)
        if share < MAX_RESIDENT_SHARE:
            return share
        if time.monotonic() > deadline:
            raise SpecchatError(
                f"cannot measure a cold pass: {share:.0%} of {files[0].parent} stays in the page cache",
                hint="choose a folder that is not in memory, and close programs that have the files open",
            )


def resident_share(files: Iterable[Path]) -> float:
    """Return the share of the files' pages that is in the page cache, by mincore."""
    counts = [_resident_pages(file) for file in files]
    return sum(resident for resident, _ in counts) / max(sum(total for _, total in counts), 1)


def read_raw(files: Sequence[Path], *, direct: bool) -> RawRead:
    """Read files in chunks from several threads, in order, as an unthrottled layer streamer would.

    Args:
        files: files to read from beginning to end.
        direct: whether to bypass the page cache where the file system allows it.
    """
    jobs: SimpleQueue[tuple[Path, int]] = SimpleQueue()
    for file in files:
        for start in range(0, file.stat().st_size, READ_CHUNK_BYTES):
            jobs.put((file, start))
    buffers = [_touched_memory() for _ in range(READ_THREADS)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        # All threads take from one queue. If each thread had its own files, the reads would drift apart, and a disk is
        # slower when it reads in two places.
        all_direct = all(pool.map(partial(_read_queue, jobs, direct), buffers))
    return RawRead(total_bytes(files), time.perf_counter() - begin, all_direct)


def _touched_memory() -> mmap.mmap:
    """Return page-aligned memory for one chunk, with its pages already mapped and huge where possible.

    O_DIRECT reads into small pages took twice as long (here 0.8-1.2 GB/s instead of 2.1-2.4).
    """
    memory = mmap.mmap(-1, READ_CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # kernels without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(READ_CHUNK_BYTES))
    return memory


def _wait_until_quiet() -> None:
    """Wait until this process stops reading: a layer streamer still prefetches for the next pass."""
    if not hasattr(psutil.Process, "io_counters"):
        return
    process = psutil.Process()
    deadline = time.monotonic() + _PATIENCE_S
    before = process.io_counters().read_chars
    while time.monotonic() < deadline:
        time.sleep(_QUIET_S)
        now = process.io_counters().read_chars
        # not exactly 0: psutil itself reads a few lines of /proc
        if now - before < MIB:
            return
        before = now


def _evict(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a read-only file system has nothing to write back
            os.fsync(fd)  # dirty pages cannot be evicted
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _resident_pages(file: Path) -> tuple[int, int]:
    """Return the file's pages in the page cache and its total pages."""
    size = file.stat().st_size
    if size == 0:
        return 0, 0
    num_pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * num_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    with file.open("rb") as stream:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(flag & 1 for flag in bytes(flags)), num_pages


def _read_queue(jobs: "SimpleQueue[tuple[Path, int]]", direct: bool, buffer: mmap.mmap) -> bool:
    """Read chunks until the queue is empty; return whether all of them bypassed the page cache."""
    open_files: dict[Path, _RawFile] = {}
    try:
        with memoryview(buffer) as view, suppress(Empty):
            while True:
                path, start = jobs.get_nowait()
                if path not in open_files:
                    open_files[path] = _RawFile(path, direct)
                open_files[path].read(view, start)
        return all(file.direct for file in open_files.values())
    finally:
        for file in open_files.values():
            file.close()


class _RawFile:
    """A file read with O_DIRECT as long as its file system accepts it.

    Attributes:
        direct: whether O_DIRECT is still in use.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self._path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._fd = -1
        self._open()

    def read(self, view: memoryview, start: int) -> None:
        """Read bytes from `start` until `view` or the file ends."""
        try:
            os.preadv(self._fd, [view], start)
        except OSError as error:
            self._fall_back(error)
            os.preadv(self._fd, [view], start)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        try:
            self._fd = os.open(self._path, flags)
        except OSError as error:
            self._fall_back(error)

    def _fall_back(self, error: OSError) -> None:
        """Reopen without O_DIRECT after it was refused, at opening (tmpfs) or at the first read (FUSE)."""
        if not self.direct or error.errno != errno.EINVAL:
            raise error
        self.close()
        self.direct = False
        self._open()
