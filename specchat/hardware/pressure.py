"""Watching for a lack of memory: the system's and control groups' free memory, and time lost to waiting for memory.

Linux reports the time that programs wait for memory as "pressure stall information" (PSI). Swapping, and reading again
pages of files that were just dropped, both appear there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specchat.hardware.system import cgroup_memory, own_groups
from specchat.units import GIB, KIB, MIB, format_bytes

# A look reads up to eight small files, which takes 0.1 to 0.3 ms.
_LOOK_EVERY_S = 0.5
# The system averages stalls over 10 seconds, so the effect of a change is not seen earlier.
_STALLS_OVER_S = 10.0
_STALLED_PERCENT = 20.0
# The system begins to swap when less than its own reserve is free, which is below 1% of the memory. File pages that can
# be dropped count as available.
_LEAST_SHARE, _LEAST_FLOOR, _LARGEST_FLOOR = 32, 64 * MIB, GIB
_FILE_PAGES = ("inactive_file", "active_file")


@dataclass(frozen=True)
class Shortage:
    """A lack of memory.

    Attributes:
        missing_bytes: memory that should be released; None if the amount is unknown, because programs wait for memory
            although some is available.
        reason: figures for the user.
    """

    missing_bytes: int | None
    reason: str


class MemoryWatch:
    """Looks for a lack of memory, at most twice a second.

    Args:
        proc: folder of the system's figures.
        cgroups: folder of the control groups.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._clock = clock
        self._next_look = float("-inf")
        self._next_stall = float("-inf")
        own = proc / "self" / "cgroup"
        v2, _ = own_groups(own)
        self._own = own
        self._stall_files = [proc / "pressure" / "memory", cgroups / v2.lstrip("/") / "memory.pressure"]

    def look(self) -> Shortage | None:
        """Return the lack of memory; None if there is none, if the last look was just now, or if nothing is known."""
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_EVERY_S
        total, available = self._memory()
        floor = _floor(total)
        if available < floor:
            figures = f"{format_bytes(available)} of {format_bytes(total)} available"
            return Shortage(2 * floor - available, figures)
        if now < self._next_stall:
            return None
        stalled = max(map(_stalled_percent, self._stall_files))
        if stalled < _STALLED_PERCENT:
            return None
        self._next_stall = now + _STALLS_OVER_S
        return Shortage(None, f"programs wait for memory {stalled:.0f}% of the time")

    def spare_bytes(self) -> int | None:
        """Return the memory that may be taken before any is missing; None if the system does not say."""
        total, available = self._memory()
        return max(available - _floor(total), 0) if total else None

    def _memory(self) -> tuple[int, int]:
        """Return the memory of the system, or of the control group that has less left, and the available part."""
        system = _meminfo(self._proc / "meminfo")
        group = cgroup_memory(self._cgroups, self._own, _FILE_PAGES)
        return min((each for each in (system, group) if each is not None), key=lambda each: each[1], default=(0, 0))


def _floor(total_bytes: int) -> int:
    """Return the memory that stays available."""
    return min(max(total_bytes // _LEAST_SHARE, _LEAST_FLOOR), _LARGEST_FLOOR, total_bytes // 8)


def _meminfo(path: Path) -> tuple[int, int] | None:
    """Return the system's memory and the available part, in bytes; None if the system does not say."""
    values = dict(line.split(":", 1) for line in _lines(path) if ":" in line)
    try:
        return int(values["MemTotal"].split()[0]) * KIB, int(values["MemAvailable"].split()[0]) * KIB
    except (KeyError, ValueError, IndexError):
        return None


def _stalled_percent(path: Path) -> float:
    """Return the share of the last 10 seconds in which a program waited for memory, in percent; 0 if unknown."""
    for line in _lines(path):
        kind, *values = line.split()
        if kind == "some" and values and values[0].startswith("avg10="):
            return float(values[0].removeprefix("avg10="))
    return 0.0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
