"""Files on disk as a measurement wants them: out of the page cache, provably, and read as fast as the disk gives."""

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
    """Files read from end to end with nothing done to the bytes.

    Attributes:
        num_bytes, seconds: how much, in what time.
        direct: past the page cache (O_DIRECT), for all of it.
    """

    num_bytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_s(self) -> float:
        """The rate."""
        return self.num_bytes / self.seconds


def total_bytes(files: Iterable[Path]) -> int:
    """Their sizes."""
    return sum(file.stat().st_size for file in files)


def evict(files: Sequence[Path]) -> float:
    """Takes files out of the page cache; returns the share of their pages that is still there.

    Raises:
        NotAvailableError: this system has no way to do it.
        SpecchatError: more than 1% stays, because something else uses them or a file system keeps its own cache.
    """
    if not hasattr(os, "posix_fadvise"):
        raise NotAvailableError("this system has no way to take a file out of its cache", hint="measure without --cold")
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
                f"{share:.0%} of {files[0].parent} stays in the page cache, so no pass can be measured cold",
                hint="a file system in memory cannot be evicted; another program may have the files open",
            )


def resident_share(files: Iterable[Path]) -> float:
    """The share of the files' pages that is in the page cache, by mincore."""
    counts = [_resident_pages(file) for file in files]
    return sum(resident for resident, _ in counts) / max(sum(total for _, total in counts), 1)


def read_raw(files: Sequence[Path], *, direct: bool) -> RawRead:
    """Reads files in chunks from several threads, in order, as a streamer does that has nothing to wait for.

    Args:
        files: each from beginning to end.
        direct: past the page cache, where the file system lets us.
    """
    jobs: SimpleQueue[tuple[Path, int]] = SimpleQueue()
    for file in files:
        for start in range(0, file.stat().st_size, READ_CHUNK_BYTES):
            jobs.put((file, start))
    buffers = [_touched_memory() for _ in range(READ_THREADS)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        # One queue for both: a share for each would let them drift apart, and disks are slower in two places.
        all_direct = all(pool.map(partial(_read_queue, jobs, direct), buffers))
    return RawRead(total_bytes(files), time.perf_counter() - begin, all_direct)


def _touched_memory() -> mmap.mmap:
    """Memory for a chunk that starts at a page and whose pages are there already: huge ones, if they can be had.

    Unbuffered reads go to physical pages, and into small ones they took twice as long (here 0.8-1.2 GB/s, not 2.1-2.4).
    """
    memory = mmap.mmap(-1, READ_CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # kernels without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(READ_CHUNK_BYTES))
    return memory


def _wait_until_quiet() -> None:
    """Until this process reads nothing any more: a streamer fetches ahead for the next pass, and would go on."""
    if not hasattr(psutil.Process, "io_counters"):
        return
    process = psutil.Process()
    deadline = time.monotonic() + _PATIENCE_S
    before = process.io_counters().read_chars
    while time.monotonic() < deadline:
        time.sleep(_QUIET_S)
        now = process.io_counters().read_chars
        # psutil itself reads a few lines of /proc
        if now - before < MIB:
            return
        before = now


def _evict(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a read-only file system has nothing to write back
            os.fsync(fd)  # a dirty page stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _resident_pages(file: Path) -> tuple[int, int]:
    """Pages of the file in the page cache, and pages altogether."""
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
    """Reads chunks until the queue is empty; whether all of them went past the page cache."""
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
    """A file read past the page cache for as long as its file system has nothing against it.

    Attributes:
        direct: whether it is.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self._path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._fd = -1
        self._open()

    def read(self, view: memoryview, start: int) -> None:
        """As many bytes from `start` on as `view` holds or the file has."""
        try:
            os.preadv(self._fd, [view], start)
        except OSError as error:
            self._fall_back(error)
            os.preadv(self._fd, [view], start)

    def close(self) -> None:
        """Closes it."""
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
        """Opens it again without O_DIRECT if that was refused, at opening (tmpfs) or at the first read (FUSE)."""
        if not self.direct or error.errno != errno.EINVAL:
            raise error
        self.close()
        self.direct = False
        self._open()
