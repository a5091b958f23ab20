"""bitsandbytes' operators, imported on first use: the import takes a second and may access the network."""

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
# bitsandbytes' own operator does not use its CPU kernel for blocks of this size or larger.
_CPU_BLOCKS_BELOW = 2048
_INTERLEAVED_ROWS = 32  # rows whose codes lie together in `RowCodes`


@cache
def bnb() -> Any:
    """Return the operators under `torch.ops.bitsandbytes`, registered for CPU and CUDA."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the import downloads kernels if the package `kernels` is installed
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about every missing kernel
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
    """Dequantize whole blocks into memory of the caller.

    The CPU operator has no `out`, so its kernel is called directly. In fresh memory dequantizing takes three times as
    long, mostly in page faults (Zen 4, one thread, 45 million values to bfloat16: 17 ms instead of 5.7 ms).

    Args:
        codes: 4-bit codes, uint8 [n / 2].
        absmax: absmax of each block, float32 [n / block].
        block: number of values that share an absmax.
        kind: "nf4" or "fp4".
        out: contiguous memory for n values, a multiple of the block.
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


class RowCodes:
    """A matrix of 4-bit codes in the order of bitsandbytes' CPU kernel for few rows of activations.

    The kernel needs AVX-512 with bfloat16. It multiplies by the 16 values and the absmax, both rounded to bfloat16, and
    sums in float32.

    Args:
        codes: 4-bit codes, two to a byte, high nibble first, uint8 [rows * cols / 2].
        absmax: absmax of each block, float32 [rows * cols / block].
        shape: (rows, cols), which `has_row_kernel` accepts.
        block: number of values that share an absmax.
        kind: "nf4" or "fp4".

    Attributes:
        nbytes: bytes of the copy.
    """

    def __init__(self, codes: Tensor, absmax: Tensor, shape: tuple[int, int], block: int, kind: str) -> None:
        self._shape, self._block = shape, block
        self._codes = _interleaved(codes.view(shape[0], -1))
        self._absmax = absmax.view(shape[0], -1).T.to(torch.bfloat16).contiguous()
        self._multiply = getattr(_cpu_kernels(), f"gemv_4bit_inference_cpu_{kind}_bf16")
        self.nbytes = self._codes.nbytes + self._absmax.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x W^T + bias in bfloat16: [..., cols] -> [..., rows]."""
        rows, cols = self._shape
        given = x.reshape(-1, cols).contiguous()
        out = x.new_empty(given.shape[0], rows)
        sizes = [ctypes.c_int64(size) for size in (given.shape[0], rows, cols)]
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (given, self._codes, self._absmax, out)]
        self._multiply(*sizes, *pointers, *map(ctypes.c_int64, (self._block, cols, rows)))
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], rows)


def has_row_kernel(shape: tuple[int, int], block: int) -> bool:
    """Return whether `RowCodes` can hold a matrix on this processor."""
    rows, cols = shape
    is_whole = rows % _INTERLEAVED_ROWS == 0 and cols % block == 0 and block % 2 == 0
    return is_whole and block < _CPU_BLOCKS_BELOW and _has_row_kernels()


@cache
def _has_row_kernels() -> bool:
    kernels = _cpu_kernels()
    if kernels is None:
        return False
    try:
        return bool(kernels.has_avx512bf16_cpu()) and all(
            hasattr(kernels, f"gemv_4bit_inference_cpu_{kind}_bf16") for kind in ("nf4", "fp4")
        )
    except (AttributeError, OSError):
        return False


def _interleaved(codes: Tensor) -> Tensor:
    """Return codes, uint8 [rows, cols / 2], in the kernel's order: 2 columns of 32 rows, 16 in low nibbles."""
    by_column = codes.view(-1, 2, _INTERLEAVED_ROWS // 2, codes.shape[1]).permute(0, 3, 1, 2)
    first, last = by_column.unbind(2)  # rows 0 .. 15 and 16 .. 31: [rows / 32, cols / 2, 16]
    even = (first >> 4) | (last & 0xF0)
    odd = (first & 0x0F) | (last << 4)
    return torch.stack([even, odd], -1).view(codes.shape)


@cache
def _cpu_kernels() -> Any | None:
    """Return the library behind the operators; None if it could not be loaded."""
    bnb()
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    return None if isinstance(lib, ErrorHandlerMockBNBNativeLibrary) else lib


@cache
def fused_product() -> Callable[..., Tensor] | None:
    """Return bitsandbytes' CUDA kernel that multiplies with 4-bit codes; None if this version has none.

    The operator `gemm_4bit` calls this kernel too, but sometimes it dequantizes instead, because it expects that to be
    faster. Dequantizing needs extra memory, which no ledger counts.

    Returns:
        Function of x [..., cols], codes, (rows, cols), the absmax (float32; if nested, the absmax of its codes), the
        block, "nf4" or "fp4", a bias or None, and if nested the codes of the absmax, `dynamic_map` and the offset. Its
        result is [..., rows] in the dtype of x. The block must divide cols.
    """
    bnb()
    try:
        from bitsandbytes.backends.cuda.ops import _gemm_4bit_kernel_impl
    except (ImportError, AttributeError):  # AttributeError: the native library lacks the kernel
        return None
    kernel: Callable[..., Tensor] = _gemm_4bit_kernel_impl
    return kernel


def bnb_version() -> str:
    """Return the installed version without importing the package."""
    return version("bitsandbytes")


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values that nested absmax codes stand for, float32."""
    bnb()
    from bitsandbytes.functional import create_dynamic_map

    with torch.inference_mode(False):
        codes: Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call]
    return codes
