"""bitsandbytes' operators, imported when first needed: its import costs a second and may ask the network."""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

_CPU_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# From this block on, the operator does not trust its kernel either.
_CPU_BLOCKS_BELOW = 2048


@cache
def bnb() -> Any:
    """The operators under `torch.ops.bitsandbytes`, ready for CPU and CUDA."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the import fetches kernels where the package of that name is installed
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every kernel that it did not find
    try:
        import bitsandbytes  # noqa: F401  registers the operators
    finally:
        logger.setLevel(level)
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline
    return torch.ops.bitsandbytes


def fill_from_4bit(codes: Tensor, absmax: Tensor, block: int, kind: str, out: Tensor) -> None:
    """Dequantizes whole blocks into memory that the caller owns.

    On a CPU the operator has no `out`, so the kernel behind it is called: in fresh memory, most of whose time goes into
    page faults, dequantizing takes three times as long (Zen 4, one thread, 45 million numbers to bfloat16: 17 and
    5.7 ms).

    Args:
        codes: uint8 [n / 2].
        absmax: float32 [n / block].
        block: numbers that share an absmax.
        kind: "nf4" or "fp4".
        out: contiguous, n numbers, a multiple of the block.
    """
    whole = (out.numel() // block, block)
    if out.is_cuda:
        bnb().dequantize_4bit.out(codes, absmax, block, kind, whole, out.dtype, out=out.view(whole))
        return
    kernels = _cpu_kernels()
    if kernels is None or block >= _CPU_BLOCKS_BELOW:
        out.view(whole).copy_(bnb().dequantize_4bit(codes, absmax, block, kind, whole, out.dtype))
        return
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, absmax, out)]
    sizes = [ctypes.c_longlong(size) for size in (block, *whole)]
    getattr(kernels, f"cdequantize_blockwise_cpu_{kind}_{_CPU_NAMES[out.dtype]}")(*pointers, *sizes)


@cache
def _cpu_kernels() -> Any | None:
    """The library behind the operators, if it could be loaded."""
    bnb()
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    return None if isinstance(lib, ErrorHandlerMockBNBNativeLibrary) else lib


@cache
def fused_product() -> Callable[..., Tensor] | None:
    """bitsandbytes' kernel for CUDA that multiplies with 4-bit codes; None if this version has none.

    It is what `gemm_4bit` calls; that operator dequantizes instead where it expects that to be faster, into memory
    of its own, which no ledger has counted.

    Returns:
        A function of x [..., cols], codes, (rows, cols), the absmax (or that of the nested absmax: float32), the block,
        "nf4" or "fp4", a bias or None, and if nested the codes of the absmax, `dynamic_map` and the offset. It gives
        [..., rows] in the dtype of x. The block must divide cols.
    """
    bnb()
    try:
        from bitsandbytes.backends.cuda.ops import _gemm_4bit_kernel_impl
    except (ImportError, AttributeError):  # AttributeError: its own library lacks the kernel
        return None
    kernel: Callable[..., Tensor] = _gemm_4bit_kernel_impl
    return kernel


def bnb_version() -> str:
    """The installed version, without importing it."""
    return version("bitsandbytes")


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 numbers, float32, that nested absmax codes stand for."""
    bnb()
    from bitsandbytes.functional import create_dynamic_map

    with torch.inference_mode(False):
        codes: Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call]
    return codes
