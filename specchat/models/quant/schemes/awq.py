"""AWQ checkpoints ("gemm" packing): `scales`, and `qweight` and `qzeros` packed along the rows of W, interleaved.

Source: AWQ, arXiv 2306.00978; the file format of AutoAWQ.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import Affine, num_groups, pack_nibbles, unpack_nibbles
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import FLOATS, SchemeSettings, expect, fill, is_plain, refuse, words

_BITS = 4
_PER_WORD = 8  # values in a word of 32 bits
# For each value of a word, the half byte that holds the value; 0 is the lowest half byte.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
_WORDS = 128  # words of each row of W^T per transcoding step


@dataclass(frozen=True)
class AwqScheme:
    """Storage of matrices as config.json describes it.

    Attributes:
        group: columns per scale; None for whole rows.
    """

    group: int | None

    @classmethod
    def of(cls, settings: SchemeSettings) -> "AwqScheme":
        """Parse a quantization_config.

        Raises:
            CorruptCheckpointError: a value is invalid.
            UnsupportedModelError: the bits or the packing are not supported.
        """
        version = settings.text("version", settings.text("format", "gemm"))
        if version != "gemm":
            refuse(f"AWQ in {version} packing")
        bits = settings.integer("bits", _BITS)
        if bits != _BITS:
            refuse(f"AWQ in {bits} bits")
        return cls(settings.group_size())

    @property
    def name(self) -> str:
        """Name for users."""
        return "awq int4"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        if is_plain(module, shape, tensors):
            return None
        rows, cols = shape
        groups, packed_rows = num_groups(cols, self.group), words(_BITS, rows)
        expect(module, tensors, "qweight", ("I32",), (cols, packed_rows))
        expect(module, tensors, "qzeros", ("I32",), (groups, packed_rows))
        scales = expect(module, tensors, "scales", FLOATS, (groups, rows))
        return Affine(_BITS, self.group, stored_torch_dtype(scales.dtype), zeros=True)

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        qweight, rows = tensors["qweight"], shape[0]
        for word in range(0, qweight.shape[1], _WORDS):
            numbers = _unpack(qweight[:, word : word + _WORDS]).t()  # [rows of W, cols]
            begin = word * _PER_WORD
            out = segments["codes"][begin : begin + numbers.shape[0]]
            pack_nibbles(numbers[: out.shape[0]].contiguous().view(torch.uint8), out)
        segments["zeros"].copy_(_unpack(tensors["qzeros"])[:, :rows].t())
        fill(segments["scales"], tensors["scales"].t())


def _unpack(packed: Tensor) -> Tensor:
    """Unpack int32 [n, w] into int8 [n, 8 w]."""
    count = _PER_WORD * packed.shape[1]
    halves = unpack_nibbles(packed.contiguous().view(torch.uint8), count)
    return halves.view(-1, packed.shape[1], _PER_WORD)[:, :, _PLACES].reshape(-1, count)
