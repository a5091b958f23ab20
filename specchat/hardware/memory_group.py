"""Memory control groups of our own: a real limit for a process, its children, and the page cache that they fill."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from specchat.closing import Closeable
from specchat.errors import NotAvailableError
from specchat.units import format_bytes

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PROCESSES = "cgroup.procs"
_V1_LIMIT, _V2_LIMIT = "memory.limit_in_bytes", "memory.max"
# Swap would let a process have more than its limit; absent where the kernel does not count swap.
_V1_SWAP, _V2_SWAP = "memory.memsw.limit_in_bytes", "memory.swap.max"
_REMOVING_S = 5.0
_PREFIX = "specchat-"  # of groups' names


class MemoryGroup(Closeable):
    """A memory control group (v1 or v2) with a limit; pages that a process reads first are charged to its group.

    Args:
        limit_bytes: most bytes of memory and page cache.
        root: mount point of the control groups.
        own: file that names this process's groups.

    Raises:
        NotAvailableError: the system has no memory control groups, or does not permit a new one.
    """

    def __init__(self, limit_bytes: int, root: Path = _ROOT, own: Path = _OWN) -> None:
        self._home, folders, names = _own_groups(root, own)
        self._folder = _made(folders, names, limit_bytes)
        self._entered = False

    def enter(self) -> None:
        """Move this process, with all its threads, into the group; memory that it has already stays where it is."""
        (self._folder / _PROCESSES).write_text(str(os.getpid()))
        self._entered = True

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs another one inside the group."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self._folder / _PROCESSES), *command]

    def close(self) -> None:
        """Move this process back if it has entered, and remove the group once its children have ended."""
        if self._entered:
            with suppress(OSError):
                (self._home / _PROCESSES).write_text(str(os.getpid()))
        deadline = time.monotonic() + _REMOVING_S
        while self._folder.exists():
            try:
                self._folder.rmdir()
            except OSError:  # a child is still ending
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)


def _own_groups(root: Path, own: Path) -> tuple[Path, list[Path], tuple[str, str]]:
    """Return this process's group, the groups that a new one may lie in, and the names of the files with limits.

    In v2 a group with processes cannot hold groups with limits, so the groups above are tried too. A group that this
    process has made and entered is left out: a group inside it would have to share its limit.

    Raises:
        NotAvailableError: this system has no memory control groups.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    v1 = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    v2 = next((path for _, kinds, path in lines if not kinds), None)
    if v1 is None and v2 is None:
        raise NotAvailableError(
            "this system has no memory control groups", hint="leave --limit-memory out, or use a Linux container"
        )
    top, names = (root, (_V2_LIMIT, _V2_SWAP)) if v1 is None else (root / "memory", (_V1_LIMIT, _V1_SWAP))
    home = top / (v1 or v2 or "").strip("/")
    above = [home, *(folder for folder in home.parents if folder.is_relative_to(top))]
    return home, [folder for folder in above if folder.is_dir() and not folder.name.startswith(_PREFIX)], names


def _made(folders: Sequence[Path], names: tuple[str, str], limit_bytes: int) -> Path:
    """Make a group with a limit in the first folder that permits it.

    Raises:
        NotAvailableError: no folder does.
    """
    why = "no control group is mounted"
    for parent in folders:
        _remove_left(parent)
        folder = parent / f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError as error:
            why = str(error.strerror)
            continue
        try:
            if not (folder / names[0]).exists():
                raise FileNotFoundError(0, f"{parent} does not limit memory")
            (folder / names[0]).write_text(str(limit_bytes))
        except OSError as error:
            why = str(error.strerror)
            folder.rmdir()
            continue
        with suppress(OSError):  # kernels without a count of swap
            (folder / names[1]).write_text("0" if names[1] == _V2_SWAP else str(limit_bytes))
        return folder
    raise NotAvailableError(
        f"memory cannot be limited to {format_bytes(limit_bytes)} here: {why}",
        hint="run as root, or in a container with a limit (docker run --memory) without --limit-memory",
    )


def _remove_left(parent: Path) -> None:
    """Remove the groups of processes that were killed; the kernel keeps a group that still has processes."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            with suppress(OSError):
                folder.rmdir()
