"""Matrices in MXFP4 and NVFP4 as checkpoints store them, packed and unpacked value by value."""

from __future__ import annotations

import torch
from torch import Tensor

from support.quantized import Kind, Tensors

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def codes_of(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest codes, uint8 [rows, cols], for scales [rows, groups]."""
    scaled = weight / scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    nearest = (scaled.abs()[..., None] - torch.tensor(VALUES)).abs().argmin(-1)
    return (nearest + 8 * (scaled < 0)).to(torch.uint8)


def two_per_byte(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous()


def values_of(packed: Tensor, scales: Tensor) -> Tensor:
    """Values of bytes [rows, cols / 2] times float32 scales [rows, groups], one at a time."""
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    out, group = torch.empty(rows, cols), cols // scales.shape[1]
    for i, row in enumerate(packed.tolist()):
        for j in range(cols):
            code = row[j // 2] >> 4 * (j % 2) & 15
            out[i, j] = (-1 if code & 8 else 1) * VALUES[code & 7] * scales[i, j // group]
    return out


def exponents_of(weight: Tensor) -> Tensor:
    """uint8 exponents [rows, cols / 32], so that the largest value of a group is at most 6 times a power of two."""
    largest = weight.view(weight.shape[0], -1, 32).abs().amax(-1).clamp(min=1e-9)
    return ((largest / 6).log2().ceil() + 127).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    return torch.tensor([[2.0 ** (e - 127) for e in row] for row in exponents.tolist()])


def nv_scales(weight: Tensor, whole: float) -> Tensor:
    """e4m3 scales [rows, cols / 16] that are multiplied by `whole`."""
    largest = weight.view(weight.shape[0], -1, 16).abs().amax(-1)
    return (largest / 6 / whole).clamp(min=2**-6).to(torch.float8_e4m3fn)


def _compressed(layout: str, group: int, strategy: str) -> dict:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


def mxfp4() -> Kind:
    """compressed-tensors' MXFP4."""

    def pack(weight: Tensor, _: int) -> Tensors:
        exponents = exponents_of(weight)
        return {"weight_packed": two_per_byte(codes_of(weight, powers(exponents))), "weight_scale": exponents}

    def unpack(tensors: Tensors, _: tuple[int, int]) -> Tensor:
        return values_of(tensors["weight_packed"], powers(tensors["weight_scale"]))

    return Kind("ct-mxfp4", _compressed("mxfp4-pack-quantized", 32, "group"), pack, unpack)


def nvfp4(whole: float = 96.7) -> Kind:
    """compressed-tensors' NVFP4, whose scales are divided by the scale of the whole matrix."""

    def pack(weight: Tensor, _: int) -> Tensors:
        scales = nv_scales(weight, 1 / whole)
        return {
            "weight_packed": two_per_byte(codes_of(weight, scales.float() / whole)),
            "weight_scale": scales,
            "weight_global_scale": torch.tensor([whole]),
            "input_global_scale": torch.tensor([3.0]),
        }

    def unpack(tensors: Tensors, _: tuple[int, int]) -> Tensor:
        scales = tensors["weight_scale"].float() / tensors["weight_global_scale"]
        return values_of(tensors["weight_packed"], scales)

    return Kind("ct-nvfp4", _compressed("nvfp4-pack-quantized", 16, "tensor_group"), pack, unpack)


def modelopt(whole: float = 0.011) -> Kind:
    """modelopt's NVFP4, whose scales are multiplied by the scale of the whole matrix."""

    def pack(weight: Tensor, _: int) -> Tensors:
        scales = nv_scales(weight, whole)
        return {
            "weight": two_per_byte(codes_of(weight, scales.float() * whole)),
            "weight_scale": scales,
            "weight_scale_2": torch.tensor(whole),
            "input_scale": torch.tensor(0.5),
        }

    def unpack(tensors: Tensors, _: tuple[int, int]) -> Tensor:
        return values_of(tensors["weight"], tensors["weight_scale"].float() * tensors["weight_scale_2"])

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Kind("modelopt-nvfp4", config, pack, unpack)


def modelopt_fp8(block: int | None = None) -> Kind:
    """modelopt's FP8 beside NVFP4: one scale, or one per block of 128 x 128."""

    def pack(weight: Tensor, _: int) -> Tensors:
        if block is None:
            scale = weight.abs().max() / 448
            return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        rows, cols = (-(-size // block) for size in weight.shape)
        scale = torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) + 0.5
        spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
        return {"weight": (weight / spread).to(torch.float8_e4m3fn), "weight_scale": scale.view(rows, 1, cols, 1)}

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        scale = tensors["weight_scale"]
        if scale.ndim:
            scale = scale.view(scale.shape[0], scale.shape[2])
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
        return tensors["weight"].float() * scale

    return Kind("modelopt-fp8", {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, pack, unpack)
