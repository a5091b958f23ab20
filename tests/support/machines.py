"""A machine without faults, to be changed where a test wants one, and the machines of tests/machines."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specchat.hardware.machine import (
    Cpu,
    Disk,
    Gpu,
    GpuSurvey,
    Hardware,
    Links,
    Machine,
    MatmulRate,
    Measured,
    PcieLink,
    Platform,
    Ram,
    TorchBuild,
)
from specchat.units import parse_size

GIB = 1 << 30
CUDA_TORCH = TorchBuild("2.13.0+cu130", (13, 0))
MEASURED = Measured(
    device="cuda:0",
    links=Links(25e9, 6e9, 26e9, 20e9, 3e9),
    matmul=(MatmulRate(1, 1e12), MatmulRate(64, 5e13)),
    packed=(),
    matmul_dtype="bf16",
    gpu_uuid="GPU-1",
    pcie_under_load=(4, 16),
    disk_is_cold=True,
    pinning_works=True,
    gpu_trouble=None,
    measured_at="2026-01-01T00:00:00+00:00",
)


def hardware(survey, **changes):
    found = Hardware(
        survey=survey,
        cpu=Cpu("a processor", 8, ("avx2",)),
        ram=Ram(64 * GIB, 60 * GIB, None, 0, None),
        disk=Disk(Path("/cache"), 500 * GIB, 900 * GIB, "ext4"),
        platform=Platform("Linux", "6.1", "3.12", wsl=False),
        torch=CUDA_TORCH,
    )
    return replace(found, **changes)


# --- the machines of tests/machines ------------------------------------------------------------------------------

FOLDER = Path(__file__).parents[1] / "machines"
MACHINES = sorted(path.stem for path in FOLDER.glob("*.json"))
_SLOW_BF16 = ("7.0", "7.5")


@dataclass(frozen=True)
class MachineFile:
    """A machine as its file describes it: what a probe would find there."""

    about: str
    machine: Machine
    hardware: Hardware
    measured: Measured


def read_machine(name: str) -> MachineFile:
    """One of `MACHINES`: a device, memory, a disk, and the rates of what lies between them as plain figures."""
    file = json.loads((FOLDER / f"{name}.json").read_text())
    found = _hardware_of(file)
    gpu = found.survey.gpus[0] if found.survey.gpus else None
    ram, device = found.ram, "cpu" if gpu is None else "cuda:0"
    total = ram.total_bytes if ram.cgroup_limit_bytes is None else min(ram.total_bytes, ram.cgroup_limit_bytes)
    machine = Machine(
        device=device,
        device_free_bytes=ram.available_bytes if gpu is None else gpu.vram_free_bytes,
        ram_available_bytes=ram.available_bytes,
        fast_bf16="avx512_bf16" in found.cpu.isa if gpu is None else gpu.compute_capability not in _SLOW_BF16,
        total_bytes=total + (0 if gpu is None else gpu.vram_total_bytes),
        device_total_bytes=total if gpu is None else gpu.vram_total_bytes,
        has_row_kernel=gpu is None and "avx512_bf16" in found.cpu.isa,
        fused=() if gpu is None else ("int4",) if gpu.compute_capability in _SLOW_BF16 else ("int8", "int4"),
    )
    rates = {f"{key}_bytes_per_s": value and value * 1e9 for key, value in file["gb_per_s"].items()}
    measured = replace(
        MEASURED,
        device=device,
        links=Links(**rates),
        matmul=(),
        packed=(),
        gpu_uuid=None if gpu is None else gpu.uuid,
        pcie_under_load=None,
        pinning_works=None if gpu is None else rates["h2d_pinned_bytes_per_s"] is not None,
    )
    return MachineFile(file["about"], machine, found, measured)


def _hardware_of(file: dict[str, Any]) -> Hardware:
    gpu, ram = file["gpu"], {key: text and parse_size(text) for key, text in file["ram"].items()}
    gpus = ()
    if gpu is not None:
        link = PcieLink(gpu["pcie"]["gen"], gpu["pcie"]["width"], gpu["pcie"]["gen"], gpu["pcie"]["width"])
        total, free = parse_size(gpu["vram_total"]), parse_size(gpu["vram_free"])
        gpus = (Gpu(gpu["name"], "GPU-1", total, free, gpu["compute_capability"], "580.0", link),)
    return Hardware(
        survey=GpuSurvey(gpus, (13, 0) if gpus else None),
        cpu=Cpu(file["cpu"]["name"], file["cpu"]["cores"], tuple(file["cpu"]["isa"])),
        ram=Ram(ram["total"], ram["available"], ram["cgroup_limit"], 0, ram["pin_limit"]),
        disk=Disk(Path("/cache"), parse_size(file["disk"]["free"]), 1 << 40, file["disk"]["filesystem"]),
        platform=Platform("Linux", "6.8", "3.12", wsl=file["wsl"]),
        torch=CUDA_TORCH,
    )
