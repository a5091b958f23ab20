"""Copy rates of a GPU's links, and its PCIe state under load. Not yet measured on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.hardware.nvml import read_pcie
from specchat.units import MIB

_BYTES = 512 * MIB
_WARM_UPS, _COPIES, _SERIES = 4, 16, 3
_FREE_SHARE = 4  # the buffer takes at most 1/4 of the free device memory


@dataclass(frozen=True)
class CudaLinks:
    """Measured rates of one GPU's links.

    Attributes:
        uuid: GPU identifier, as NVML writes it.
        h2d_pinned_bytes_per_s, d2h_bytes_per_s: rates with pinned memory; None where no host memory could be pinned.
        h2d_pageable_bytes_per_s: rate from pageable memory.
        pcie: generation and width during the copies; None where the driver does not report them.
    """

    uuid: str
    h2d_pinned_bytes_per_s: float | None
    h2d_pageable_bytes_per_s: float
    d2h_bytes_per_s: float | None
    pcie: tuple[int, int] | None


def measure_cuda_links(index: int) -> CudaLinks:
    """Measure copies between host and GPU `index`, timed by events on the device.

    The GPU is CUDA's current device meanwhile: an event without a stream is recorded on the current device's.
    """
    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_BYTES, free // _FREE_SHARE)
    uuid = gpu_uuid(index)
    pageable = torch.zeros(size, dtype=torch.uint8)
    with torch.cuda.device(device):
        on_device = torch.empty(size, dtype=torch.uint8, device=device)
        with closing(_PinnedCopy(pageable, device)) as host:
            pinned, pcie = _rate(on_device, host.memory, host.is_pinned, lambda: read_pcie(uuid))
            back, _ = _rate(host.memory, on_device, host.is_pinned, None)
        slow, _ = _rate(on_device, pageable, True, None)
    assert slow is not None
    return CudaLinks(uuid, pinned, slow, back, pcie)


def gpu_uuid(index: int) -> str:
    """Return the identifier of a GPU, as NVML writes it; NVML numbers GPUs in another order than CUDA."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def forget_error(device: torch.device) -> None:
    """Clear the error that a refused CUDA call has left; the next kernel would report it.

    Raises:
        RuntimeError: another error, which stays.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
    torch.zeros(1, device=device).add_(1)


class _PinnedCopy:
    """Host memory that CUDA registers directly, as the engine does; WSL and containers may refuse."""

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.memory = torch.zeros_like(like)
        error = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
        self.is_pinned = int(error) == 0
        if not self.is_pinned:
            forget_error(device)

    def close(self) -> None:
        """Unpin the memory."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


def _rate(
    to: Tensor, source: Tensor, possible: bool, during: Callable[[], tuple[int, int] | None] | None
) -> tuple[float | None, tuple[int, int] | None]:
    """Return the median bytes per second of three series, and the result of `during` while copies run."""
    if not possible:
        return None, None
    seen, seconds = None, []
    for _ in range(_SERIES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(_WARM_UPS):
            to.copy_(source, non_blocking=True)
        begin.record()
        for _ in range(_COPIES):
            to.copy_(source, non_blocking=True)
        end.record()
        if during is not None:
            seen = during() or seen
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return _COPIES * to.nbytes / statistics.median(seconds), seen
