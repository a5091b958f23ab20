"""4-bit floats in checkpoints: tensors that several schemes share, gpt-oss (MXFP4) and modelopt (NVFP4 with FP8)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import num_groups
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.fp4 import MxFp4, NvFp4
from specchat.models.quant.formats.fp8 import Fp8
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import (
    FLOATS,
    SchemeSettings,
    check_fp8,
    expect,
    fail_contents,
    fill,
    is_plain,
    refuse,
)

_BYTES = ("U8", "F4")
_EXPONENTS = ("U8", "F8_E8M0")
_FP8_BLOCK = 128


def packed_fp4(
    module: str,
    shape: tuple[int, int],
    tensors: Mapping[str, TensorInfo],
    codes: str,
    whole: str | None,
    *,
    divides: bool,
) -> WeightFormat:
    """Return the format of a matrix in MXFP4 or NVFP4.

    Args:
        module: path of the matrix, for messages.
        shape: (rows, cols) of the matrix.
        tensors: headers of the module's tensors.
        codes: name of the tensor with two codes per byte.
        whole: name of the scale of the whole matrix; None for MXFP4, which has none.
        divides: whether scales are divided by that scale.
    """
    rows, cols = shape
    expect(module, tensors, codes, _BYTES, (rows, cols // 2))
    if whole is None:
        expect(module, tensors, "weight_scale", _EXPONENTS, (rows, num_groups(cols, MxFp4.group)))
        return MxFp4()
    expect(module, tensors, "weight_scale", ("F8_E4M3",), (rows, num_groups(cols, NvFp4.group)))
    expect(module, tensors, whole, ("F32",), (), (1,))
    return NvFp4(divides)


def fill_fp4(module: str, tensors: Mapping[str, Tensor], segments: Segments, codes: str, whole: str | None) -> None:
    """Fill the segments of a matrix in MXFP4 or NVFP4; names as for `packed_fp4`."""
    segments["codes"].copy_(tensors[codes].view(torch.uint8).reshape(segments["codes"].shape))
    scales = tensors["weight_scale"]
    if whole is None:
        segments["scales"].copy_(scales.view(torch.uint8))
        return
    if bool(((scales.view(torch.uint8) & 127) == 127).any()):
        fail_contents(module, "weight_scale", "contains NaN")
    segments["scales"].copy_(scales)
    fill(segments["tensor_scale"], tensors[whole])


@dataclass(frozen=True)
class GptOssScheme:
    """Storage of gpt-oss: experts in MXFP4, all experts of a layer in one stack; other matrices are plain."""

    @classmethod
    def of(cls, _: SchemeSettings) -> "GptOssScheme":
        """Return the scheme; its settings only name plain modules, which their tensors tell."""
        return cls()

    @property
    def name(self) -> str:
        """Name for users."""
        return "mxfp4"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        if is_plain(module, shape, tensors):
            return None
        rows, cols = shape
        groups = num_groups(cols, MxFp4.group)
        expect(module, tensors, "blocks", _BYTES, (rows, groups, MxFp4.group // 2))
        expect(module, tensors, "scales", _EXPONENTS, (rows, groups))
        return MxFp4()

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        fill(segments["codes"], tensors["blocks"].view(torch.uint8))
        fill(segments["scales"], tensors["scales"].view(torch.uint8))


@dataclass(frozen=True)
class ModeloptScheme:
    """Storage of NVIDIA's modelopt: NVFP4, FP8 and plain matrices side by side, told apart by their tensors."""

    algorithm: str

    @classmethod
    def of(cls, settings: SchemeSettings) -> "ModeloptScheme":
        """Parse a quantization_config, or the quantization of hf_quant_config.json."""
        return cls(settings.text("quant_algo", "mixed"))

    @property
    def name(self) -> str:
        """Name for users."""
        return f"modelopt {self.algorithm.replace('mixed_precision', 'mixed')}"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`.

        Raises:
            UnsupportedModelError: activations are scaled too, as in AWQ.
        """
        if is_plain(module, shape, tensors):
            return None
        if "pre_quant_scale" in tensors or "weight_svd_down" in tensors:
            refuse("modelopt with AWQ or SVD")
        if "weight_scale_2" in tensors:
            return packed_fp4(module, shape, tensors, "weight", "weight_scale_2", divides=False)
        expect(module, tensors, "weight", ("F8_E4M3",), shape)
        blocks = num_groups(shape[0], _FP8_BLOCK), num_groups(shape[1], _FP8_BLOCK)
        wide = (blocks[0], 1, blocks[1], 1)  # as modelopt shapes them
        scale = expect(module, tensors, "weight_scale", FLOATS, (), (1,), blocks, wide)
        size = _FP8_BLOCK if len(scale.shape) > 1 else None
        return Fp8(size, size, torch.float32)

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        if "weight_scale_2" in tensors:
            fill_fp4(module, tensors, segments, "weight", "weight_scale_2")
            return
        check_fp8(module, tensors["weight"])
        segments["codes"].copy_(tensors["weight"])
        fill(segments["scales"], tensors["weight_scale"])
