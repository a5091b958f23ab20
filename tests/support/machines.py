"""A machine without faults, to be changed where a test wants one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specchat.hardware.machine import (
    Cpu,
    Disk,
    Hardware,
    Links,
    MatmulRate,
    Measured,
    Platform,
    Ram,
    TorchBuild,
)

GIB = 1 << 30
CUDA_TORCH = TorchBuild("2.13.0+cu130", (13, 0))
MEASURED = Measured(
    device="cuda:0",
    links=Links(25e9, 6e9, 26e9, 20e9, 3e9),
    matmul=(MatmulRate(1, 1e12), MatmulRate(64, 5e13)),
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
