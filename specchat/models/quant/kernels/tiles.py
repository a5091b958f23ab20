"""How a kernel dequantizes tiles of a matrix: the numbers that describe a quantization format to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TileForm:
    """A format, as the kernel dequantizes a tile of a matrix: (code - zero) * scale, or values[code] * scale.

    Attributes:
        kind: layout of codes and scales, which the kernel reads. "plain" numbers are not quantized; a "plain
            transposed" matrix is stored as [cols, rows]. "blocks" are ggml's.
        bits: bits of a code of kind "affine".
        group: columns per scale; 0 for all columns of a row. In NF4, numbers per scale.
        group_rows: rows per scale; 0 for all rows.
        middle: zero point where none are stored.
        has_zeros: whether zero points are stored.
        scale_dtype: dtype of the scales; of the numbers themselves if they are plain.
        rounds: whether scaled values are rounded to the dtype of the scales.
        values: values that codes stand for; empty if codes are numbers.
        block, block_numbers, block_bytes: type of ggml's blocks, numbers of a block, and its bytes.
    """

    kind: Literal["affine", "blocks", "fp8", "mxfp4", "nf4", "nf4 nested", "plain", "plain transposed"]
    bits: int = 8
    group: int = 0
    group_rows: int = 1
    middle: float = 0.0
    has_zeros: bool = False
    scale_dtype: torch.dtype = torch.float32
    rounds: bool = False
    values: tuple[float, ...] = ()
    block: str = ""
    block_numbers: int = 1
    block_bytes: int = 0
