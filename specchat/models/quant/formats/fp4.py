"""4-bit floats (e2m1) with a scale per group of columns: MXFP4 and NVFP4 as safetensors checkpoints store them."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.quant.formats.affine import row_pieces
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.formats.fp8 import widen
from specchat.models.quant.formats.ggml_blocks import power_of_two
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.kernels.tiles import TileForm

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of exponents


@dataclass(frozen=True)
class MxFp4(WeightFormat):
    """W = e2m1 * 2^(scale - 127); every value is exact in bfloat16 too.

    Segments: `codes`, uint8 [rows, cols / 2], the first of two columns in the low half of a byte; `scales`, uint8
    [rows, cols / 32].
    """

    name: ClassVar[str] = "mxfp4"
    group: ClassVar[int] = 32

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        scales = Segment("scales", (rows, cols // self.group), torch.uint8)
        return (Segment("codes", (rows, cols // 2), torch.uint8), scales)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W."""
        for piece in row_pieces(out):
            rows = slice(begin + piece.start, begin + piece.stop)
            scales = power_of_two(segments["scales"][rows].int() - _BIAS)
            out[piece] = _scaled(segments["codes"][rows], scales)
        return out

    def tile_form(self, shape: tuple[int, int]) -> TileForm:
        """Return the format as the kernel for many experts reads it."""
        return TileForm("mxfp4", values=E2M1)


@dataclass(frozen=True)
class NvFp4(WeightFormat):
    """W = e2m1 * (scale * tensor_scale), computed in float32.

    Segments: `codes`, uint8 [rows, cols / 2], the first of two columns in the low half of a byte; `scales`,
    float8_e4m3fn [rows, cols / 16]; `tensor_scale`, float32 [1].

    Attributes:
        divides: whether scales are divided by `tensor_scale`, as in compressed-tensors.
    """

    name: ClassVar[str] = "nvfp4"
    group: ClassVar[int] = 16

    divides: bool

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        return (
            Segment("codes", (rows, cols // 2), torch.uint8),
            Segment("scales", (rows, cols // self.group), torch.float8_e4m3fn),
            Segment("tensor_scale", (1,), torch.float32),
        )

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W."""
        whole = segments["tensor_scale"]
        for piece in row_pieces(out):
            rows = slice(begin + piece.start, begin + piece.stop)
            scales = widen(segments["scales"][rows])
            out[piece] = _scaled(segments["codes"][rows], scales / whole if self.divides else scales * whole)
        return out


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the values of codes [rows, cols / 2] times the scales of their groups: float32 [rows, cols]."""
    pairs = torch.index_select(_pairs(codes.device), 0, codes.reshape(-1).int())
    values = pairs.view(torch.float32).view(codes.shape[0], scales.shape[1], -1).mul_(scales[..., None])
    return values.view(codes.shape[0], -1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two float32 values of each byte as int64 [256]: both are looked up at once."""
    every, table = torch.arange(256), torch.tensor(E2M1)
    return torch.stack([table[every & 15], table[every >> 4]], 1).view(torch.int64).view(-1).to(device)
