"""Memory limits, CPU, disk and platform are read from the system's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.machines import MEASURED, hardware

from specchat import paths
from specchat.hardware.machine import Disk, GpuSurvey, Platform, Ram, TorchBuild
from specchat.hardware.system import (
    cgroup_memory,
    may_have_cuda,
    read_cpu,
    read_disk,
    read_platform,
    read_ram,
    read_torch,
)
from specchat.hardware.verdicts import judge

MIB, GIB = 1 << 20, 1 << 30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_cgroup_v2_limits_include_parents(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/user.slice/session\n")
    root = tmp_path / "cgroup"
    write(root)
    write(
        root / "user.slice", memory__max=8 * GIB, memory__current=3 * GIB, memory__stat=f"anon 1\ninactive_file {GIB}"
    )
    write(root / "user.slice" / "session", memory__max="max", memory__current=GIB)
    assert cgroup_memory(root, own) == (8 * GIB, 6 * GIB)  # what could be dropped from the page cache is free
    write(root / "user.slice" / "session", memory__max=2 * GIB)
    assert cgroup_memory(root, own) == (2 * GIB, GIB)


def test_cgroup_v1_limits(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:cpu,memory:/job\n0::/\n")
    root = tmp_path / "cgroup"
    write(root / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    assert cgroup_memory(root, own) is None
    write(root / "memory" / "job", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=5 * GIB)
    assert cgroup_memory(root, own) == (4 * GIB, 0)


def test_a_container_sees_its_group_as_the_root(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/\n")
    write(tmp_path / "cgroup", memory__max=GIB, memory__current=GIB // 4)
    assert cgroup_memory(tmp_path / "cgroup", own) == (GIB, 3 * GIB // 4)
    assert cgroup_memory(tmp_path / "absent", tmp_path / "absent") is None


def test_read_cpu_from_cpuinfo(tmp_path):
    write(
        tmp_path, cpuinfo="processor: 0\nmodel name\t: Fast One\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\nflags: no"
    )
    cpu = read_cpu(tmp_path / "cpuinfo")
    assert cpu.name == "Fast One" and cpu.isa == ("avx2", "avx512_bf16", "amx_bf16") and cpu.cores >= 1


@pytest.mark.parametrize(("release", "is_wsl"), [("5.15.90.1-microsoft-standard-WSL2", True), ("6.8.0-generic", False)])
def test_wsl_is_detected(tmp_path, release, is_wsl):
    write(tmp_path, osrelease=release)
    assert read_platform(tmp_path / "osrelease").wsl is is_wsl


def test_read_disk_of_a_missing_folder(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nnone {tmp_path} tmpfs rw 0 0\nnone {tmp_path}/other 9p rw 0 0\n")
    disk = read_disk(tmp_path / "a" / "b", mounts)
    assert disk.filesystem == "tmpfs" and 0 < disk.free_bytes <= disk.total_bytes
    assert disk.path == tmp_path / "a" / "b" and not disk.path.exists()


def test_ram_and_torch_of_this_machine():
    ram = read_ram()
    assert 0 < ram.available_bytes <= ram.total_bytes
    build = read_torch()
    import torch

    assert build.version == torch.__version__ and (build.cuda is None) == (torch.version.cuda is None)


def levels(**changes):
    found = judge(hardware(GpuSurvey(), **changes), MEASURED, {})
    return {each.topic: each.level for each in found}


def test_low_memory_and_remote_disks_are_warnings():
    assert levels()["RAM"] == levels()["disk"] == "ok"
    assert levels(ram=Ram(64 * GIB, 2 * GIB, None, 0, None))["RAM"] == "warn"
    for kind in ("tmpfs", "9p", "nfs4"):
        assert levels(disk=Disk(Path("/x"), 100 * GIB, 200 * GIB, kind))["disk"] == "warn"
    assert levels(disk=Disk(Path("/x"), GIB, 200 * GIB, "ext4"))["disk"] == "warn"
    assert levels(platform=Platform("Linux", "5", "3", wsl=True))["WSL"] == "warn"


def test_a_container_limit_counts_as_total_memory():
    ram = Ram(64 * GIB, 10 * GIB, 16 * GIB, 0, None)
    (verdict,) = [each for each in judge(hardware(GpuSurvey(), ram=ram), MEASURED, {}) if each.topic == "RAM"]
    assert "10.0 GiB of 16.0 GiB" in verdict.text and "64.0 GiB" in verdict.text


def test_the_report_hides_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.from_home(tmp_path / ".cache" / "specchat") == "~/.cache/specchat"
    assert paths.from_home(tmp_path) == str(tmp_path)
    assert paths.from_home(tmp_path.parent / "other") == str(tmp_path.parent / "other")


@pytest.mark.parametrize(
    ("build", "driver", "expected"),
    [
        (TorchBuild("2.13.0+cpu", None), "libc.so.6", False),
        (TorchBuild("2.13.0+cu130", (13, 0)), "libnothing.so.1", False),
        (TorchBuild("2.13.0+cu130", (13, 0)), "libc.so.6", True),  # a library that is there
        (TorchBuild("2.13.0+rocm", None, hip=True), "libnothing.so.1", True),
        (None, "libnothing.so.1", True),
    ],
)
def test_torch_is_not_imported_where_it_cannot_find_a_device(build, driver, expected):
    assert may_have_cuda(build, driver) == expected
