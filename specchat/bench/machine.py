"""Where a measurement was made: hardware and versions, as far as they bear on speed."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from specchat import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def machine_object(device: str) -> dict[str, Any]:
    """The machine, in the words of `probe --json`.

    Args:
        device: "cpu" or "cuda:N", where passes run.
    """
    return {
        "device": device,
        "gpus": _gpus(device),
        "cpu": {"name": _cpu_name(), "cores": len(os.sched_getaffinity(0)) if _has_affinity() else os.cpu_count()},
        "ram": {"total_bytes": psutil.virtual_memory().total},
        "platform": {"system": platform.system(), "release": platform.release(), "python": platform.python_version()},
    }


def versions_object() -> dict[str, str]:
    """Our own version and those of the libraries that compute."""
    found = {"specchat": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpus(device: str) -> list[dict[str, Any]]:
    """The GPU that passes run on, as the driver describes it."""
    if not device.startswith("cuda"):
        return []
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return [{"name": str(name), "vram_total_bytes": int(memory.total), "driver": str(driver)}]
