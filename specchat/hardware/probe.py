"""Finding out what the machine has."""

from pathlib import Path

import psutil

from specchat.errors import DeviceUnusableError, UsageError
from specchat.hardware.machine import Machine

_CGROUP = Path("/sys/fs/cgroup")


def available_ram_bytes() -> int:
    """The least of what the system reports available and what the control group still allows."""
    available = int(psutil.virtual_memory().available)
    left = cgroup_left_bytes(_CGROUP)
    return available if left is None else min(available, left)


def total_ram_bytes() -> int:
    """The least of what is built in and what the control group may ever take."""
    total = int(psutil.virtual_memory().total)
    limits = (_CGROUP / "memory.max", _CGROUP / "memory/memory.limit_in_bytes")
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


def cgroup_left_bytes(root: Path) -> int | None:
    """Memory that the control group (v2, else v1) still allows; None where it sets no limit. psutil does not see it."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = ((root / name).read_text().strip() for name in (limit_file, usage_file))
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 1 << 60:  # v1 writes "no limit" as a huge number
            return max(int(limit) - int(usage), 0)
    return None


def find_machine(device: str) -> Machine:
    """The machine as seen from a device.

    Args:
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: not a device name.
        DeviceUnusableError: a CUDA device was asked for by name and cannot be used.
    """
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UsageError(f"'{device}' is not a device", hint="use auto, cpu, cuda or cuda:N")
    ram = available_ram_bytes()
    if device == "cpu":
        return _cpu(ram)
    import torch

    if not torch.cuda.is_available():
        if device == "auto":
            return _cpu(ram)
        raise DeviceUnusableError(
            f"no CUDA device can be used (torch {torch.__version__} built for CUDA {torch.version.cuda or 'none'})",
            hint="check `nvidia-smi` and the driver, or use --device cpu",
        )
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise DeviceUnusableError(
            f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA device(s)",
            hint="devices count from cuda:0",
        )
    free, total = torch.cuda.mem_get_info(index)
    major, _ = torch.cuda.get_device_capability(index)
    return Machine(f"cuda:{index}", int(free), ram, fast_bf16=major >= 8, total_bytes=int(total) + total_ram_bytes())


def _cpu(ram: int) -> Machine:
    fast_bf16 = cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} != set()
    return Machine("cpu", ram, ram, fast_bf16, total_bytes=total_ram_bytes())


def cpu_flags() -> set[str]:
    """Instruction sets that Linux names for the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
