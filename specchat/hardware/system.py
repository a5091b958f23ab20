"""Facts from the operating system: CPU, memory, disk, its own version, and the installed torch."""

import ctypes
import os
import platform
import resource
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from specchat.hardware.machine import Cpu, Disk, Platform, Ram, TorchBuild

_CPUINFO = Path("/proc/cpuinfo")
_OS_RELEASE = Path("/proc/sys/kernel/osrelease")
_MOUNTS = Path("/proc/self/mounts")
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # v1 writes "no limit" as a huge number
# Instruction sets that decide which matmul kernels run, x86 and ARM.
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "i8mm", "bf16")


# --- processor ---------------------------------------------------------------------------------------------------


def read_cpu(cpuinfo: Path = _CPUINFO) -> Cpu:
    """Read the CPU's name, usable cores and instruction sets."""
    flags = cpu_flags(cpuinfo)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = _field(cpuinfo, "model name") or platform.processor() or platform.machine()
    return Cpu(name, cores, tuple(name for name in _ISA if name in flags))


def cpu_flags(cpuinfo: Path = _CPUINFO) -> set[str]:
    """Return the flags that Linux lists for the first CPU; empty on other systems."""
    return set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())


def _field(cpuinfo: Path, wanted: str) -> str:
    """Return the first CPU's value of a field; "" if there is none."""
    for line in (_text(cpuinfo) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == wanted:
            return value.strip()
    return ""


# --- memory ------------------------------------------------------------------------------------------------------


def read_ram() -> Ram:
    """Read the size of host memory and its limits."""
    limit = cgroup_memory()
    pin_limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Ram(
        total_bytes=int(psutil.virtual_memory().total),
        available_bytes=available_ram_bytes(),
        cgroup_limit_bytes=None if limit is None else limit[0],
        swap_bytes=int(psutil.swap_memory().total),
        pin_limit_bytes=None if pin_limit == resource.RLIM_INFINITY else pin_limit,
    )


def available_ram_bytes() -> int:
    """Return the memory that is available by the system or by the control group, whichever is less."""
    available = int(psutil.virtual_memory().available)
    limit = cgroup_memory()
    return available if limit is None else min(available, limit[1])


def resident_set_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def shared_bytes() -> int:
    """Return the bytes of files, such as libraries, that this process has mapped and that are in memory."""
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def is_confined() -> bool:
    """Return whether a control group leaves less memory than the system does."""
    limit = cgroup_memory()
    return limit is not None and limit[1] < int(psutil.virtual_memory().available)


def total_ram_bytes() -> int:
    """Return the installed memory or the control group's limit, whichever is less."""
    total = int(psutil.virtual_memory().total)
    limit = cgroup_memory()
    return total if limit is None else min(total, limit[0])


def cgroup_memory(
    root: Path = _CGROUP, own: Path = _OWN_CGROUP, droppable: Sequence[str] = ("inactive_file",)
) -> tuple[int, int] | None:
    """Return the tightest memory limit of this process's control groups (v2 or v1), and the least that is left.

    Parent groups limit a process too. psutil ignores control groups. Reclaimable file pages count as free.

    Args:
        root: folder of the control groups.
        own: file that names this process's groups.
        droppable: kinds of pages that count as free, by their names in v2.

    Returns:
        Pair (limit, left) in bytes; None where there is no limit.
    """
    v2, v1 = own_groups(own)
    in_v1 = [f"total_{each}" for each in droppable]
    found = [
        *_limits(root, v2, "memory.max", "memory.current", droppable),
        *_limits(root / "memory", v1, "memory.limit_in_bytes", "memory.usage_in_bytes", in_v1),
    ]
    return (min(limit for limit, _ in found), min(left for _, left in found)) if found else None


def own_groups(own: Path = _OWN_CGROUP) -> tuple[str, str]:
    """Return the paths of this process's groups below the mount points of v2 and of v1's memory controller."""
    v2 = v1 = "/"
    for line in (_text(own) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            v2 = path
        elif "memory" in controllers.split(","):
            v1 = path
    return v2, v1


def _limits(
    root: Path, group: str, limit_file: str, usage_file: str, droppable: Sequence[str]
) -> list[tuple[int, int]]:
    """Return (limit, left) of a group and its parents; a container shows only some of the parents."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    found = []
    for depth in range(len(parts) + 1):
        folder = root.joinpath(*parts[:depth])
        limit, usage = _text(folder / limit_file), _text(folder / usage_file)
        if limit is None or usage is None or not limit.strip().isdigit() or int(limit) >= _NO_LIMIT:
            continue
        pairs = (line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
        dropped = sum(int(pair[1]) for pair in pairs if pair[0] in droppable)
        found.append((int(limit), max(int(limit) - max(int(usage) - dropped, 0), 0)))
    return found


# --- disk and system ---------------------------------------------------------------------------------------------


def read_disk(folder: Path, mounts: Path = _MOUNTS) -> Disk:
    """Read the disk where `folder` is or would be created."""
    existing = folder.expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    return Disk(folder, usage.free, usage.total, _filesystem(existing.resolve(), mounts))


def _filesystem(folder: Path, mounts: Path) -> str:
    """Return the type of the file system that holds `folder`: the deepest mount point above it."""
    best, kind = -1, ""
    for line in (_text(mounts) or "").splitlines():
        fields = line.split()
        point = Path(fields[1].replace("\\040", " "))
        if len(fields) > 2 and folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def read_platform(os_release: Path = _OS_RELEASE) -> Platform:
    """Read the system's name and version, and whether it is Linux inside Windows."""
    is_wsl = "microsoft" in (_text(os_release) or "").lower()
    return Platform(platform.system(), platform.release(), platform.python_version(), is_wsl)


def read_torch() -> TorchBuild | None:
    """Read the installed torch's build from its version file: importing torch takes a second."""
    import runpy
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        values = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    except OSError:
        return None
    cuda = values.get("cuda")
    numbers = [int(part) for part in str(cuda).split(".")[:2]] if cuda else []
    return TorchBuild(
        str(values["__version__"]), (numbers[0], numbers[1]) if len(numbers) == 2 else None, bool(values.get("hip"))
    )


def may_have_cuda(torch: TorchBuild | None, driver: str = "libcuda.so.1") -> bool:
    """Return whether torch could find a device; only importing torch (seconds) can confirm it.

    Args:
        torch: build of the installed torch, or None.
        driver: driver library that CUDA requires.
    """
    if torch is None or torch.hip:
        return True
    if torch.cuda is None:
        return False
    try:
        ctypes.CDLL(driver)
    except OSError:
        return False
    return True


def has_compiler() -> bool:
    """Return whether numba is installed, which compiles the loops for blocks of GGUF files."""
    return find_spec("numba") is not None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
