"""specchat's own int3: four columns of a row share a codebook's entry and have a sign each; 3.31 bits per weight.

A codebook of four magnitudes loses less than single codes of the same size, because combinations of large magnitudes
are rare and get few entries. Groups of 128 columns share a scale. Squared error of the demo target's matrices, of their
mean square: 0.0184 with 3.31 bits, 0.0267 with codes of 8 values and a scale for 32 columns (3.25 bits), 0.0286 with
affine codes for 64 columns (3.25 bits), 0.0085 with NF4 (4.13 bits). ggml's IQ3_S is of the same kind.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.models.quant.formats.affine import row_pieces, scale_groups
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.models.quant.kernels.triton import unpacking_kernels
from specchat.models.quant.kernels.unpacked import INT3, Unpacked

_VERSION = 1
GROUP = 128
_BOOK = Path(__file__).with_suffix(".toml")
_LARGEST = 127
_NO_SCALE = 255  # of groups with infinite or undefined weights, which must not go unnoticed
_PER_BYTE = {"codes": 4, "signs": 8, "ninths": 32}  # columns
# Magnitudes are compared with the candidates of a cell of 8 x 8 x 8 x 8 levels. The squared error is 4 % more than with
# all 512 entries, which would take a hundred times as long, and 0.5 % more than with 8 candidates.
_CELL_BITS, _CELLS, _CANDIDATES = 3, 16, 4
_TRIED_SCALES = (-1, 0, 1, 2)  # codes beside that of the group's root mean square
_QUANTIZE_NUMBERS = 1 << 18  # at a time; they take some 60 bytes each


@dataclass(frozen=True)
class Int3(WeightFormat):
    """Entries of a codebook with signs, times the scale of their group; exact in float32, rounded once in 16 bits.

    Segments, all uint8 [rows, n]: `codes`, the low byte of an entry's number for each four columns; `signs`, a bit for
    each column, set for minus; `ninths`, the high bit of each entry's number; `scales`, one for each `GROUP` columns,
    with 5 bits of exponent and 3 of mantissa. Low bits come first.
    """

    name: ClassVar[str] = "int3"

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        widths = {**{name: -(-cols // count) for name, count in _PER_BYTE.items()}, "scales": -(-cols // GROUP)}
        return tuple(Segment(name, (rows, width), torch.uint8) for name, width in widths.items())

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W, four columns at a time."""
        cols = out.shape[1]
        # Levels and scales have few bits, so that their product in bfloat16 is rounded once. float16 has small scales
        # as subnormal numbers only.
        dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
        entries, scale_of = _signed_entries(dtype, out.device), _scale_table(out.device)
        for piece in row_pieces(out):
            rows = slice(begin + piece.start, begin + piece.stop)
            target = out[piece]
            is_direct = cols % 4 == 0 and out.dtype == dtype
            numbers = target if is_direct else target.new_empty(len(target), -(-cols // 4) * 4, dtype=dtype)
            torch.index_select(entries, 0, _entry_index(segments, rows).view(-1), out=_quads(numbers))
            scales = scale_of.index_select(0, segments["scales"][rows].reshape(-1).int())
            scale_groups(numbers, scales.view(len(target), -1).to(dtype), GROUP)
            if not is_direct:
                target.copy_(numbers[:, :cols])
        return out

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """Return the kernels of `WeightFormat.kernels`, and those in Triton."""
        ways = super().kernels(shape, num_rows, dtype, device)
        return ways | unpacking_kernels(self.dequantize, self.unpack, lambda _: None, num_rows, dtype, device)

    def unpack(self, segments: Segments, begin: int, end: int) -> Unpacked:
        """Return rows for the Triton kernels."""
        codes, signs, ninths, scales = (segments[name][begin:end] for name in (*_PER_BYTE, "scales"))
        return Unpacked(INT3, GROUP, 0, (codes, signs, ninths, scales), _kernel_table(codes.device))


def _quads(numbers: Tensor) -> Tensor:
    """View contiguous values four at a time, as one element each."""
    return numbers.view(-1).view(torch.complex128 if numbers.dtype == torch.float32 else torch.int64)


def _entry_index(segments: Segments, rows: slice) -> Tensor:
    """Return the number of each signed entry: int32 [rows, columns / 4]."""
    codes, signs, ninths = (segments[name][rows] for name in _PER_BYTE)
    device = codes.device
    high = _spread(_ninth_table(device), ninths, codes.shape[1])
    return (_spread(_sign_table(device), signs, codes.shape[1]).add_(high).add_(codes)).int()


def _spread(table: Tensor, packed: Tensor, count: int) -> Tensor:
    """Return what each byte of a row stands for, int16 [rows, count], given a table [256, int16 per byte]."""
    wide = table.view(torch.int32 if table.shape[1] == 2 else torch.complex128).view(-1)
    found = wide.index_select(0, packed.reshape(-1).int()).view(torch.int16).view(len(packed), -1)
    return found if found.shape[1] == count else found[:, :count].contiguous()


@cache
def _sign_table(device: torch.device) -> Tensor:
    """Return the signs of two entries for each byte, in the bits 9 to 12 of an entry's number: int16 [256, 2]."""
    byte = torch.arange(256, dtype=torch.int16)
    return torch.stack([(byte & 15) << 9, (byte >> 4) << 9], 1).to(device)


@cache
def _ninth_table(device: torch.device) -> Tensor:
    """Return the bits of each byte as bit 8 of eight entries' numbers: int16 [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits << 8).to(device, torch.int16)


@cache
def _signed_entries(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return all entries with all signs, four values as one element [16 * 512], for `dtype` float32 or bfloat16."""
    signs = 1 - 2 * (torch.arange(16)[:, None] >> torch.arange(4) & 1)
    return _quads((signs[:, None] * book().int()).view(-1, 4).to(dtype)).to(device)


@cache
def book() -> Tensor:
    """Return the magnitudes of the codebook's entries: uint8 [512, 4]."""
    return torch.frombuffer(bytearray(bytes.fromhex(_table()["hex"])), dtype=torch.uint8).view(-1, 4)


@cache
def _table() -> dict[str, str]:
    return tomllib.loads(_BOOK.read_text(encoding="ascii"))


@cache
def _scale_table(device: torch.device) -> Tensor:
    """Return the scale of each code: float32 [256], ascending from 0, with NaN for `_NO_SCALE`."""
    code = torch.arange(256)
    scales = (8 + code % 8) / 8 * 2.0 ** (code // 8 - 31)
    return scales.masked_fill_(code == 0, 0.0).masked_fill_(code == _NO_SCALE, torch.nan).to(device)


@cache
def _kernel_table(device: torch.device) -> Tensor:
    """Return the entries and the scales for the Triton kernels: float32 [512 * 4 + 256]."""
    return torch.cat([book().float().view(-1), _scale_table(torch.device("cpu"))]).to(device)


class Int3Quantizer:
    """Quantizer for `Int3` that takes, for each group, the best of four scales."""

    format = Int3()

    @property
    def identity(self) -> str:
        """Format and version of the codebook and of the rounding."""
        return f"int3-g{GROUP} {_VERSION}"

    def quantize(self, weight: Tensor, segments: Segments) -> None:
        """Fill the segments, a few rows at a time."""
        rows, cols = weight.shape
        step = max(_QUANTIZE_NUMBERS // cols, 1)
        for begin in range(0, rows, step):
            piece = weight[begin : begin + step].to(torch.float32)
            filled = F.pad(piece, (0, -cols % GROUP)).contiguous()
            groups = filled.view(-1, GROUP)
            sizes = groups.new_full((groups.shape[0] // len(piece),), GROUP)
            sizes[-1] -= -cols % GROUP
            scales = _best_scales(groups.abs(), sizes.repeat(len(piece)))
            index = _nearest(_levels(groups.abs(), scales)).view(len(piece), -1)
            own = {name: segment[begin : begin + step] for name, segment in segments.items()}
            own["scales"].copy_(scales.view(len(piece), -1))
            own["codes"].copy_((index & 255)[:, : own["codes"].shape[1]])
            own["ninths"].copy_(_packed(index >> 8)[:, : own["ninths"].shape[1]])
            own["signs"].copy_(_packed((filled < 0).int())[:, : own["signs"].shape[1]])


def _packed(bits: Tensor) -> Tensor:
    """Pack bits [rows, 8 n] into bytes [rows, n], the first in the lowest bit."""
    return (bits.view(len(bits), -1, 8) << torch.arange(8, dtype=torch.int32)).sum(-1)


def _levels(magnitudes: Tensor, scales: Tensor) -> Tensor:
    """Return magnitudes [groups, GROUP] in units of their scales, four a row; zeros where the scale is 0."""
    divisor = _scale_table(magnitudes.device).index_select(0, scales)[:, None]
    levels = magnitudes / divisor.masked_fill(divisor == 0, 1.0)
    return levels.nan_to_num_(nan=0.0).clamp_(max=float(_LARGEST)).view(-1, 4)


def _best_scales(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Return the code of each group's scale with the least squared error: int64 [groups].

    Args:
        magnitudes: magnitudes [groups, GROUP], padded with zeros.
        sizes: number of magnitudes of each group that count.
    """
    table, levels, nearest = _scale_table(magnitudes.device), book().float(), _candidates()[:, 0].contiguous()
    deviation = (magnitudes.square().sum(1) / sizes).sqrt()
    usual = torch.bucketize(deviation / float(_table()["per_deviation"]), table[:_NO_SCALE])
    least, best = torch.full_like(deviation, torch.inf), usual.clone()
    for offset in _TRIED_SCALES:
        code = (usual + offset).clamp_(0, _NO_SCALE - 1).masked_fill_(deviation == 0, 0)
        index = nearest.index_select(0, _cells(_levels(magnitudes, code)))
        found = levels.index_select(0, index).view_as(magnitudes) * table.index_select(0, code)[:, None]
        error = (found - magnitudes).square_().sum(1)
        is_less = error < least
        least, best = torch.where(is_less, error, least), torch.where(is_less, code, best)
    return best.masked_fill_(~deviation.isfinite(), _NO_SCALE)


def _nearest(levels: Tensor) -> Tensor:
    """Return the nearest entry among the candidates of each row of levels [n, 4]: int32 [n]."""
    entries, candidates = book().float(), _candidates().index_select(0, _cells(levels))
    least, best = levels.new_full((len(levels),), torch.inf), candidates[:, 0]
    for index in candidates.unbind(1):
        distance = (entries.index_select(0, index) - levels).square_().sum(1)
        is_less = distance < least
        least, best = torch.where(is_less, distance, least), torch.where(is_less, index, best)
    return best


def _cells(levels: Tensor) -> Tensor:
    """Return the cell of each row of levels [n, 4]: int32 [n]."""
    first, second, third, fourth = (levels.int() >> _CELL_BITS).unbind(1)
    return ((first * _CELLS + second) * _CELLS + third) * _CELLS + fourth


@cache
def _candidates() -> Tensor:
    """Return the entries that are nearest to the middle of each cell, nearest first: int32 [cells, candidates]."""
    middles = torch.arange(_CELLS) * (1 << _CELL_BITS) + (1 << _CELL_BITS) / 2
    entries = book().float()
    half = entries.square().sum(1) / 2
    cells = torch.cartesian_prod(middles, middles, middles, middles).split(1 << 13)
    return torch.cat([(cell @ entries.T - half).topk(_CANDIDATES, 1).indices.int() for cell in cells])
