"""Memory control groups: made where the system permits, entered by children, removed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specchat.errors import NotAvailableError
from specchat.hardware import memory_group
from specchat.hardware.memory_group import MemoryGroup

LIMIT = 64 << 20


def fake(tmp_path: Path, line: str, folder: str) -> tuple[Path, Path]:
    """A mount point with this process's group, and the file that names it."""
    own = tmp_path / "own"
    own.write_text(line)
    (tmp_path / "root" / folder).mkdir(parents=True)
    return tmp_path / "root", own


@pytest.mark.parametrize(
    ("text", "said"), [("", "no memory control groups"), ("3:cpu:/x\n", "no memory control groups")]
)
def test_a_system_without_groups_is_named(tmp_path, text, said):
    (tmp_path / "own").write_text(text)
    for own in (tmp_path / "own", tmp_path / "absent"):
        with pytest.raises(NotAvailableError, match=said):
            MemoryGroup(LIMIT, tmp_path, own)


@pytest.mark.parametrize(("line", "folder"), [("0::/a/b\n", "a/b"), ("4:memory:/a/b\n", "memory/a/b")])
def test_groups_that_cannot_limit_memory_are_refused_and_removed(tmp_path, line, folder):
    """A folder of an ordinary file system has none of the kernel's files."""
    root, own = fake(tmp_path, line, folder)
    with pytest.raises(NotAvailableError, match=r"cannot be limited to 64.0 MiB here: .* does not limit memory"):
        MemoryGroup(LIMIT, root, own)
    assert not [*root.rglob("specchat-*")]


def test_the_groups_above_are_tried(tmp_path, monkeypatch):
    """In v2, a group with processes cannot hold groups with limits."""
    root, own = fake(tmp_path, "0::/a/b\n", "a/b")
    mkdir = Path.mkdir

    def limited(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        if self.parent == root / "a":
            (self / "memory.max").touch()

    monkeypatch.setattr(Path, "mkdir", limited)
    group = MemoryGroup(LIMIT, root, own)
    (made,) = root.rglob("specchat-*")
    assert made.parent == root / "a" and (made / "memory.max").read_text() == str(LIMIT)
    group.enter()
    assert group.command(["true"])[-2:] == [str(made / "cgroup.procs"), "true"]
    monkeypatch.setattr(memory_group, "_REMOVING_S", 0.0)
    group.close()  # the files of the kernel vanish with a group; these do not
    assert (root / "a" / "b" / "cgroup.procs").exists()


def test_groups_of_processes_that_were_killed_are_removed(tmp_path):
    root, own = fake(tmp_path, "4:memory:/\n", "memory")
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {f"specchat-{ended.pid}-1": False, f"specchat-{os.getpid()}-1": True, "specchat-test-1-1": True}
    busy = f"specchat-{ended.pid}-2"  # the kernel refuses to remove a group with processes
    for name in (*names, busy):
        (root / "memory" / name).mkdir()
    (root / "memory" / busy / "cgroup.procs").touch()
    with pytest.raises(NotAvailableError):
        MemoryGroup(LIMIT, root, own)
    assert {name: (root / "memory" / name).exists() for name in (*names, busy)} == names | {busy: True}


def test_a_child_has_the_limit():
    try:
        group = MemoryGroup(LIMIT)
    except NotAvailableError as error:
        pytest.skip(error.message)
    with group:
        command = group.command(["sh", "-c", "cat /proc/self/cgroup; head -c 200000000 /dev/zero | tail | wc -c"])
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        folder = group._folder
    assert folder.name in found.stdout and "200000000" not in found.stdout
    assert not folder.exists()


_IN_GROUPS = """
from specchat.hardware.memory_group import MemoryGroup
with MemoryGroup(256 << 20) as own:
    own.enter()
    with MemoryGroup(256 << 20) as other:
        print(own._folder.parent == other._folder.parent, own._folder in other._folder.parents)
print(open("/proc/self/cgroup").read().count("specchat-"))
"""


def test_groups_lie_beside_the_one_that_was_entered():
    """Otherwise a server's memory would count in the group of the process that has started it, too."""
    try:
        MemoryGroup(LIMIT).close()
    except NotAvailableError as error:
        pytest.skip(error.message)
    found = subprocess.run([sys.executable, "-c", _IN_GROUPS], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["True", "False", "0"], found.stderr
