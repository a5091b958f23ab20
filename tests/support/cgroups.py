"""Memory cgroups of our own, below the one that the tests run in: real limits, as containers have them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A memory cgroup with a limit."""

    folder: Path

    def run(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end."""
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]
        return subprocess.run(enter, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a memory cgroup, and remove it afterwards; skip the test where the system does not permit it."""
    parent, limit_file = _own_group()
    folder = parent / f"specchat-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (folder / limit_file).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"the memory of a cgroup cannot be limited here: {error}")
        yield MemoryGroup(folder)
    finally:
        folder.rmdir()


def _own_group() -> tuple[Path, str]:
    """Return the folder of this process's memory cgroup, and the name of its file for the limit (v1 or v2)."""
    lines = [line.split(":", 2) for line in _OWN.read_text().splitlines()] if _OWN.exists() else []
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    for _, controllers, path in lines:
        if not controllers:
            return _ROOT / path.lstrip("/"), "memory.max"
    pytest.skip("this system has no cgroups")
