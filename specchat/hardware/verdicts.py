"""Verdicts on the machine for the user: one per part, with a hint where something limits speed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from specchat.hardware.machine import Gpu, GpuSurvey, Hardware, Links, Measured, TorchBuild, Trouble
from specchat.paths import from_home
from specchat.units import GIB, format_bytes, format_rate

Level = Literal["ok", "warn", "error"]

# Rate of a PCIe generation 3 lane; each generation doubles it. Large copies reach about 80% of it.
_GEN3_LANE_BYTES_PER_S = 0.985e9
_SLOW_SHARE = 0.5
_SLOW_DISK_BYTES_PER_S = 0.6e9  # SATA's maximum
_LITTLE_RAM_BYTES, _LITTLE_DISK_BYTES = 8 * GIB, 10 * GIB
# CUDA 13 dropped Volta and older cards.
_CUDA_WITHOUT_VOLTA, _TURING = 13, 7.5
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class Verdict:
    """One line of a report.

    Attributes:
        level: "ok", "warn" or "error".
        topic: subject in a word or two.
        text: finding.
        hint: possible improvement; None if all is well.
        share: length of the bar: share of memory or disk in use; None for no bar.
    """

    level: Level
    topic: str
    text: str
    hint: str | None = None
    share: float | None = None


_WITHOUT_TRITON = Verdict(
    "warn",
    "Triton",
    "no C compiler or no headers of Python: int8, GPTQ, AWQ and GGUF weights are slower, and drafts are not in int8",
    "install gcc and the headers, for example `apt install gcc python3-dev`",
)


def judge(
    hardware: Hardware, measured: Measured, environment: Mapping[str, str] = os.environ, *, has_compiler: bool = True
) -> tuple[Verdict, ...]:
    """Return verdicts in the order of a report: devices, memory, disk, rates.

    Args:
        hardware: everything that needs no measuring.
        measured: measured rates.
        environment: environment variables.
        has_compiler: whether Triton can build its launcher.
    """
    without_triton = not has_compiler and measured.device.startswith("cuda")
    return (
        *_gpus(hardware, measured, environment),
        *([_WITHOUT_TRITON] if without_triton else []),
        _cpu(hardware),
        *_memory(hardware, measured),
        _disk(hardware),
        *_rates(measured, hardware),
        *_matmul(measured),
    )


def why_no_cuda(
    survey: GpuSurvey, torch: TorchBuild | None, environment: Mapping[str, str] = os.environ
) -> Trouble | None:
    """Explain by versions and settings why torch cannot use the GPUs; None if nothing prevents it."""
    if torch is None:
        return Trouble("torch is not installed", "pip install torch")
    if not survey.gpus:
        return survey.troubles[0] if survey.troubles else Trouble("the NVIDIA driver shows no GPU", "run `nvidia-smi`")
    if torch.cuda is None:
        made_for = "built for AMD GPUs" if torch.hip else "built without CUDA and cannot use the GPU"
        return Trouble(f"torch {torch.version} is {made_for}", _torch_hint(survey))
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return Trouble("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    return _mismatch(survey, torch.version, torch.cuda)


def _mismatch(survey: GpuSurvey, version: str, built: tuple[int, int]) -> Trouble | None:
    """Report a driver or a card that is too old for torch's CUDA."""
    gpu, served = survey.gpus[0], survey.cuda_version
    if served is not None and built[0] > served[0]:
        return Trouble(
            f"driver {gpu.driver} supports CUDA up to {_dotted(served)}, but torch {version} needs "
            f"CUDA {_dotted(built)}",
            f"install a newer driver, or {_torch_hint(survey)}",
        )
    if built[0] >= _CUDA_WITHOUT_VOLTA and gpu.compute_capability and float(gpu.compute_capability) < _TURING:
        return Trouble(
            f"{gpu.name} has compute capability {gpu.compute_capability}, "
            f"but CUDA {_dotted(built)} needs {_TURING} or more",
            "install a torch built for CUDA 12.6: pip install torch --index-url https://download.pytorch.org/whl/cu126",
        )
    return None


def _torch_hint(survey: GpuSurvey) -> str:
    version = "" if survey.cuda_version is None else f" (the driver supports up to {_dotted(survey.cuda_version)})"
    return f"install a torch built for your CUDA{version}: https://pytorch.org/get-started/locally"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# --- devices -----------------------------------------------------------------------------------------------------


def _gpus(hardware: Hardware, measured: Measured, environment: Mapping[str, str]) -> Iterator[Verdict]:
    survey = hardware.survey
    for trouble in survey.troubles:
        yield Verdict("warn", "GPU", trouble.text, trouble.hint)
    for gpu in survey.gpus:
        yield _gpu(gpu)
        yield from _pcie(gpu, measured.pcie_under_load if measured.gpu_uuid == gpu.uuid else None)
    if not survey.gpus:
        if not survey.troubles:
            yield Verdict("warn", "GPU", "the NVIDIA driver runs, but shows no GPU", "check with `nvidia-smi -L`")
        return
    obstacle = why_no_cuda(survey, hardware.torch, environment)
    if obstacle is not None:
        yield Verdict("error", "CUDA", obstacle.text, obstacle.hint)
    elif measured.gpu_trouble is not None:
        hint = "close other programs on the GPU (`nvidia-smi` lists them), then run with --refresh"
        yield Verdict("error", "CUDA", f"the GPU failed during measurement: {measured.gpu_trouble}", hint)
    elif not measured.device.startswith("cuda"):
        yield Verdict("warn", "CUDA", f"passes run on {measured.device}, not on the GPU", "use --device auto or cuda:0")
    else:
        assert hardware.torch is not None
        served = "" if survey.cuda_version is None else f", driver up to {_dotted(survey.cuda_version)}"
        yield Verdict("ok", "CUDA", f"torch {hardware.torch.version}{served}")


def _gpu(gpu: Gpu) -> Verdict:
    free, total = format_bytes(gpu.vram_free_bytes), format_bytes(gpu.vram_total_bytes)
    capability = f", compute {gpu.compute_capability}" if gpu.compute_capability else ""
    text = f"{gpu.name}{capability}, driver {gpu.driver}: {free} of {total} free"
    share = 1 - gpu.vram_free_bytes / gpu.vram_total_bytes if gpu.vram_total_bytes else None
    if gpu.is_mig:
        return Verdict("warn", "GPU", text, "a MIG instance: a program sees one instance and its memory", share)
    if share is not None and share > 0.25:
        return Verdict("warn", "GPU", text, "other programs hold memory; `nvidia-smi` lists them", share)
    return Verdict("ok", "GPU", text, None, share)


def _pcie(gpu: Gpu, under_load: tuple[int, int] | None) -> Iterator[Verdict]:
    link = gpu.pcie
    gen, width = under_load or (link.gen, link.width)
    if gen is None or width is None:
        return
    most_gen, most_width = link.max_gen or gen, link.max_width or width
    when = "under load" if under_load else "idle"
    text = f"generation {gen} of {most_gen}, x{width} of x{most_width} ({when})"
    if width < most_width:
        yield Verdict(
            "warn",
            "PCIe",
            text,
            f"x{width} streams layers at {width / most_width:.0%} of the full rate; use another slot, or empty "
            "the slot that shares its lanes",
        )
    elif under_load and gen < most_gen:
        yield Verdict("warn", "PCIe", text, "the slot or a riser cable limits the link; check the slot's BIOS settings")
    else:
        yield Verdict("ok", "PCIe", text)


def _cpu(hardware: Hardware) -> Verdict:
    cpu = hardware.cpu
    text = f"{cpu.name}, {cpu.cores} core{'s' if cpu.cores != 1 else ''}, {' '.join(cpu.isa) or 'no SIMD known'}"
    if not cpu.isa:
        return Verdict("warn", "CPU", text, "matmuls will be slow")
    return Verdict("ok", "CPU", text)


# --- memory and disk ---------------------------------------------------------------------------------------------


def _memory(hardware: Hardware, measured: Measured) -> Iterator[Verdict]:
    ram = hardware.ram
    size = min(ram.total_bytes, ram.cgroup_limit_bytes or ram.total_bytes)
    share = 1 - ram.available_bytes / size if size else None
    swap = f"{format_bytes(ram.swap_bytes)} of swap" if ram.swap_bytes else "no swap"
    text = f"{format_bytes(ram.available_bytes)} of {format_bytes(size)} available, {swap}"
    if size < ram.total_bytes:
        text += f"; a control group allows {format_bytes(size)} of {format_bytes(ram.total_bytes)}"
    if ram.available_bytes < _LITTLE_RAM_BYTES:
        hint = "large models stream from disk; close other programs to keep more layers in memory"
        yield Verdict("warn", "RAM", text, hint, share)
    else:
        yield Verdict("ok", "RAM", text, None, share)
    if hardware.survey.gpus:
        yield _pinning(hardware, measured)
    if hardware.platform.wsl:
        yield Verdict(
            "warn",
            "WSL",
            "Windows gives WSL half of the RAM by default, and only part of that can be pinned",
            "raise memory= in %UserProfile%\\.wslconfig, and keep models on the Linux disk, not under /mnt",
        )


def _pinning(hardware: Hardware, measured: Measured) -> Verdict:
    limit = hardware.ram.pin_limit_bytes
    text = "no limit" if limit is None else f"RLIMIT_MEMLOCK {format_bytes(limit)}"
    if measured.pinning_works is False:
        hint = "pageable memory streams layers more slowly; use `ulimit -l unlimited` (docker: --ulimit memlock=-1)"
        return Verdict("warn", "pinning", f"host memory cannot be pinned ({text})", hint)
    return Verdict("ok", "pinning", text)


def _disk(hardware: Hardware) -> Verdict:
    disk = hardware.disk
    kind = f" ({disk.filesystem})" if disk.filesystem else ""
    text = f"{format_bytes(disk.free_bytes)} of {format_bytes(disk.total_bytes)} free in {from_home(disk.path)}{kind}"
    share = 1 - disk.free_bytes / disk.total_bytes if disk.total_bytes else None
    if disk.filesystem in _IN_MEMORY:
        hint = "this folder is in memory, so its files take RAM twice; set SPECCHAT_CACHE_DIR to a folder on disk"
        return Verdict("warn", "disk", text, hint, share)
    if disk.is_remote:
        return Verdict("warn", "disk", text, "this disk is not local; set SPECCHAT_CACHE_DIR to a local folder", share)
    if disk.free_bytes < _LITTLE_DISK_BYTES:
        return Verdict(
            "warn", "disk", text, "little room for models; set SPECCHAT_CACHE_DIR and HF_HOME to other folders", share
        )
    return Verdict("ok", "disk", text, None, share)


# --- rates -------------------------------------------------------------------------------------------------------


def _rates(measured: Measured, hardware: Hardware) -> Iterator[Verdict]:
    links = measured.links
    for topic, rate, level, hint in (
        ("pinned to GPU", links.h2d_pinned_bytes_per_s, *_against_pcie(measured)),
        ("pageable to GPU", links.h2d_pageable_bytes_per_s, "ok", None),
        ("GPU to pinned", links.d2h_bytes_per_s, "ok", None),
        ("RAM copy", links.ram_copy_bytes_per_s, "ok", None),
        ("disk read", links.disk_read_bytes_per_s, *_against_ssd(links, measured)),
    ):
        if rate is not None:
            yield Verdict(level, topic, format_rate(rate), hint)
    if measured.at_once:
        rates = ", ".join(f"{each.device} {format_rate(each.bytes_per_s)}" for each in measured.at_once)
        yield Verdict("ok", "GPUs at once", rates)
    if links.disk_read_bytes_per_s is None:
        hint = "set SPECCHAT_CACHE_DIR to a writable folder"
        yield Verdict("warn", "disk read", f"not measured: cannot write to {from_home(hardware.disk.path)}", hint)


def _against_pcie(measured: Measured) -> tuple[Level, str | None]:
    """Compare the rate of pinned copies with the maximum of the PCIe link."""
    rate, link = measured.links.h2d_pinned_bytes_per_s, measured.pcie_under_load
    if rate is None or link is None:
        return "ok", None
    possible = _GEN3_LANE_BYTES_PER_S * 2.0 ** (link[0] - 3) * link[1]
    if rate >= _SLOW_SHARE * possible:
        return "ok", None
    return (
        "warn",
        f"generation {link[0]} x{link[1]} can reach {format_rate(possible)}; is the machine busy or virtual?",
    )


def _against_ssd(links: Links, measured: Measured) -> tuple[Level, str | None]:
    rate = links.disk_read_bytes_per_s
    if rate is None:
        return "ok", None
    if not measured.disk_is_cold:
        return "warn", "the file system has a cache that could not be emptied; the disk itself may be slower"
    if rate < _SLOW_DISK_BYTES_PER_S:
        return (
            "warn",
            f"a pass over 10 GB of layers takes {10e9 / rate:.0f} s from here; an NVMe disk is several times faster",
        )
    return "ok", None


def _matmul(measured: Measured) -> Iterator[Verdict]:
    if not measured.matmul:
        return
    tera = max(rate.flop_per_s for rate in measured.matmul) >= 1e12
    rows = "/".join(str(rate.rows) for rate in measured.matmul)
    rates = ", ".join(f"{rate.flop_per_s / (1e12 if tera else 1e9):.3g}" for rate in measured.matmul)
    unit = "TFLOP/s" if tera else "GFLOP/s"
    yield Verdict("ok", "matmul", f"{measured.matmul_dtype} on {measured.device}, {rows} rows: {rates} {unit}")
