"""Reads that never block, atomic writes (a file is complete or unchanged, even if interrupted), and times of files."""

import errno
import os
import stat
import tempfile
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

_LATEST = 253_370_764_800  # the year 9999; some file systems keep later times
_SHELL_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/")


def open_regular(file: Path) -> BinaryIO:
    """Open a file for reading; refuse pipes and devices, whose bytes may never come or never end.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(file))
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def read_regular(file: Path) -> bytes:
    """Return the bytes of a file; refuse pipes and devices.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    with open_regular(file) as stream:
        return stream.read()


def read_given(file: Path) -> bytes:
    """Return the bytes of a file that a user named: a regular file, or a pipe of the shell, such as <(command).

    Raises:
        OSError: the file cannot be read, or is neither.
    """
    if str(file).startswith(_SHELL_PIPES) and stat.S_ISFIFO(file.stat().st_mode):
        return file.read_bytes()
    return read_regular(file)


def atomic_write_text(file: Path, text: str, *, durably: bool = False) -> None:
    """Replace a file's content with a text atomically, and create the file's folder.

    Args:
        file: path of the file.
        text: new content, written as UTF-8.
        durably: whether to sync the content to the disk before returning, so that it survives a power cut.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{file.stem}-", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durably:
                stream.flush()
                os.fsync(stream.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def local_time(seconds: float) -> datetime:
    """Return the local time of a file's date, given in seconds since the epoch; times beyond the calendar are cut."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LATEST)).astimezone()
