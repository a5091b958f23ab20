"""compressed-tensors checkpoints: int4 and int8 packed into words, plain int8, FP8 and FP4; by groups, rows or blocks.

specchat reads quantized weights only: activations stay in full precision, whatever the file says about them.

Source: the file format of the compressed-tensors library.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import MIDDLE, Affine, num_groups, unpack_nibbles
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.fp4 import MxFp4, NvFp4
from specchat.models.quant.formats.fp8 import Fp8
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.fp4 import fill_fp4, packed_fp4
from specchat.models.quant.schemes.gptq import copy_codes, group_order, signed
from specchat.models.quant.schemes.settings import (
    FLOATS,
    SchemeSettings,
    check_fp8,
    expect,
    fail_contents,
    fill,
    is_plain,
    refuse,
    words,
)

_ROWS = 1024  # rows transcoded at a time
_FORMATS = {
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
}
_STRATEGIES = {"tensor", "channel", "group", "tensor_group", "block"}
_WHOLE = "weight_global_scale"  # of NVFP4


@dataclass(frozen=True)
class _Numbers:
    """Storage of the weights of one config group.

    Attributes:
        kind: integers or floats (e4m3).
        bits: 4 or 8.
        symmetric: whether there are no zero points.
        rows: number of rows that share a scale, None for all.
        cols: number of columns that share a scale, None for all.
        act_order: whether the groups' columns are out of order.
    """

    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    rows: int | None
    cols: int | None
    act_order: bool

    @property
    def is_fp4(self) -> bool:
        """Whether the weights are MXFP4 or NVFP4."""
        return self.kind == "float" and self.bits == 4

    @classmethod
    def of(cls, weights: SchemeSettings) -> "_Numbers":
        kind, bits = weights.text("type", "int"), weights.integer("num_bits", 8)
        if (kind, bits) not in {("int", 4), ("int", 8), ("float", 8), ("float", 4)}:
            refuse(f"compressed-tensors in {bits}-bit {kind} values")
        symmetric = weights.flag("symmetric", True)
        if kind == "float" and not symmetric:
            refuse("compressed-tensors in floats with zero points")
        rows, cols = _extent(weights)
        if kind == "float" and bits == 4 and cols not in (MxFp4.group, NvFp4.group):
            refuse(f"compressed-tensors in 4-bit floats with scales for {cols} columns")
        if rows is not None and rows != 1 and kind == "int":
            refuse("compressed-tensors in blocks of integers")
        return cls("int" if kind == "int" else "float", bits, symmetric, rows, cols, _act_order(weights))


def _act_order(weights: SchemeSettings) -> bool:
    """Return whether columns are out of order in the file; "weight" and "static" only tell how it was made."""
    order = weights.flag("actorder", False) if weights.is_flag("actorder") else weights.text("actorder", "weight")
    return order in {True, "group", "dynamic"}


def _extent(weights: SchemeSettings) -> tuple[int | None, int | None]:
    """Return the numbers of rows and columns that share a scale; None for all."""
    group = weights.group_size()
    strategy = weights.text("strategy", "group" if group else "channel" if weights.has("group_size") else "tensor")
    is_fp4 = (weights.text("type", "int"), weights.integer("num_bits", 8)) == ("float", 4)
    if strategy not in _STRATEGIES or (strategy == "tensor_group" and not is_fp4):
        refuse(f"compressed-tensors by {strategy}")
    if strategy == "group" and group is None:
        weights.fail("group_size", None, "a number of columns")
    if strategy == "block":
        block = weights.integers("block_structure", 2)
        if block is None:
            weights.fail("block_structure", None, "rows and columns of a block")
        return block[0], block[1]
    extents = {"tensor": (None, None), "channel": (1, None), "group": (1, group), "tensor_group": (1, group)}
    return extents[strategy]


@dataclass(frozen=True)
class CompressedScheme:
    """Storage of matrices as config.json describes it.

    Attributes:
        groups: regular expressions of modules with their storage; the first match counts.
    """

    groups: tuple[tuple[str, _Numbers], ...]

    @classmethod
    def of(cls, settings: SchemeSettings) -> "CompressedScheme":
        """Parse a quantization_config.

        Raises:
            CorruptCheckpointError: a value is invalid.
            UnsupportedModelError: the values have another type, or weights are sparse or rotated.
        """
        if settings.text("format", "pack-quantized") not in _FORMATS:
            refuse(f"compressed-tensors in {settings.text('format', '')} packing")
        if settings.text("quantization_status", "compressed") != "compressed":
            refuse("compressed-tensors settings for weights that were not compressed")
        for name, what in (("sparsity_config", "sparse"), ("transform_config", "rotated")):
            child = settings.child(name)
            if child is not None and (child.objects("config_groups") or child.text("format", "dense") != "dense"):
                refuse(f"compressed-tensors with {what} weights")
        found = []
        for group in settings.objects("config_groups").values():
            weights = group.child("weights")
            if group.text("format", "pack-quantized") not in _FORMATS:
                refuse(f"compressed-tensors in {group.text('format', '')} packing")
            if weights is not None:
                numbers = _Numbers.of(weights)
                found += [(group.check_pattern("targets", target), numbers) for target in group.strings("targets")]
        if not found:
            settings.fail("config_groups", None, "groups of modules and their weights")
        # Names, then regular expressions, then classes, as in the library. All matrices here are "Linear".
        return cls(tuple((_pattern(target), numbers) for target, numbers in sorted(found, key=_specificity)))

    @property
    def name(self) -> str:
        """Name for users."""
        kinds = {f"{'int' if numbers.kind == 'int' else 'fp'}{numbers.bits}" for _, numbers in self.groups}
        return f"compressed-tensors {' + '.join(sorted(kinds))}"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        if is_plain(module, shape, tensors):
            return None
        own = self._own(module)
        if own.is_fp4:
            whole = None if own.cols == MxFp4.group else _WHOLE
            return packed_fp4(module, shape, tensors, "weight_packed", whole, divides=True)
        scale_shapes = _scale_shapes(own, shape)
        dtype = stored_torch_dtype(expect(module, tensors, "weight_scale", FLOATS, *scale_shapes).dtype)
        if own.kind == "float":
            expect(module, tensors, "weight", ("F8_E4M3",), shape)
            return Fp8(own.rows, own.cols, dtype)
        if "weight_packed" not in tensors:
            expect(module, tensors, "weight", ("I8",), shape)
            if not own.symmetric:
                expect(module, tensors, "weight_zero_point", ("I8",), *scale_shapes)
            return Affine(8, own.cols, dtype, not own.symmetric)
        rows, cols = shape
        expect(module, tensors, "weight_packed", ("I32",), (rows, words(own.bits, cols)))
        if not own.symmetric:
            packed = (words(own.bits, rows), num_groups(cols, own.cols))
            expect(module, tensors, "weight_zero_point", ("I32", "I8"), packed, *scale_shapes)
        reordered = own.cols is not None and (own.act_order or "weight_g_idx" in tensors)
        if reordered:
            expect(module, tensors, "weight_g_idx", ("I32", "I64"), (cols,))
        return Affine(own.bits, own.cols, dtype, not own.symmetric, reordered)

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        own = self._own(module)
        if own.is_fp4:
            fill_fp4(module, tensors, segments, "weight_packed", None if own.cols == MxFp4.group else _WHOLE)
            return
        scales = tensors["weight_scale"]
        if own.kind == "float":
            check_fp8(module, tensors["weight"])
            segments["codes"].copy_(tensors["weight"])
            fill(segments["scales"], scales)
            return
        segments["scales"].copy_(scales.expand_as(segments["scales"]) if scales.numel() == 1 else _2d(scales))
        if "weight_packed" in tensors:
            _check_shape(module, shape, tensors)
            self._copy_packed(module, own, tensors, segments)
        else:
            segments["codes"].copy_(tensors["weight"])
        if not own.symmetric:
            _copy_zeros(own.bits, tensors, segments["zeros"])

    def _copy_packed(self, module: str, own: _Numbers, tensors: Mapping[str, Tensor], segments: Segments) -> None:
        order = None
        if "order" in segments:
            groups = tensors["weight_g_idx"].long()
            unset = bool((groups == -1).all())
            order = torch.arange(len(groups)) if unset else group_order(module, "weight_g_idx", groups, own.cols)
            segments["order"].copy_(order)
        packed = tensors["weight_packed"].contiguous().view(torch.uint8)
        for begin in range(0, packed.shape[0], _ROWS):
            end = begin + _ROWS
            copy_codes(packed[begin:end], own.bits, order, segments["codes"][begin:end])

    def _own(self, module: str) -> _Numbers:
        """Return the storage of one module's weights, or fail if no config group matches."""
        for pattern, numbers in self.groups:
            if re.match(pattern, module):
                return numbers
        return fail_contents(module, "weight", "is quantized, but no config group describes it")


def _specificity(target: tuple[str, _Numbers]) -> tuple[bool, bool, str]:
    name = target[0]
    return name == "Linear", name.startswith("re:"), name


def _pattern(target: str) -> str:
    """Convert a target to a regular expression of modules."""
    if target == "Linear":
        return ""
    return target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$"


def _scale_shapes(own: _Numbers, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that scales may have."""
    rows, cols = num_groups(shape[0], own.rows), num_groups(shape[1], own.cols)
    if rows == cols == 1:
        return (), (1,), (1, 1)
    return ((rows, 1), (rows,)) if cols == 1 else ((rows, cols),)


def _2d(numbers: Tensor) -> Tensor:
    return numbers if numbers.dim() == 2 else numbers.unsqueeze(1)


def _check_shape(module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        fail_contents(module, "weight_shape", f"is not {list(shape)}, the shape in the configuration")


def _copy_zeros(bits: int, tensors: Mapping[str, Tensor], zeros: Tensor) -> None:
    """Copy zero points, plain or packed along the rows, in the same range as the codes."""
    stored = tensors["weight_zero_point"]
    if stored.dtype == torch.int32:
        rows = zeros.shape[0]
        packed = stored.t().contiguous().view(torch.uint8)  # [groups, rows * bits / 8]
        numbers = signed(packed[:, :rows]) if bits == 8 else unpack_nibbles(packed, 2 * packed.shape[1])[:, :rows]
        zeros.copy_(numbers.t())
    else:
        numbers = stored.expand_as(zeros) if stored.numel() == 1 else _2d(stored)
        zeros.copy_(numbers if bits == 8 or "weight_packed" not in tensors else numbers + MIDDLE)
