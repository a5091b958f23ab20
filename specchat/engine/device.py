"""The compute device: settings that a GPU needs, and the scope in which it is CUDA's current one."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor


def prepare(device: torch.device) -> None:
    """Set what a GPU computes with; a CPU needs nothing.

    On compute capability 9.0 and 10.0, torch prefers cuDNN's attention, which takes calls with masks and builds a plan
    for every new number of keys. Trees bring a new number with every pass. A plan takes 22 to 70 ms (pytorch #191576,
    mlxcel #1820), and about 1 s where it compiles a kernel (flashinfer #5245). The efficient kernel needs no plan.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a scope in which a GPU is CUDA's current device; a scope without effect for a CPU.

    Calls without a device, such as registering host memory, would open a context of 300 MiB on GPU 0 otherwise. CUDA
    keeps a current device for each thread, so every entry into the engine opens a scope of its own.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything that is queued on its current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def copied_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return small tensors on a device; all of them in host memory cross the link in one copy.

    A copy costs a GPU's host 10 us whatever its size, and it may queue behind the copy of a whole layer.

    Args:
        tensors: tensors in host memory or on the device, those with the largest items first.
        device: device to copy to.
    """
    here = [tensor for tensor in tensors if tensor.device.type != device.type]
    if not here:
        return list(tensors)
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in here]).to(device)
    parts = iter(packed.split([tensor.nbytes for tensor in here]))
    return [
        tensor if tensor.device.type == device.type else next(parts).view(tensor.dtype).view(tensor.shape)
        for tensor in tensors
    ]


def release_memory() -> None:
    """Free the memory of closed engines, on the device too: modules and their buffers refer to each other."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can; takes a millisecond.

    After a model of 4 GB was loaded, glibc kept 80 MB that had been copies of tensors.
    """
    with suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
