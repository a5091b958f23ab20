"""bitsandbytes' 4-bit formats (NF4, FP4): blocks of a flattened matrix share one absmax, which may itself be 8-bit.

The bytes equal those of bitsandbytes-4bit checkpoints. Blocks continue across rows. The operators always receive flat
ranges of whole blocks: the two-dimensional CPU kernel of bitsandbytes 0.50 is wrong if rows are no multiple of the
block.

Source: QLoRA, arXiv 2305.14314 (NF4, double quantization); bitsandbytes 0.50.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.bnb import (
    RowCodes,
    bnb,
    bnb_version,
    dynamic_map,
    fill_from_4bit,
    fused_product,
    has_row_kernel,
)
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.models.quant.kernels.tiles import TileForm

NESTED_BLOCK = 256  # absmax values that share one scale
_FUSED_ROWS = 64  # with more rows, dequantizing pays off and torch multiplies faster
_QUANTIZE_NUMBERS = 1 << 20  # per call (bitsandbytes takes some 30 bytes each); a multiple of every block


@dataclass(frozen=True)
class Bnb4(WeightFormat):
    """4-bit codes, two to a byte, high nibble first, times the absmax of their block.

    Attributes:
        kind: table of the 16 values that the codes stand for.
        block: number of values that share an absmax.
        nested: whether absmax values are 8-bit codes around `offset`, else float32.
        rounds: whether absmax is rounded to bfloat16 before use, as by the kernel of `RowCodes`.
    """

    name: ClassVar[str] = "nf4"

    kind: Literal["nf4", "fp4"] = "nf4"
    block: int = 64
    nested: bool = True
    rounds: bool = field(default=False, repr=False)

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return codes [rows * cols / 2], absmax per block, and if nested the absmax's own scales and offset."""
        num_blocks = -(-rows * cols // self.block)
        codes = Segment("codes", (-(-rows * cols // 2),), torch.uint8)
        if not self.nested:
            return codes, Segment("absmax", (num_blocks,), torch.float32)
        return (
            codes,
            Segment("absmax", (num_blocks,), torch.uint8),
            Segment("nested_absmax", (-(-num_blocks // NESTED_BLOCK),), torch.float32),
            Segment("offset", (1,), torch.float32),
        )

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows by bitsandbytes; ranges that do not match whole blocks go through its own memory."""
        cols = out.shape[1]
        codes = segments["codes"]
        first, last = begin * cols // self.block, -(-end * cols // self.block)  # blocks
        count = min(last * self.block, 2 * codes.numel()) - first * self.block
        part = codes[first * self.block // 2 : first * self.block // 2 + count // 2]
        absmax = self._absmax(segments, first, last)
        if self.rounds:
            absmax = absmax.bfloat16().float()
        skipped = begin * cols - first * self.block
        if skipped == 0 and count == out.numel() and count % self.block == 0:
            fill_from_4bit(part, absmax, self.block, self.kind, out)
            return out
        whole = (count // self.block, self.block) if count % self.block == 0 else (1, count)
        numbers: Tensor = bnb().dequantize_4bit(part, absmax, self.block, self.kind, whole, out.dtype)
        return numbers.view(-1)[skipped : skipped + out.numel()].view_as(out)

    def row_copy(self, segments: Segments, shape: tuple[int, int], dtype: torch.dtype) -> RowCodes | None:
        """Return the codes in the order of bitsandbytes' kernel for few rows in bfloat16, if there is one."""
        codes = segments["codes"]
        if dtype != torch.bfloat16 or codes.is_cuda or not has_row_kernel(shape, self.block):
            return None
        absmax = self._absmax(segments, 0, shape[0] * shape[1] // self.block)
        return RowCodes(codes, absmax, shape, self.block, self.kind)

    def beside_row_copy(self) -> Bnb4:
        """Return the format that rounds absmax."""
        return replace(self, rounds=True)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """Return the kernels of `WeightFormat.kernels`, and on a GPU a fused kernel for few rows.

        The fused kernel dequantizes while it multiplies, and it rounds differently. It computes a nested absmax with
        one rounding less. In 16 bits it rounds absmax, the 16 values, and below 8 rows of x every single product to the
        dtype of x. Errors of that size are normal in 16 bits. In float32 they could tip a near-tie between plain
        decoding (one row) and a tree (many rows), so float32 does not use it.
        """
        ways = super().kernels(shape, num_rows, dtype, device)
        possible = device.type == "cuda" and dtype != torch.float32
        if possible and num_rows <= _FUSED_ROWS and shape[1] % self.block == 0 and fused_product() is not None:
            ways["fused"] = self._multiply_fused
        return ways

    def tile_form(self, shape: tuple[int, int]) -> TileForm | None:
        """Return the format as the kernel for many experts reads it; None if a byte has two rows."""
        if shape[1] % 2 or self.rounds:
            return None
        values = (*_steps(self.kind), *dynamic_map(torch.device("cpu")).tolist())
        return TileForm("nf4 nested" if self.nested else "nf4", group=self.block, values=values)

    def _multiply_fused(
        self, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Compute `WeightFormat.linear` without `scratch`."""
        multiply = fused_product()
        assert multiply is not None
        if not self.nested:
            return multiply(x, segments["codes"], shape, segments["absmax"], self.block, self.kind, bias)
        nested = (segments["absmax"], dynamic_map(x.device), segments["offset"])
        return multiply(x, segments["codes"], shape, segments["nested_absmax"], self.block, self.kind, bias, *nested)

    def _absmax(self, segments: Segments, first: int, last: int) -> Tensor:
        """Return the absmax of the blocks first .. last - 1: float32."""
        absmax = segments["absmax"]
        if not self.nested:
            return absmax[first:last]
        group = first // NESTED_BLOCK
        part = absmax[group * NESTED_BLOCK : last]
        scales = segments["nested_absmax"][group : -(-last // NESTED_BLOCK)]
        numbers: Tensor = bnb().dequantize_blockwise(
            part, scales, dynamic_map(absmax.device), NESTED_BLOCK, torch.float32
        )
        return numbers[first - group * NESTED_BLOCK :].add_(segments["offset"])


class Nf4Quantizer:
    """Quantizer for NF4 with blocks of 64 and nested absmax: 4.13 bits per weight."""

    format = Bnb4()

    @property
    def identity(self) -> str:
        """Format, version and device: CPU and CUDA may round ties differently."""
        return f"nf4-g64-nested bitsandbytes {bnb_version()} cpu"

    def quantize(self, weight: Tensor, segments: Segments) -> None:
        """Fill the segments a few rows at a time, with the bytes that bitsandbytes computes for the whole matrix."""
        flat = weight.detach().reshape(-1)
        block = self.format.block
        absmax = torch.empty(segments["absmax"].numel())
        for begin in range(0, flat.numel(), _QUANTIZE_NUMBERS):
            piece = flat[begin : begin + _QUANTIZE_NUMBERS]
            codes, scales = bnb().quantize_4bit(piece, block, self.format.kind, torch.uint8)
            segments["codes"][begin // 2 : begin // 2 + codes.numel()] = codes.view(-1)
            absmax[begin // block : begin // block + scales.numel()] = scales
        offset = absmax.mean()
        nested, scales = bnb().quantize_blockwise(absmax - offset, dynamic_map(absmax.device), NESTED_BLOCK)
        segments["offset"].copy_(offset)
        segments["absmax"].copy_(nested)
        segments["nested_absmax"].copy_(scales)


@cache
def _steps(kind: Literal["nf4", "fp4"]) -> tuple[float, ...]:
    """Return the 16 values that codes stand for, as bitsandbytes has them."""
    codes = torch.arange(16, dtype=torch.uint8) << 4  # high halves; low ones are 0
    numbers: Tensor = bnb().dequantize_4bit(codes, torch.ones(1), 32, kind, (1, 32), torch.float32)
    return tuple(numbers[0, ::2].tolist())
