"""Products by our Triton kernel, for the formats that it knows: where there is Triton, and torch where it fails."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specchat.models.quant.kernels.chunked import Dequantize, Linear, Segments, product_in_pieces

_CAPABILITY = (8, 0)  # what Triton compiles for begins here


def triton_kernels(
    eager: Dequantize, bits: int, group: int | None, *, rounds: bool, device: torch.device
) -> dict[str, Linear]:
    """What the kernel adds to the `ways` of a format with `codes`, `scales` and perhaps `zeros`: one, or none.

    Args:
        eager: gives the same numbers where the kernel turns out not to compile.
        bits: of a code, see `triton_affine.fill`.
        group: columns per scale, see there.
        rounds: whether products are rounded to the dtype of the scales, see there.
        device: where products are computed.
    """
    if device.type != "cuda" or _kernels() is None or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return {}
    return {"triton": partial(product_in_pieces, partial(dequantize_by_triton, eager, bits, group, rounds))}


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
    """Rows of W, see `WeightFormat.dequantize`; for the first arguments see `triton_kernels`."""
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
    """The module with the kernel; None without Triton, which is imported with it and takes its time."""
    try:
        from specchat.models.quant.kernels import triton_affine
    except ImportError:
        return None
    return triton_affine
