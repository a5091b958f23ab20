"""A survey of the NVIDIA driver's GPUs through NVML; failures become text, never an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specchat.hardware.machine import Gpu, GpuSurvey, PcieLink, Trouble

_NVIDIA_VENDOR, _AMD_VENDOR = "0x10de", "0x1002"
_DISPLAY_CLASS = "0x03"


def survey_gpus(pci: Path = Path("/sys/bus/pci/devices")) -> GpuSurvey:
    """Survey all GPUs that the driver shows.

    Args:
        pci: folder of the system's PCI devices; it tells a missing driver from a missing card.
    """
    try:
        import pynvml
    except ImportError:
        return GpuSurvey(troubles=(Trouble("the package nvidia-ml-py is missing", "pip install nvidia-ml-py"),))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuSurvey(troubles=(_no_driver(error, display_vendors(pci)),))
    try:
        return _survey(pynvml)
    except pynvml.NVMLError as error:
        return GpuSurvey(troubles=(_trouble(f"the NVIDIA driver does not answer: {error}"),))
    finally:
        _ask(pynvml.nvmlShutdown)


def read_pcie(uuid: str) -> tuple[int, int] | None:
    """Read the current generation and width of one GPU's link; None where the driver does not report them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        for _, handle in _handles(pynvml):
            if pynvml.nvmlDeviceGetUUID(handle) == uuid:
                link = _pcie(pynvml, handle)
                return (link.gen, link.width) if link.gen is not None and link.width is not None else None
    except pynvml.NVMLError:
        return None
    finally:
        _ask(pynvml.nvmlShutdown)
    return None


def display_vendors(pci: Path) -> set[str]:
    """Return the vendor numbers of the display devices on the PCI bus; empty where the system does not list them."""
    found = set()
    for device in pci.glob("*"):
        try:
            if (device / "class").read_text().startswith(_DISPLAY_CLASS):
                found.add((device / "vendor").read_text().strip())
        except OSError:
            continue
    return found


def _survey(nvml: Any) -> GpuSurvey:
    driver = str(nvml.nvmlSystemGetDriverVersion())
    version = _ask(nvml.nvmlSystemGetCudaDriverVersion_v2)
    gpus: list[Gpu] = []
    troubles: list[Trouble] = []
    for index, handle in _handles(nvml):
        try:
            gpus += _gpu_or_slices(nvml, handle, driver)
        except nvml.NVMLError as error:
            troubles.append(_trouble(f"GPU {index} does not answer: {error}"))
    return GpuSurvey(tuple(gpus), None if version is None else (version // 1000, version % 1000 // 10), tuple(troubles))


def _trouble(text: str) -> Trouble:
    return Trouble(text, "check with `nvidia-smi`; a reboot or a reinstalled driver usually helps")


def _handles(nvml: Any) -> Iterator[tuple[int, Any]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
        # A card that fell off the bus is skipped here; `nvidia-smi` does not show it either.
        if handle is not None:
            yield index, handle


def _gpu_or_slices(nvml: Any, handle: Any, driver: str) -> list[Gpu]:
    """Return the card, or its MIG instances: a program sees one instance, never the whole card."""
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or not mode[0]:
        return [_gpu(nvml, handle, handle, driver, is_mig=False)]
    most = _ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    slices = (_ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(most))
    return [_gpu(nvml, each, handle, driver, is_mig=True) for each in slices if each is not None]


def _gpu(nvml: Any, handle: Any, card: Any, driver: str, *, is_mig: bool) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _ask(nvml.nvmlDeviceGetCudaComputeCapability, card)
    return Gpu(
        name=str(nvml.nvmlDeviceGetName(handle)),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        vram_total_bytes=int(memory.total),
        vram_free_bytes=int(memory.free),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver=driver,
        pcie=_pcie(nvml, card),
        is_mig=is_mig,
    )


def _pcie(nvml: Any, handle: Any) -> PcieLink:
    return PcieLink(
        gen=_ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        width=_ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        max_gen=_ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        max_width=_ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )


def _ask(question: Callable[..., Any], *args: Any) -> Any | None:
    """Return the answer to an NVML call; None where the driver or the card does not support it."""
    import pynvml

    try:
        return question(*args)
    except pynvml.NVMLError:
        return None


def _no_driver(error: Exception, vendors: set[str]) -> Trouble:
    if _NVIDIA_VENDOR in vendors:
        return Trouble(
            f"an NVIDIA card is present, but its driver does not run ({error})",
            "install NVIDIA's driver, or load it with `sudo modprobe nvidia`; in a container, use --gpus all",
        )
    if _AMD_VENDOR in vendors:
        return Trouble("specchat cannot use the AMD card", "the CPU computes; layers stream from RAM or disk")
    return Trouble("no NVIDIA GPU and no NVIDIA driver found", "the CPU computes; layers stream from RAM or disk")
