"""A machine whose memory is short at will: the files by which Linux says so, in a folder of the test's own."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from specchat.hardware.pressure import MemoryWatch
from specchat.units import GIB, KIB, MIB


class ShortMachine:
    """The files below /proc and /sys/fs/cgroup.

    Args:
        folder: folder to write to.
        total_bytes: memory of the machine.
    """

    def __init__(self, folder: Path, total_bytes: int = 16 * GIB) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.total_bytes = total_bytes
        for path in (self.proc / "pressure", self.proc / "self", self.cgroups):
            path.mkdir(parents=True, exist_ok=True)
        self.calm()

    def calm(self) -> None:
        """Half of the memory is available, and no program waits."""
        self.has(self.total_bytes // 2)
        self.stalls(0.0)

    def has(self, available_bytes: int, total_bytes: int | None = None) -> None:
        """Set the available memory, and the memory of the machine."""
        total = (total_bytes or self.total_bytes) // KIB
        text = f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available_bytes // KIB} kB\n"
        (self.proc / "meminfo").write_text(text)

    def lacks(self, missing_bytes: int) -> None:
        """Let this many KiB be missing, at most 128 MiB: twice what a machine of four times that keeps free."""
        assert missing_bytes <= 128 * MIB
        self.has(0, 4 * missing_bytes)

    def stalls(self, percent: float) -> None:
        """Set the time in which programs wait for memory."""
        lines = (f"{kind} avg10={percent:.2f} avg60=0.00 avg300=0.00 total=0\n" for kind in ("some", "full"))
        (self.proc / "pressure" / "memory").write_text("".join(lines))

    def watch(self) -> MemoryWatch:
        """A watch whose every look is long after the one before."""
        moments = count(0, 60)
        return MemoryWatch(self.proc, self.cgroups, lambda: float(next(moments)))
