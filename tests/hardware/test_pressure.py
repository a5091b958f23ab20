"""A lack of memory as Linux tells it: free memory, limits of control groups, and stalls."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shortages import ShortMachine

from specchat.hardware.pressure import MemoryWatch
from specchat.units import GIB, MIB


@pytest.fixture
def machine(tmp_path: Path) -> ShortMachine:
    return ShortMachine(tmp_path)


def test_a_calm_machine_lacks_nothing(machine: ShortMachine):
    assert machine.watch().look() is None


@pytest.mark.parametrize(("total", "floor"), [(16 * GIB, 512 * MIB), (128 * GIB, GIB), (GIB, 64 * MIB)])
def test_memory_is_short_below_a_floor(tmp_path: Path, total: int, floor: int):
    machine = ShortMachine(tmp_path, total)
    machine.has(floor)
    assert machine.watch().look() is None
    machine.has(floor - MIB)
    shortage = machine.watch().look()
    assert shortage is not None and shortage.missing_bytes == floor + MIB and "available" in shortage.reason


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_may_have_less(machine: ShortMachine, version: int):
    """Pages of files can be dropped, so they count as available."""
    if version == 2:
        (machine.proc / "self" / "cgroup").write_text("0::/box\n")
        folder, usage, limit, prefix = machine.cgroups / "box", "memory__current", "memory__max", ""
    else:
        (machine.proc / "self" / "cgroup").write_text("4:memory:/box\n")
        folder, prefix = machine.cgroups / "memory" / "box", "total_"
        usage, limit = "memory__usage_in_bytes", "memory__limit_in_bytes"
    pages = f"{prefix}active_file {300 * MIB}\n{prefix}inactive_file {200 * MIB}"
    group(folder, **{limit: 2 * GIB, usage: 2 * GIB, "memory__stat": pages})
    assert machine.watch().look() is None
    pages = f"{prefix}active_file {30 * MIB}\n{prefix}inactive_file {20 * MIB}"
    group(folder, memory__stat=pages)
    shortage = machine.watch().look()
    assert shortage is not None and shortage.missing_bytes == 2 * 64 * MIB - 50 * MIB
    assert "50.0 MiB of 2.0 GiB" in shortage.reason


def test_programs_that_wait_for_memory_are_a_lack_of_unknown_size(machine: ShortMachine):
    machine.stalls(19.0)
    assert machine.watch().look() is None
    machine.stalls(35.5)
    shortage = machine.watch().look()
    assert shortage is not None and shortage.missing_bytes is None and "36%" in shortage.reason


def test_stalls_of_the_own_group_count(machine: ShortMachine):
    (machine.proc / "self" / "cgroup").write_text("0::/box\n")
    group(machine.cgroups / "box", memory__pressure="some avg10=50.00 avg60=0.00 avg300=0.00 total=0")
    assert machine.watch().look() is not None


def test_looks_are_rare_and_stalls_are_given_time_to_pass(machine: ShortMachine):
    now = 100.0
    watch = MemoryWatch(machine.proc, machine.cgroups, lambda: now)
    machine.stalls(50.0)
    seen = []
    for moment in (100.0, 100.1, 100.6, 105.0, 110.2):
        now = moment
        seen.append(watch.look() is not None)
    assert seen == [True, False, False, False, True]
    machine.calm()
    machine.has(0)
    seen = []
    for moment in (110.3, 110.8, 110.9, 111.4):
        now = moment
        seen.append(watch.look() is not None)
    assert seen == [False, True, False, True]


def test_a_system_that_says_nothing_lacks_nothing(tmp_path: Path):
    assert MemoryWatch(tmp_path, tmp_path).look() is None
    (tmp_path / "meminfo").write_bytes(b"MemTotal:\nMemAvailable: \xff\n")
    assert MemoryWatch(tmp_path, tmp_path).look() is None


def test_this_machine_is_looked_at_in_no_time():
    """A look belongs between two passes, whatever this machine has; a shortage of it is no fault of the test."""
    MemoryWatch().look()
