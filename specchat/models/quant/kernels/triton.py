"""Matmul by specchat's Triton kernel for the formats that it supports, and by torch where it fails."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specchat.models.quant.kernels.chunked import Dequantize, Linear, Segments, matmul_in_chunks

CAPABILITY = (8, 0)  # the lowest compute capability that Triton supports


def triton_kernels(
    eager: Dequantize, bits: int, group: int | None, *, rounds: bool, device: torch.device
) -> dict[str, Linear]:
    """Return the Triton kernel for a format with `codes`, `scales` and perhaps `zeros`, by name; empty without Triton.

    Args:
        eager: fallback with the same values, in case the kernel does not compile.
        bits: bits of a code, as in `triton_affine.fill`.
        group: columns per scale, as in `triton_affine.fill`.
        rounds: whether to round to the dtype of the scales, as in `triton_affine.fill`.
        device: device of the matmul.
    """
    if device.type != "cuda" or _kernels() is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return {}
    return {"triton": partial(matmul_in_chunks, partial(dequantize_by_triton, eager, bits, group, rounds))}


def dequantize_by_triton(
    eager: Dequantize,
    bits: int,
    group: int | None,
    rounds: bool,
    segments: Segments,
    begin: int,
    end: int,
    out: Tensor,
) -> Tensor:
    """Dequantize rows as `WeightFormat.dequantize`; the first arguments are those of `triton_kernels`."""
    rows, zeros = slice(begin, end), segments.get("zeros")
    filled = _kernels().fill(
        segments["codes"][rows],
        segments["scales"][rows],
        None if zeros is None else zeros[rows],
        bits,
        group,
        rounds,
        out,
    )
    return out if filled else eager(segments, begin, end, out)


@cache
def _kernels() -> Any:
    """Import the module with the kernel; None without Triton. The import is slow."""
    try:
        from specchat.models.quant.kernels import triton_affine
    except ImportError:
        return None
    return triton_affine
