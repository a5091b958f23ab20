"""GPTQ checkpoints: `qweight` (values packed down the columns of W^T), `qzeros`, `scales` and `g_idx` per matrix.

Version 1 stores every zero point minus one, version 2 unchanged. With act-order, columns were quantized in order of
their importance. `g_idx` holds each column's group; specchat stores the columns group after group.

Source: GPTQ, arXiv 2210.17323; the file format of AutoGPTQ and GPTQModel.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import MIDDLE, Affine, num_groups, pack_nibbles, unpack_nibbles
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import (
    FLOATS,
    SchemeSettings,
    expect,
    fail_contents,
    fill,
    is_plain,
    refuse,
    words,
)

_ROWS = 1024  # rows transcoded at a time
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # amount subtracted from zero points
_SETTING_HINT = "correct quantization_config in config.json, or download config.json again"


@dataclass(frozen=True)
class GptqScheme:
    """Storage of matrices as config.json describes it.

    Attributes:
        bits: 4 or 8.
        group: columns per scale; None for whole rows.
        symmetric: whether all zero points are the middle value, so that none is stored.
        act_order: whether columns are out of order.
        less: amount subtracted from zero points before packing.
        overrides: regular expressions of modules that differ (GPTQModel's `dynamic`); the first match counts.
    """

    bits: int
    group: int | None
    symmetric: bool
    act_order: bool
    less: int
    overrides: tuple[tuple[str, "GptqScheme"], ...] = ()

    @classmethod
    def of(cls, settings: SchemeSettings) -> "GptqScheme":
        """Parse a quantization_config.

        Raises:
            CorruptCheckpointError: a value is invalid.
            UnsupportedModelError: the bits or the packing are not supported.
        """
        version = settings.text("checkpoint_format", settings.text("format", "gptq"))
        if version not in _VERSIONS:
            refuse(f"GPTQ in {version} packing")
        less = _VERSIONS[version]
        base = cls(_bits(settings), settings.group_size(), settings.flag("sym", True), False, less)
        base = replace(base, act_order=settings.flag("desc_act", False))
        # "-:" marks unquantized modules; their tensors show it too.
        overrides = tuple(
            (settings.check_pattern("dynamic", name.removeprefix("+:")), base._changed(own))
            for name, own in settings.objects("dynamic").items()
            if not name.startswith("-:")
        )
        return replace(base, overrides=overrides)

    def _changed(self, own: SchemeSettings) -> "GptqScheme":
        return replace(
            self,
            bits=_bits(own) if own.has("bits") else self.bits,
            group=own.group_size() if own.has("group_size") else self.group,
            symmetric=own.flag("sym", self.symmetric),
            act_order=own.flag("desc_act", self.act_order),
        )

    @property
    def name(self) -> str:
        """Name for users."""
        return f"gptq int{self.bits}"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        if is_plain(module, shape, tensors):
            return None
        (rows, cols), own = shape, self._own(module)
        groups = num_groups(cols, own.group)
        expect(module, tensors, "qweight", ("I32",), (words(own.bits, cols), rows))
        expect(module, tensors, "qzeros", ("I32",), (groups, words(own.bits, rows)))
        scales = expect(module, tensors, "scales", FLOATS, (groups, rows))
        if own._reorders:
            expect(module, tensors, "g_idx", ("I32",), (cols,))
        return Affine(own.bits, own.group, stored_torch_dtype(scales.dtype), not own.symmetric, own._reorders)

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        own = self._own(module)
        order = own._order(module, tensors["g_idx"].long()) if "g_idx" in tensors else None
        if order is not None and own._reorders:
            segments["order"].copy_(order)
        for begin in range(0, shape[0], _ROWS):
            packed = tensors["qweight"][:, begin : begin + _ROWS].t().contiguous().view(torch.uint8)
            copy_codes(packed, own.bits, order if own._reorders else None, segments["codes"][begin : begin + _ROWS])
        fill(segments["scales"], tensors["scales"].t())
        zeros = _zeros(tensors["qzeros"], own.bits, own.less)[:, : shape[0]]
        if own.symmetric:
            _check_middle(module, zeros, own.bits)
        else:
            segments["zeros"].copy_(zeros.t())

    @property
    def _reorders(self) -> bool:
        return self.act_order and self.group is not None

    def _own(self, module: str) -> "GptqScheme":
        """Return the storage of one module's matrix."""
        return next((own for pattern, own in self.overrides if re.match(pattern, module)), self)

    def _order(self, module: str, groups: Tensor) -> Tensor:
        """Return the columns, group after group, or fail if config.json does not announce their order."""
        order = group_order(module, "g_idx", groups, self.group)
        if not self._reorders and not torch.equal(order, torch.arange(len(order))):
            fail_contents(module, "g_idx", "is out of order, but desc_act is false", _SETTING_HINT)
        return order


def group_order(module: str, name: str, groups: Tensor, group: int | None) -> Tensor:
    """Return the columns, group after group, int64 [cols]: for groups = [1, 0, 1, 0] it is [1, 3, 0, 2].

    Args:
        module: path of the module, for messages.
        name: name of the tensor, for messages.
        groups: group of each column, int64 [cols].
        group: columns per group, the last one may be smaller; None for one group.

    Raises:
        CorruptCheckpointError: a group has the wrong number of columns.
    """
    order = groups.argsort(stable=True)
    expected = torch.arange(len(order)) // (group or len(order))
    if not torch.equal(groups[order], expected):
        fail_contents(module, name, f"does not put {group or len(order)} columns into each group")
    return order


def copy_codes(packed: Tensor, bits: int, order: Tensor | None, out: Tensor) -> None:
    """Convert packed values 0 .. 2^bits - 1 into the codes of `Affine`.

    Args:
        packed: packed values, uint8 [rows, >= cols * bits / 8], the low half of a byte first.
        bits: 4 or 8.
        order: column to store at each position, int64 [cols]; None for the original order.
        out: receives the codes.
    """
    if bits == 8:
        numbers = signed(packed[:, : out.shape[1]])
        out.copy_(numbers if order is None else numbers[:, order])
    elif order is None:
        out.copy_(packed[:, : out.shape[1]])
    else:
        pack_nibbles(unpack_nibbles(packed, len(order))[:, order].view(torch.uint8), out)


def signed(numbers: Tensor) -> Tensor:
    """Convert uint8 to int8 by subtracting 128."""
    return (numbers ^ 128).view(torch.int8)


def _bits(settings: SchemeSettings) -> int:
    bits = settings.integer("bits")
    if bits not in {4, 8}:
        refuse(f"GPTQ in {bits} bits")
    return bits


def _zeros(packed: Tensor, bits: int, less: int) -> Tensor:
    """Unpack `qzeros` into int8 [groups, rows], in the same range as the codes.

    A stored zero point of 0 minus one wraps to 15 (255) and back, as in AutoGPTQ.
    """
    numbers = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return signed(numbers + less)
    return (unpack_nibbles(numbers, 2 * numbers.shape[1]) + less) & 15


def _check_middle(module: str, zeros: Tensor, bits: int) -> None:
    if not bool((zeros == (MIDDLE if bits == 4 else 0)).all()):
        fail_contents(module, "qzeros", "is not symmetric, but sym is true", _SETTING_HINT)
