"""Files are read only if their bytes will come and end."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from specchat.files import read_regular

DESCRIPTORS = Path("/proc/self/fd")


def test_regular_files_and_links_to_them_are_read(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"some bytes")
    (tmp_path / "link").symlink_to(file)
    assert read_regular(file) == read_regular(tmp_path / "link") == b"some bytes"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_everything_else_is_an_error_at_once(kind: str, tmp_path: Path):
    path = {"device": Path("/dev/zero"), "folder": tmp_path}.get(kind, tmp_path / kind)
    if kind == "pipe":
        os.mkfifo(path)
    gc.collect()  # what earlier tests left must not be closed in the middle of this one
    num_open = len(list(DESCRIPTORS.iterdir()))
    with pytest.raises(OSError, match=r"regular|directory") as caught:
        read_regular(path)
    assert caught.value.strerror
    assert len(list(DESCRIPTORS.iterdir())) == num_open
