"""Processes of one thread, which may fork: a forked process would wait for ever for the other threads."""

import time
from pathlib import Path

_PATIENCE_S = 30.0


def wait_until_alone() -> None:
    """Wait until the system has removed the threads that were joined; fail if others go on."""
    end = time.monotonic() + _PATIENCE_S
    while len(threads := list(Path("/proc/self/task").iterdir())) > 1:
        assert time.monotonic() < end, f"{len(threads)} threads"
        time.sleep(0.001)
