"""Detection of the machine: at once for the planner; in full, with measured rates, for a report."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specchat.compiler import can_build_modules
from specchat.errors import DeviceUnusableError, UsageError
from specchat.hardware import links, store
from specchat.hardware.machine import Hardware, LinkRate, Links, Machine, Measured
from specchat.hardware.nvml import survey_gpus
from specchat.hardware.system import (
    available_ram_bytes,
    cpu_flags,
    has_compiler,
    is_confined,
    may_have_cuda,
    read_cpu,
    read_disk,
    read_platform,
    read_ram,
    read_torch,
    resident_set_bytes,
    total_ram_bytes,
)
from specchat.hardware.verdicts import Verdict, judge, why_no_cuda
from specchat.records.limits import COMPILER_BYTES, RUNTIME_BYTES

if TYPE_CHECKING:
    from specchat.hardware.cuda import CudaLinks

# Receives the name of the measurement, its number, and the number of measurements.
Progress = Callable[[str, int, int], None]


def find_machine(device: str) -> Machine:
    """Return the device and the memory that a plan on `device` can use.

    Args:
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: `device` is not a device name.
        DeviceUnusableError: a CUDA device was asked for by name and cannot be used.
    """
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UsageError(f"'{device}' is not a device", hint="use auto, cpu, cuda or cuda:N")
    ram = _ram_beside_libraries()
    if device == "cpu" or (device == "auto" and not may_have_cuda(read_torch())):
        return _cpu(ram)
    import torch

    from specchat.hardware.cuda import gpu_uuid

    if not torch.cuda.is_available():
        if device == "auto":
            return _cpu(ram)
        raise _unusable(device)
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise DeviceUnusableError(
            f"{device} does not exist: this machine has {torch.cuda.device_count()} CUDA device(s)",
            hint="numbers start at cuda:0",
        )
    free, total = torch.cuda.mem_get_info(index)
    major, _ = torch.cuda.get_device_capability(index)
    all_bytes = int(total) + total_ram_bytes()
    return Machine(
        f"cuda:{index}",
        int(free),
        ram,
        major >= 8,
        total_bytes=all_bytes,
        device_total_bytes=int(total),
        gpu_uuid=gpu_uuid(index),
        is_confined=is_confined(),
        fused=_fused(major),
    )


def _fused(major: int) -> tuple[str, ...]:
    """Return `Machine.fused`: bitsandbytes has a kernel for int4, and Triton compiles ours for int8 from version 8."""
    has_triton = major >= 8 and can_build_modules() and find_spec("triton") is not None
    return ("int8", "int4") if has_triton else ("int4",)


def _ram_beside_libraries() -> int:
    """Return the available host memory without what this process will still take for Python and its libraries.

    They are imported when they are needed, so a plan may be made before or after that.
    """
    return max(available_ram_bytes() - max(libraries_bytes() - resident_set_bytes(), 0), 0)


def libraries_bytes() -> int:
    """Return the memory of Python and its libraries, numba's among them where it is installed."""
    return RUNTIME_BYTES + (COMPILER_BYTES if has_compiler() else 0)


def gpus_beside(machine: Machine) -> list[str]:
    """Return the names of the CUDA devices besides that of a machine; empty if it computes on the CPU."""
    if machine.device == "cpu":
        return []
    return [name for name in gpu_names() if name != machine.device]


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices."""
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _unusable(device: str) -> DeviceUnusableError:
    survey = survey_gpus()
    trouble = why_no_cuda(survey, read_torch())
    why = "" if trouble is None else f": {trouble.text}"
    hint = trouble.hint if trouble is not None and trouble.hint and survey.gpus else "check with `nvidia-smi`"
    return DeviceUnusableError(f"cannot use {device}: torch finds no CUDA device{why}", f"{hint}; or use --device cpu")


def _cpu(ram: int) -> Machine:
    flags, total = cpu_flags(), total_ram_bytes()
    fast_bf16 = flags & {"avx512_bf16", "amx_bf16", "bf16"} != set()
    has_kernel = "avx512_bf16" in flags
    return Machine(
        "cpu",
        ram,
        ram,
        fast_bf16,
        total_bytes=total,
        device_total_bytes=total,
        has_row_kernel=has_kernel,
        is_confined=is_confined(),
    )


def find_hardware(folder: Path) -> Hardware:
    """Detect everything that needs no measuring; takes some milliseconds.

    Args:
        folder: folder for models and packs; it need not exist yet.
    """
    return Hardware(
        survey=survey_gpus(),
        cpu=read_cpu(),
        ram=read_ram(),
        disk=read_disk(folder),
        platform=read_platform(),
        torch=read_torch(),
    )


@dataclass(frozen=True)
class Report:
    """A machine, its measured rates, and a verdict on each part."""

    hardware: Hardware
    measured: Measured
    verdicts: tuple[Verdict, ...]


def probe(
    folder: Path, device: str = "auto", *, refresh: bool = False, progress: Progress = lambda what, step, steps: None
) -> Report:
    """Report on this machine; rates come from the last report unless the machine has changed.

    Args:
        folder: folder for models, packs and measured rates; it need not exist yet.
        device: device name as in `find_machine`.
        refresh: whether to measure again.
        progress: receives the name of each measurement.

    Raises:
        DeviceUnusableError: a CUDA device was asked for by name and cannot be used.
    """
    hardware = find_hardware(folder)
    key = store.key_of(hardware, device)
    measured = None if refresh else store.load(folder, key)
    if measured is None:
        measured = _measure(hardware, device, progress)
        if measured.gpu_trouble is None:  # do not save a failure, which may be temporary
            _keep(folder, key, measured)
        hardware = find_hardware(folder)  # free memory and disk space may have changed
    verdicts = judge(hardware, measured, has_compiler=can_build_modules())
    return Report(hardware, measured, verdicts)


def remembered(folder: Path, hardware: Hardware, machine: Machine, device: str) -> Measured | None:
    """Return the rates that an earlier report measured on this machine; None if there are none or it has changed.

    Args:
        folder: folder where rates are kept.
        hardware: current hardware.
        machine: device whose rates are needed.
        device: device name that the user gave; an earlier report may have used another name.
    """
    for name in dict.fromkeys((device, "auto", machine.device)):
        measured = store.load(folder, store.key_of(hardware, name))
        if measured is not None and measured.device == machine.device:
            return measured
    return None


def _keep(folder: Path, key: str, measured: Measured) -> None:
    # If nothing can be written, the disk's rate is missing too, and the report gives the reason.
    with suppress(OSError):
        store.save(folder, key, measured)


def _measure(hardware: Hardware, device: str, progress: Progress) -> Measured:
    progress("device", 1, 4)
    machine = find_machine(device)
    progress("disk", 2, 4)
    disk = _disk_rate(hardware.disk.path)
    progress("RAM", 3, 4)
    ram_copy = links.measure_ram_copy(hardware.ram.available_bytes)
    progress("matmuls", 4, 4)
    on_device = _measure_device(machine)
    copies = on_device.copies
    return Measured(
        device=machine.device,
        links=Links(
            h2d_pinned_bytes_per_s=None if copies is None else copies.h2d_pinned_bytes_per_s,
            h2d_pageable_bytes_per_s=None if copies is None else copies.h2d_pageable_bytes_per_s,
            d2h_bytes_per_s=None if copies is None else copies.d2h_bytes_per_s,
            ram_copy_bytes_per_s=ram_copy,
            disk_read_bytes_per_s=None if disk is None else disk.bytes_per_s,
        ),
        matmul=on_device.matmul.stored,
        packed=on_device.matmul.packed,
        matmul_dtype=_matmul_dtype(machine),
        gpu_uuid=None if copies is None else copies.uuid,
        pcie_under_load=None if copies is None else copies.pcie,
        disk_is_cold=disk is not None and disk.is_cold,
        pinning_works=None if copies is None else copies.h2d_pinned_bytes_per_s is not None,
        gpu_trouble=on_device.trouble,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        at_once=() if on_device.trouble is not None else _links_at_once(machine),
    )


def _links_at_once(machine: Machine) -> tuple[LinkRate, ...]:
    """Return the rates of all GPUs' links at the same time; empty with less than two, or if that cannot be measured."""
    if not gpus_beside(machine):
        return ()
    from specchat.hardware.cuda import measure_links_at_once

    try:
        rates = measure_links_at_once()
    except RuntimeError:  # another GPU is full or lost, which does not concern this one
        return ()
    return tuple(LinkRate(f"cuda:{index}", rate) for index, rate in enumerate(rates) if rate is not None)


@dataclass(frozen=True)
class _OnDevice:
    """Measurements on the device itself; `trouble` is the error that stopped them."""

    copies: "CudaLinks | None" = None
    matmul: links.MatmulRates = field(default_factory=links.MatmulRates)
    trouble: str | None = None


def _measure_device(machine: Machine) -> _OnDevice:
    import torch

    device = torch.device(machine.device)
    if device.type == "cpu":
        return _OnDevice(matmul=links.measure_matmul(device, _matmul_dtype(machine)))
    from specchat.hardware.cuda import measure_cuda_links

    try:
        return _OnDevice(measure_cuda_links(device.index), links.measure_matmul(device, _matmul_dtype(machine)))
    except RuntimeError as error:  # out of memory, a lost device, a library that does not match
        return _OnDevice(trouble=str(error).strip().splitlines()[0])


def _matmul_dtype(machine: Machine) -> Literal["bf16", "fp32"]:
    return "bf16" if machine.fast_bf16 else "fp32"


def _disk_rate(folder: Path) -> links.DiskRate | None:
    try:
        return links.measure_disk_read(folder)
    except OSError:  # no permission, a full or failing disk: the report says that the rate is missing
        return None
