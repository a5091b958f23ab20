"""Mapped files that other programs change: they wait for a use, and the next one is refused."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.mapped_file import MappedFile

CUT = "import os, sys; os.truncate(sys.argv[1], 0)"
WRITE = "import sys; open(sys.argv[1], 'r+b').close()"
REPLACE = "import os, sys; open(sys.argv[1] + '.new', 'wb').close(); os.replace(sys.argv[1] + '.new', sys.argv[1])"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "layer.safetensors"
    path.write_bytes(bytes(8192))
    return path


def other_program(code: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, str(path)])


def refused(file: MappedFile) -> CorruptCheckpointError:
    """The error of the first check that refuses the file."""
    for _ in range(3000):
        try:
            file.check()
        except CorruptCheckpointError as error:
            return error
        assert os.fstat(file.descriptor).st_size == 8192, "the file was changed during a use"
        time.sleep(0.01)
    raise AssertionError("the other program went on without a word")


@pytest.mark.parametrize("code", [CUT, WRITE], ids=["cut", "write"])
def test_a_writer_waits_until_the_file_is_used_no_more(path: Path, code: str):
    with MappedFile(path, 8192) as file:
        file.check()
        with other_program(code, path) as program:
            assert "another program writes to" in str(refused(file))
            assert program.wait(timeout=30) == 0
        for _ in range(2):
            with pytest.raises(CorruptCheckpointError):
                file.check()


def test_a_lease_that_the_system_took_away(path: Path):
    """As it does after 45 seconds without a check."""
    with MappedFile(path, 8192) as file:
        fcntl.fcntl(file.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        with pytest.raises(CorruptCheckpointError, match="another program writes to"):
            file.check()


def test_reading_and_replacing_disturb_nobody(path: Path):
    with MappedFile(path, 8192) as file, MappedFile(path, 8192) as other:
        with other_program(REPLACE, path) as program:
            assert program.wait(timeout=30) == 0
        assert path.stat().st_size == 0
        file.check()
        other.check()


def test_a_file_that_is_written_to_is_checked_by_its_length(path: Path):
    """A file that somebody has open for writing cannot have a lease."""
    with path.open("r+b") as writer, MappedFile(path, 8192) as file:
        file.check()
        writer.truncate(100)
        with pytest.raises(CorruptCheckpointError, match="is truncated"):
            file.check()
