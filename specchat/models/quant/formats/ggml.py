"""Matrices in the blocks of GGUF files, whose bytes stay as they are in the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, PLAIN_TYPES
from specchat.models.checkpoint.layout import PIECE_NUMBERS
from specchat.models.quant.formats import ggml_compiled
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.formats.ggml_blocks import DECODERS
from specchat.models.quant.formats.ggml_codebooks import CODEBOOK_DECODERS
from specchat.models.quant.formats.ggml_kernels import tile_of_blocks, unpacked_blocks
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.triton import unpacking_kernels
from specchat.models.quant.kernels.unpacked import KINDS, Unpacked

_DECODERS = {**DECODERS, **CODEBOOK_DECODERS}


@dataclass(frozen=True)
class Blocks(WeightFormat):
    """Blocks of one of ggml's types; values are computed in float32 and rounded once.

    Segments: `blocks`, uint8 [rows, bytes per row].

    Attributes:
        kind: ggml's name of the type; F32, F16 and BF16 are blocks of one value.
        heads: number of attention heads whose two halves of rows are stored interleaved; 0 for rows in order.
    """

    name: ClassVar[str] = "ggml"
    verbatim: ClassVar[Mapping[str, str]] = {"blocks": "weight"}
    looks_up: ClassVar[bool] = True

    kind: str
    heads: int = 0

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segment that the class describes."""
        return (Segment("blocks", (rows, BLOCK_TYPES[self.kind].row_bytes(cols)), torch.uint8),)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what dequantizes the blocks."""
        ggml_compiled.prepare((self.kind,), dtype)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W; plain rows of the wanted dtype are a view."""
        blocks = segments["blocks"]
        order = stored_rows(blocks.shape[0], self.heads, begin, end, blocks.device) if self.heads else None
        blocks = blocks[begin:end] if order is None else blocks.index_select(0, order)
        if self.kind in PLAIN_TYPES:
            rows = blocks.view(stored_torch_dtype(self.kind))
            return rows if rows.dtype == out.dtype else out.copy_(rows)
        return decode(self.kind, blocks, out)

    def look_up(self, segments: Segments, rows: Tensor, out: Tensor) -> Tensor:
        """Dequantize some rows of W, of a matrix with rows in order."""
        assert not self.heads
        return self.dequantize({"blocks": segments["blocks"].index_select(0, rows)}, 0, len(rows), out)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """Return the kernels of `WeightFormat.kernels`, and those in Triton for the types that they can unpack."""
        ways = super().kernels(shape, num_rows, dtype, device)
        if self.kind not in KINDS:
            return ways
        return ways | unpacking_kernels(self.dequantize, self.unpack, self.order, num_rows, dtype, device)

    def tile_form(self, shape: tuple[int, int]) -> TileForm | None:
        """Return the form of types that the kernels can unpack, and of plain numbers."""
        if self.heads:
            return None
        if self.kind in PLAIN_TYPES:
            return TileForm("plain", scale_dtype=stored_torch_dtype(self.kind))
        return tile_of_blocks(self.kind) if self.kind in KINDS else None

    def unpack(self, segments: Segments, begin: int, end: int) -> Unpacked:
        """Return rows in stored order for the Triton kernels."""
        return unpacked_blocks(self.kind, segments["blocks"][begin:end])

    def order(self, segments: Segments) -> Tensor | None:
        """Return where each row is stored: int64 [rows]; None for rows in order."""
        blocks = segments["blocks"]
        return stored_rows(len(blocks), self.heads, 0, len(blocks), blocks.device) if self.heads else None


@dataclass(frozen=True)
class TiledHeads:
    """The order in which files hold the value heads of gated delta nets: the first ones of all key heads come first.

    Attributes:
        keys: number of key heads.
        per_key: number of value heads that belong to a key head.
        width: numbers of one value head.
        skip: numbers before the value heads, which stay in order.
    """

    keys: int
    per_key: int
    width: int
    skip: int = 0

    def stored(self, count: int, device: torch.device) -> Tensor:
        """Return where each of `count` rows or columns is stored: int64 [count]."""
        places = torch.arange(count, device=device)
        heads, within = (places - self.skip) // self.width, (places - self.skip) % self.width
        key, index = heads // self.per_key, heads % self.per_key
        moved = self.skip + (index * self.keys + key) * self.width + within
        return torch.where(places < self.skip, places, moved)


@dataclass(frozen=True)
class TiledBlocks(WeightFormat):
    """Blocks of a matrix whose rows or columns are in the order of `TiledHeads`.

    Columns are put in order after they are dequantized, since a block may hold columns of several heads.

    Segments: `blocks`, uint8 [rows, bytes per row].

    Attributes:
        kind: ggml's name of the type.
        heads: order of the rows, or of the columns.
        is_by_column: whether it is the order of the columns.
    """

    name: ClassVar[str] = "ggml tiled"
    verbatim: ClassVar[Mapping[str, str]] = {"blocks": "weight"}

    kind: str
    heads: TiledHeads
    is_by_column: bool

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segment that the class describes."""
        return Blocks(self.kind).segments(rows, cols)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what dequantizes the blocks."""
        ggml_compiled.prepare((self.kind,), dtype)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W."""
        blocks, plain = segments["blocks"], Blocks(self.kind)
        if self.is_by_column:
            stored = plain.dequantize(segments, begin, end, torch.empty_like(out))
            return out.copy_(stored.index_select(1, self.heads.stored(out.shape[1], out.device)))
        order = self.heads.stored(blocks.shape[0], blocks.device)[begin:end]
        return plain.dequantize({"blocks": blocks.index_select(0, order)}, 0, end - begin, out)


@dataclass(frozen=True)
class JoinedBlocks(WeightFormat):
    """The input projection of Qwen3-Next in blocks of two matrices: queries, keys and values, and gates.

    The model has the rows of each key head together: its query, its key, its values, and their gates.

    Segments: `first` and `second`, uint8 [rows, bytes per row].

    Attributes:
        first_kind: ggml's name of the type of queries, keys and values.
        second_kind: ggml's name of the type of gates.
        keys: number of key heads.
        key_width: rows of the key, and of the query, of a key head.
        value_width: rows of all values, and of all gates, of a key head.
    """

    name: ClassVar[str] = "ggml joined"
    verbatim: ClassVar[Mapping[str, str]] = {"first": "weight_first", "second": "weight_second"}

    first_kind: str
    second_kind: str
    keys: int
    key_width: int
    value_width: int

    @property
    def first_rows(self) -> int:
        """Rows of the first matrix."""
        return self.keys * (2 * self.key_width + self.value_width)

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        parts = (("first", self.first_kind, self.first_rows), ("second", self.second_kind, rows - self.first_rows))
        return tuple(Segment(name, (own, BLOCK_TYPES[kind].row_bytes(cols)), torch.uint8) for name, kind, own in parts)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what dequantizes the blocks."""
        ggml_compiled.prepare((self.first_kind, self.second_kind), dtype)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W, first those of the first matrix."""
        stored = self._stored(out.device)[begin:end]
        is_first = stored < self.first_rows
        for name, kind, own, rows in (
            ("first", self.first_kind, is_first, stored),
            ("second", self.second_kind, ~is_first, stored - self.first_rows),
        ):
            blocks = segments[name].index_select(0, rows[own])
            target = out.new_empty(len(blocks), out.shape[1])
            out[own] = Blocks(kind).dequantize({"blocks": blocks}, 0, len(blocks), target)
        return out

    def _stored(self, device: torch.device) -> Tensor:
        """Return where each row is stored, counted through both matrices: int64 [rows]."""
        widths = (self.key_width, self.key_width, self.value_width, self.value_width)
        rows = torch.arange(self.keys * sum(widths), device=device)
        parts = rows.split([self.keys * width for width in widths])
        return torch.cat([part.view(self.keys, -1) for part in parts], 1).flatten()


@dataclass(frozen=True)
class StackedBlocks(WeightFormat):
    """Two matrices of equal shapes in blocks, one below the other in the model: gate and up of Granite's shared expert.

    Segments: `top` and `bottom`, uint8 [rows / 2, bytes per row].

    Attributes:
        top_kind: ggml's name of the type of the first rows.
        bottom_kind: ggml's name of the type of the last rows.
    """

    name: ClassVar[str] = "ggml stacked"
    verbatim: ClassVar[Mapping[str, str]] = {"top": "weight_top", "bottom": "weight_bottom"}

    top_kind: str
    bottom_kind: str

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        return _halves({"top": self.top_kind, "bottom": self.bottom_kind}, rows, cols)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what dequantizes the blocks."""
        ggml_compiled.prepare((self.top_kind, self.bottom_kind), dtype)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W, first those of the top."""
        half = segments["top"].shape[0]
        for name, kind, offset in (("top", self.top_kind, 0), ("bottom", self.bottom_kind, half)):
            first, last = max(begin, offset), min(end, offset + half)
            if first < last:
                target, own = out[first - begin : last - begin], {"blocks": segments[name]}
                rows = Blocks(kind).dequantize(own, first - offset, last - offset, torch.empty_like(target))
                target.copy_(rows)
        return out


@dataclass(frozen=True)
class AlternatingBlocks(WeightFormat):
    """Two matrices in blocks whose rows alternate in one: gate and up of gpt-oss.

    Segments: `even` and `odd`, uint8 [rows / 2, bytes per row].

    Attributes:
        even_kind: ggml's name of the type of the even rows.
        odd_kind: ggml's name of the type of the odd rows.
    """

    name: ClassVar[str] = "ggml pairs"
    verbatim: ClassVar[Mapping[str, str]] = {"even": "weight_even", "odd": "weight_odd"}

    even_kind: str
    odd_kind: str

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments that the class describes."""
        return _halves({"even": self.even_kind, "odd": self.odd_kind}, rows, cols)

    def prepare(self, dtype: torch.dtype) -> None:
        """Compile what dequantizes the blocks."""
        ggml_compiled.prepare((self.even_kind, self.odd_kind), dtype)

    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize rows of W, first the even ones."""
        for first, name, kind in ((0, "even", self.even_kind), (1, "odd", self.odd_kind)):
            rows = slice((begin + 1 - first) // 2, (end + 1 - first) // 2)
            target = out[(begin + first) % 2 :: 2]
            own = {"blocks": segments[name]}
            target.copy_(Blocks(kind).dequantize(own, rows.start, rows.stop, torch.empty_like(target)))
        return out


def stored_rows(num_rows: int, heads: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Return where the rows begin .. end - 1 are stored: within a head, row i of half h is stored as row 2 i + h.

    Args:
        num_rows: rows of all heads.
        heads: number of heads.
        begin: first row.
        end: row after the last.
        device: device of the result, int64 [end - begin].
    """
    head_rows = num_rows // heads
    rows = torch.arange(begin, end, device=device)
    within = rows % head_rows
    half, index = within // (head_rows // 2), within % (head_rows // 2)
    return rows - within + 2 * index + half


def decode(kind: str, rows: Tensor, out: Tensor) -> Tensor:
    """Dequantize rows of blocks: by compiled functions, or by torch in pieces that a CPU's cache holds.

    Args:
        kind: ggml's name of the type; not a plain one.
        rows: rows of blocks, uint8 [n, bytes per row].
        out: contiguous memory [n, cols] of any float dtype.

    Returns:
        `out`, filled.
    """
    if out.device.type == "cpu" and ggml_compiled.fill(kind, rows, out):
        return out
    return decode_by_torch(kind, rows, out)


def decode_by_torch(kind: str, rows: Tensor, out: Tensor) -> Tensor:
    """Dequantize rows of blocks as `decode`, by operators of torch."""
    block, decoder, cols = BLOCK_TYPES[kind], _DECODERS[kind], out.shape[1]
    step = max(PIECE_NUMBERS[out.device.type] // 2 // cols, 1)
    is_wide = out.dtype == torch.float32
    scratch = out if is_wide else torch.empty(min(step, len(out)), cols, device=out.device)
    for begin in range(0, len(out), step):
        piece = out[begin : begin + step]
        values = piece if is_wide else scratch[: len(piece)]
        decoder(rows[begin : begin + step].reshape(-1, block.nbytes), values.view(-1, block.numbers))
        if not is_wide:
            piece.copy_(values)
    return out


def _halves(kinds: Mapping[str, str], rows: int, cols: int) -> tuple[Segment, ...]:
    """Return the segments of two matrices that have half of the rows each, by name and ggml's name of the type."""
    return tuple(
        Segment(name, (rows // 2, BLOCK_TYPES[kind].row_bytes(cols)), torch.uint8) for name, kind in kinds.items()
    )
