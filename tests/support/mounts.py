"""Real file systems with real faults: small ones in memory, and ones on a device that breaks. They need root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_DEVICE_BYTES = 48 << 20


def _run(*command: object) -> str:
    """Run a command; skip the test where the system does not permit it."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"this system has no {command[0]}")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} is not permitted here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of a given size in memory, mounted at `folder`."""
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder)
    try:
        yield folder
    finally:
        _run("umount", "-l", folder)


def resize(folder: Path, num_bytes: int) -> None:
    """Change the size of a file system of `small_disk`."""
    _run("mount", "-o", f"remount,size={num_bytes}", folder)


class BreakingDisk:
    """A file system on a block device, whose reads fail with EIO once it is broken.

    Attributes:
        folder: folder at which the file system is mounted.
    """

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self._image = image

    def break_reads(self) -> None:
        """Take the device's blocks away: everything that is not in memory yet cannot be read any more."""
        os.sync()
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.truncate(self._image, 1 << 20)


@contextmanager
def breaking_disk(folder: Path) -> Iterator[BreakingDisk]:
    """A file system on a loop device over a file, mounted at `folder`."""
    folder.mkdir()
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(_DEVICE_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", image)
    device = _run("losetup", "-f", "--show", image)
    try:
        _run("mount", device, folder)
        try:
            yield BreakingDisk(folder, image)
        finally:
            _run("umount", "-l", folder)
    finally:
        _run("losetup", "-d", device)
