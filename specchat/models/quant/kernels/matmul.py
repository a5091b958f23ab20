"""Matmul of activation rows with a plain matrix, by the faster of torch's libraries.

On a CPU torch computes a float32 `linear` with MKL, which is slow on processors not made by Intel. It computes 16-bit
ones with oneDNN, which is fast everywhere. Measured on two cores of an AMD EPYC (Zen 4), a 7168 x 2048 matrix,
milliseconds by MKL and by oneDNN: 1 row 3.3 and 2.3, 8 rows 7.8 and 3.3, 64 rows 17.0 and 10.3, 160 rows 44 and 25.
Both sum in float32. In bfloat16, calling oneDNN explicitly gives the same bits in the same time, within 2 %.

For some row counts a bfloat16 matmul is faster transposed, as W x^T: oneDNN reorders the right-hand matrix, and x is
far smaller than W. Measured on the same cores with 1792 x 2048 values, GFLOP/s of x W^T and of W x^T including the
transposition of the result: 48 rows 345 and 398, 64 rows 367 and 401, 128 rows 400 and 411, of at most 450. Other row
counts leave blocks partly empty and lose: 40 rows 322 and 221, 65 rows 351 and 259.
"""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A oneDNN call costs a few extra microseconds, which pay off only for matrices of at least this size.
MIN_NUMBERS = 1 << 20

# Row counts of x at which a bfloat16 matmul is transposed; x is padded by a few rows to reach one.
TURNED_ROWS = (48, 64, 128)
MAX_ADDED_ROWS = 4

_INTEL = "GenuineIntel"
_X86 = ("x86_64", "AMD64")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias with a matrix of the dtype and device of x.

    Args:
        x: activations [..., cols].
        weight: matrix [rows, cols].
        bias: bias [rows] or None.

    Returns:
        Result [..., rows]; possibly a view in column-major order.
    """
    if (num_rows := turned_rows(x, weight)) is not None:
        return _turned(x, weight, bias, num_rows)
    if is_faster_by_onednn(weight):
        return _few_counts(_onednn, x, weight, bias)
    return _few_counts(F.linear, x, weight, bias) if is_by_onednn(weight) else F.linear(x, weight, bias)


def padded_count(num_rows: int) -> int:
    """Return the number of rows to compute instead of `num_rows`: one of four in every octave, at most 1/4 more.

    oneDNN makes code for each number of rows and shape of a matrix, and never frees all of it: with 2 to 511 rows and
    four shapes in bfloat16, a process grew by 2.0 GB; with these counts by 0.1 GB (torch 2.13, Zen 5).
    """
    step = 1 << max((num_rows - 1).bit_length() - 3, 0)
    return -(-num_rows // step) * step


def padded(rows: Tensor, count: int) -> Tensor:
    """Return rows [n, cols] with zero rows after them, [count, cols]."""
    return F.pad(rows, (0, 0, 0, count - len(rows))) if count > len(rows) else rows


def is_by_onednn(weight: Tensor) -> bool:
    """Return whether torch multiplies with a matrix of a CPU by oneDNN."""
    return not weight.is_cuda and weight.dtype.itemsize == 2 and torch.backends.mkldnn.is_available()


def _few_counts(
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply with one of few numbers of rows."""
    rows = x.reshape(-1, x.shape[-1])
    out = multiply(padded(rows, padded_count(len(rows))), weight, bias)
    return out[: len(rows)].view(*x.shape[:-1], -1)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def product_of_one_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `product` for a single row in bfloat16 by torch's own kernel, which reads a matrix as it is stored.

    oneDNN reorders the matrix for every call: 26 GB/s instead of 18 with one core (Zen 5, a 7168 x 2048 matrix). Both
    round a float32 sum, in different orders. The switch is global, so another thread's matmul may meanwhile be
    computed by torch's kernel, too: slower, and as precise.
    """
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


def has_own_row_kernel(weight: Tensor) -> bool:
    """Return whether `product_of_one_row` may be faster than `product` for a single row."""
    is_large = weight.dtype == torch.bfloat16 and weight.numel() >= MIN_NUMBERS
    return is_large and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def is_faster_by_onednn(weight: Tensor) -> bool:
    """Return whether `product` calls oneDNN explicitly."""
    large = weight.dtype == torch.float32 and weight.numel() >= MIN_NUMBERS
    return large and not weight.is_cuda and _is_mkl_slow()


def _is_mkl_slow() -> bool:
    operators: Any = torch.ops.mkldnn
    return torch.backends.mkl.is_available() and not is_intel() and hasattr(operators, "_linear_pointwise")


def turned_rows(x: Tensor, weight: Tensor) -> int | None:
    """Return the padded row count with which `product` computes W x^T; None where it computes x W^T."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() < MIN_NUMBERS:
        return None
    num_rows = x.numel() // weight.shape[1]
    fitting = (rows for rows in TURNED_ROWS if 0 <= rows - num_rows <= MAX_ADDED_ROWS)
    return next(fitting, None) if _is_turning_faster() else None


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int) -> Tensor:
    """Compute (W x^T + bias)^T, with x zero-padded to `num_rows` rows."""
    rows = x.reshape(-1, x.shape[-1])
    added = num_rows - rows.shape[0]
    columns = (F.pad(rows, (0, 0, 0, added)) if added else rows).t()  # [cols, num_rows]
    out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out[:, : rows.shape[0]].t().view(*x.shape[:-1], -1)


@cache
def _is_turning_faster() -> bool:
    # Unmeasured on Intel's newer processors, which have matrix units (AMX).
    return torch.backends.mkldnn.is_available() and platform.machine() in _X86 and not is_intel()


@cache
def is_intel() -> bool:
    """Return whether Intel made the processor."""
    return _INTEL in _cpu_info()


@cache
def processor() -> str:
    """Return the name of the processor, and its family, model and stepping where the system tells them."""
    kinds = ("model name", "cpu family", "model", "stepping")
    facts = dict(line.split(":", 1) for line in reversed(_cpu_info().splitlines()) if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    return " ".join(found[kind] for kind in kinds if kind in found) or platform.machine()


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
