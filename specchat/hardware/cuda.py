"""Copy rates of a GPU's links, and its PCIe state under load. Not yet measured on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.hardware.nvml import read_pcie
from specchat.units import MIB

_BYTES = 512 * MIB
_WARM_UPS, _COPIES, _SERIES = 4, 16, 3
# Copies to all GPUs at the same time: together 3 GiB for each.
_PIECE_BYTES, _PIECES = 64 * MIB, 48
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


def measure_links_at_once() -> tuple[float | None, ...]:
    """Measure pinned copies to all GPUs at the same time: links may share host memory, and lanes on some boards.

    Returns:
        Bytes per second of each GPU; None where host memory could not be pinned.
    """
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    with ExitStack() as undo:
        pairs, marks = list[tuple[Tensor, Tensor]](), list[list[torch.cuda.Event]]()
        for device in devices:
            with torch.cuda.device(device):
                copy = undo.enter_context(closing(_PinnedCopy(torch.zeros(_PIECE_BYTES, dtype=torch.uint8), device)))
                if not copy.is_pinned:
                    return (None,) * len(devices)
                pairs.append((torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device), copy.memory))
        for device, (to, source) in zip(devices, pairs, strict=True):
            stream = torch.cuda.current_stream(device)
            marks.append([torch.cuda.Event(enable_timing=True) for _ in range(_PIECES + 1)])
            for mark in marks[-1]:
                mark.record(stream)
                to.copy_(source, non_blocking=True)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return rates_at_once(
            [[first.elapsed_time(each) / 1e3 for each in rest] for first, *rest in marks], _PIECE_BYTES
        )


def rates_at_once(ends: Sequence[Sequence[float]], piece_bytes: int) -> tuple[float, ...]:
    """Return the rate of each link in bytes per second, until the first of them had copied everything.

    Args:
        ends: seconds from the begin to the end of each copy, ascending, for each link.
        piece_bytes: bytes of a copy.
    """
    until = min(each[-1] for each in ends)
    counts = [max(sum(end <= until for end in each), 1) for each in ends]
    return tuple(count * piece_bytes / each[count - 1] for count, each in zip(counts, ends, strict=True))


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
