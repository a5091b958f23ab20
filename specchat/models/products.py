"""The product of rows with a matrix of numbers, by the faster of torch's libraries.

torch computes a float32 `linear` on a CPU with MKL, which is slow on processors that Intel did not make, and 16-bit
ones with oneDNN, which is not. Measured on two cores of an AMD EPYC (Zen 4), a 7168 x 2048 matrix, milliseconds by MKL
and by oneDNN: 1 row 3.3 and 2.3, 8 rows 7.8 and 3.3, 64 rows 17.0 and 10.3, 160 rows 44 and 25. Both sum in float32.
In bfloat16, asking for oneDNN by name gives the same bits in the same time, within 2 %.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A call of oneDNN takes some microseconds more, which a smaller matrix does not earn back.
MIN_NUMBERS = 1 << 20

_INTEL = "GenuineIntel"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., cols] -> [..., rows], of a matrix [rows, cols] of the dtype and on the device of x."""
    if is_faster_by_onednn(weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def is_faster_by_onednn(weight: Tensor) -> bool:
    """Whether `product` asks for oneDNN."""
    large = weight.dtype == torch.float32 and weight.numel() >= MIN_NUMBERS
    return large and not weight.is_cuda and _is_mkl_slow()


def _is_mkl_slow() -> bool:
    operators: Any = torch.ops.mkldnn
    return torch.backends.mkl.is_available() and not is_intel() and hasattr(operators, "_linear_pointwise")


@cache
def is_intel() -> bool:
    """Whether Intel made the processor."""
    try:
        return _INTEL in Path("/proc/cpuinfo").read_text()
    except OSError:
        return _INTEL in platform.processor()
