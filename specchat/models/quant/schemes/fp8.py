"""FP8 checkpoints with a scale per block (DeepSeek-V3, Qwen3-FP8): `weight` and `weight_scale_inv`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import num_groups
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.fp8 import Fp8
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import FLOATS, SchemeSettings, check_fp8, expect, fill, is_plain, refuse


@dataclass(frozen=True)
class BlockFp8Scheme:
    """Storage of matrices as config.json describes it.

    Attributes:
        block: rows and columns that share a scale, fewer at the edges; None for one scale per matrix.
    """

    block: tuple[int, int] | None

    @classmethod
    def of(cls, settings: SchemeSettings) -> "BlockFp8Scheme":
        """Parse a quantization_config.

        Raises:
            CorruptCheckpointError: a value is invalid.
            UnsupportedModelError: the values or scales have an unsupported type.
        """
        if settings.text("fmt", "e4m3") != "e4m3":
            refuse(f"FP8 in {settings.text('fmt', '')} values")
        if settings.text("scale_fmt", "float") != "float" or settings.text("expert_dtype", "fp8") != "fp8":
            refuse("FP8 with scales that are powers of two, or with FP4 experts")
        block = settings.integers("weight_block_size", 2)
        return cls(None if block is None else (block[0], block[1]))

    @property
    def name(self) -> str:
        """Name for users."""
        return "fp8"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        if is_plain(module, shape, tensors):
            return None
        expect(module, tensors, "weight", ("F8_E4M3",), shape)
        rows, cols = self.block or (None, None)
        blocks = (num_groups(shape[0], rows), num_groups(shape[1], cols))
        expect(module, tensors, "weight_scale_inv", FLOATS, blocks, *([(), (1,)] if self.block is None else []))
        return Fp8(rows, cols, torch.float32)  # computed in float32 for every dtype of the scales

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        check_fp8(module, tensors["weight"])
        segments["codes"].copy_(tensors["weight"])
        fill(segments["scales"], tensors["weight_scale_inv"])
