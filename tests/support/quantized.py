"""Quantized matrices and checkpoints as other programs write them, made from random weights, and what they mean.

compressed-tensors and bitsandbytes pack and unpack themselves here. GPTQ, AWQ and FP8 blocks are packed and unpacked
number by number, as their formats are described; nothing here shares code with specchat.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specchat.records.model import ModelSource
from support.tiny_models import save

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One way to quantize.

    Attributes:
        name: for test ids.
        config: the quantization_config.
        pack: a matrix [rows, cols] of float32 and a seed -> its tensors by suffix.
        unpack: these tensors and the shape -> the matrix they mean.
    """

    name: str
    config: dict[str, Any]
    pack: Callable[[Tensor, int], Tensors]
    unpack: Callable[[Tensors, tuple[int, int]], Tensor]


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def gptq(
    bits: int = 4, group: int = 32, *, sym: bool = False, act_order: bool = False, version: int = 1, dtype: Any = None
) -> Kind:
    less = 1 if version == 1 else 0
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }

    def pack(weight: Tensor, seed: int) -> Tensors:
        cols = weight.shape[1]
        size = cols if group == -1 else group
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(seed)) if act_order else torch.arange(cols)
        groups = torch.empty(cols, dtype=torch.int64)
        groups[order] = torch.arange(cols) // size
        q, scale, zero = round_to_groups(weight, groups, bits, sym, dtype or torch.float16)
        stored = (zero - less) % 2**bits
        return {
            "qweight": pack_words(q.t(), bits, 0),
            "qzeros": pack_words(stored.t(), bits, 1),
            "scales": scale.t().contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        rows, cols = shape
        words, zero_words, mask = tensors["qweight"].tolist(), tensors["qzeros"].tolist(), 2**bits - 1
        per_word = 32 // bits
        groups = tensors["g_idx"].tolist()
        steps = torch.empty(shape)
        for n in range(rows):
            for k in range(cols):
                q = words[k // per_word][n] >> (bits * (k % per_word)) & mask
                zero = zero_words[groups[k]][n // per_word] >> (bits * (n % per_word)) & mask
                steps[n, k] = q - ((zero + less) & mask)
        scales = tensors["scales"].t()[:, groups]
        return steps.to(scales.dtype) * scales

    name = f"gptq{bits}-v{version}-g{group}" + "-sym" * sym + "-act" * act_order
    return Kind(name, config, pack, unpack)


def round_to_groups(
    weight: Tensor, groups: Tensor, bits: int, sym: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0 .. 2^bits - 1 [rows, cols], scales and zero points [rows, groups]."""
    largest = 2**bits - 1
    q = torch.empty(weight.shape, dtype=torch.int64)
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / largest).to(dtype)
        zero = torch.full_like(low, (largest + 1) / 2) if sym else (-low / scale.float()).round()
        zero = zero.clamp(0, largest).to(torch.int64)
        q[:, groups == group] = ((part / scale.float()[:, None]).round() + zero[:, None]).clamp(0, largest).long()
        scales.append(scale)
        zeros.append(zero)
    return q, torch.stack(scales, 1), torch.stack(zeros, 1)


def pack_words(numbers: Tensor, bits: int, dim: int, order: list[int] | None = None) -> Tensor:
    """Puts 32 / bits numbers into each int32, the first lowest, along a dimension of a matrix."""
    if dim == 0:
        return pack_words(numbers.t(), bits, 1).t().contiguous()
    per_word = 32 // bits
    order = order or list(range(per_word))
    rows = []
    for row in numbers.tolist():
        words = []
        for begin in range(0, len(row), per_word):
            word = 0
            for place, column in enumerate(order):
                if begin + column < len(row):
                    word |= row[begin + column] << (bits * place)
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


# --- AWQ -------------------------------------------------------------------------------------------------------------

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each half byte of a word is of, lowest first


def awq(group: int = 32, skip: list[str] | None = None) -> Kind:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skip,
    }

    def pack(weight: Tensor, seed: int) -> Tensors:
        size = weight.shape[1] if group == -1 else group
        groups = torch.arange(weight.shape[1]) // size
        q, scale, zero = round_to_groups(weight, groups, 4, False, torch.float16)
        return {
            "qweight": pack_words(q.t(), 4, 1, AWQ_ORDER),
            "qzeros": pack_words(zero.t(), 4, 1, AWQ_ORDER),
            "scales": scale.t().contiguous(),
        }

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        rows, cols = shape
        size = cols if group == -1 else group
        steps = torch.empty(shape)
        words, zero_words = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
        for n in range(rows):
            shift = 4 * AWQ_ORDER.index(n % 8)
            for k in range(cols):
                steps[n, k] = (words[k][n // 8] >> shift & 15) - (zero_words[k // size][n // 8] >> shift & 15)
        scales = tensors["scales"].t().repeat_interleave(size, 1)[:, :cols]
        return steps.half() * scales

    return Kind(f"awq-g{group}", config, pack, unpack)


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(
    layout: str,
    *,
    bits: int = 4,
    strategy: str = "group",
    group: int | None = None,
    block: list[int] | None = None,
    sym: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    dynamic: bool = True,
    ignore: list[str] | None = None,
) -> Kind:
    """`layout`: pack-quantized, int-quantized or float-quantized."""
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "float" if layout == "float-quantized" else "int",
        "symmetric": sym,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }
    if block:
        weights["block_structure"] = block
    inputs = None
    if layout != "pack-quantized":
        inputs = {"num_bits": 8, "type": weights["type"], "dynamic": dynamic, "symmetric": True}
        inputs["strategy"] = "token" if dynamic else "tensor"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    stored = {**weights, "actorder": "group" if act_order else None}
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"] if ignore is None else ignore,
        "config_groups": {"group_0": {**scheme, "weights": stored}},
    }
    name = f"ct-{layout}-{bits}-{strategy}{group or block or ''}" + "-asym" * (not sym) + "-act" * act_order
    name = name.replace(" ", "") + f"-{str(dtype).removeprefix('torch.')}"

    def library() -> tuple[Any, Any]:
        from compressed_tensors.compressors.base import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        return BaseCompressor.get_value_from_registry(layout), QuantizationScheme(**scheme)

    def pack(weight: Tensor, seed: int) -> Tensors:
        compressor, args = library()
        order = torch.arange(weight.shape[1])
        if act_order:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        scale, zero = observe(weight[:, order], args.weights, dtype)
        state = {"weight": weight[:, order].to(dtype), "weight_scale": scale}
        if zero is not None:
            state["weight_zero_point"] = zero
        packed = compressor.compress(state, args)
        if act_order:  # the library dropped it in 2026: columns in their own order, each with the group it belongs to
            packed["weight_packed"] = shuffle_packed(packed["weight_packed"], order, bits, weight.shape)
            groups = torch.empty(len(order), dtype=torch.int32)
            groups[order] = (torch.arange(len(order)) // group).to(torch.int32)
            packed["weight_g_idx"] = groups
        if not dynamic and inputs:
            packed["input_scale"] = torch.tensor([0.5], dtype=dtype)
        return {name: tensor.contiguous() for name, tensor in packed.items()}

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        compressor, args = library()
        state = {name: tensor for name, tensor in tensors.items() if name not in ("weight_g_idx", "input_scale")}
        if not act_order:
            return compressor.decompress(state, args)["weight"]
        order = tensors["weight_g_idx"].argsort(stable=True)
        state["weight_packed"] = shuffle_packed(state["weight_packed"], order.argsort(), bits, shape)
        out = torch.empty(shape, dtype=tensors["weight_scale"].dtype)
        out[:, order] = compressor.decompress(state, args)["weight"]
        return out

    return Kind(name, config, pack, unpack)


def shuffle_packed(packed: Tensor, order: Tensor, bits: int, shape: Any) -> Tensor:
    """Packed columns, the first put in place order[0], and so on."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    numbers = unpack_from_int32(packed, bits, torch.Size(shape))
    out = torch.empty_like(numbers)
    out[:, order] = numbers
    return pack_to_int32(out, bits)


def observe(weight: Tensor, args: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points for asymmetric numbers, from the smallest and largest number of each extent."""
    rows, cols = weight.shape
    height = {"tensor": rows, "channel": 1, "group": 1, "block": (args.block_structure or [0])[0]}[args.strategy]
    width = {"group": args.group_size, "block": (args.block_structure or [0, 0])[-1]}.get(args.strategy, cols)
    low = torch.stack([blocks.amin((1, 2)) for blocks in extents(weight, height, width)]).clamp(max=0)
    high = torch.stack([blocks.amax((1, 2)) for blocks in extents(weight, height, width)]).clamp(min=0)
    if args.type == "float":
        scale, zero = torch.maximum(high, -low) / 448, None
    elif args.symmetric:
        scale, zero = torch.maximum(high, -low) / (2 ** (args.num_bits - 1) - 0.5), None
    else:
        scale = (high - low) / (2**args.num_bits - 1)
        least = -(2 ** (args.num_bits - 1))
        zero = (least - low / scale.to(dtype).float()).round().clamp(least, -least - 1).to(torch.int8)
    scale = scale.to(dtype)
    return (scale.reshape(1), zero) if args.strategy == "tensor" else (scale, zero)


def extents(weight: Tensor, height: int, width: int) -> list[Tensor]:
    """For each row of blocks, its blocks [n, height, width], those at the edges padded with zeros."""
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // height) * height, -(-cols // width) * width)
    padded[:rows, :cols] = weight
    return [part.unflatten(1, (-1, width)).transpose(0, 1) for part in padded.split(height)]


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def bnb4(
    quant_type: str = "nf4",
    *,
    nested: bool = True,
    storage: str = "uint8",
    block: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    skip: list[str] | None = None,
) -> Kind:
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": storage,
        "llm_int8_skip_modules": skip,
    }

    def pack(weight: Tensor, seed: int) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.to(dtype),
            blocksize=block,
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=getattr(torch, storage),
        )
        return {"weight": packed, **{f"weight.{k}": v.clone() for k, v in state.as_dict(packed=True).items()}}

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {name: tensor.clone() for name, tensor in tensors.items() if name != "weight"}
        state = QuantState.from_dict(parts, torch.device("cpu"))
        if shape[1] % block == 0:
            return dequantize_4bit(tensors["weight"], state)
        state.shape = torch.Size([shape[0] * shape[1]])  # its CPU kernel takes each row's blocks for whole ones
        return dequantize_4bit(tensors["weight"], state).reshape(shape)

    name = f"bnb4-{quant_type}-{storage}-b{block}" + "-nested" * nested
    return Kind(name, config, pack, unpack)


def bnb8(skip: list[str] | None = None) -> Kind:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skip}

    def pack(weight: Tensor, seed: int) -> Tensors:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, largest, _ = int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])

    return Kind("bnb8", config, pack, unpack)


# --- FP8 in blocks ---------------------------------------------------------------------------------------------------


def block_fp8(
    block: tuple[int, int] | None = (128, 128), *, dtype: torch.dtype = torch.float32, skip: list[str] | None = None
) -> Kind:
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if block else None,
        "modules_to_not_convert": skip,
    }

    def pack(weight: Tensor, seed: int) -> Tensors:
        height, width = block or weight.shape
        largest = torch.stack([blocks.abs().amax((1, 2)) for blocks in extents(weight, height, width)])
        scale = (largest / 448).to(dtype)
        spread = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        codes = (weight / spread[: weight.shape[0], : weight.shape[1]]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale if block else scale.reshape(())}

    def unpack(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        height, width = block or shape
        codes, scales = tensors["weight"].float().tolist(), tensors["weight_scale_inv"].float().reshape(-1)
        per_row = -(-shape[1] // width)
        out = torch.tensor(codes)
        for n in range(shape[0]):
            for k in range(shape[1]):
                out[n, k] *= scales[n // height * per_row + k // width]
        return out

    size = f"{block[0]}x{block[1]}" if block else "whole"
    return Kind(f"fp8-{size}-{str(dtype).removeprefix('torch.')}", config, pack, unpack)


# --- whole checkpoints -----------------------------------------------------------------------------------------------

# What most quantizers leave alone.
EMBEDDINGS = r"embed_tokens$"
ROUTERS = r"\.(gate|router)$"
HEAD = r"^lm_head$"
USUAL = f"{EMBEDDINGS}|{ROUTERS}|{HEAD}"


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint, and one of float32 weights that mean the same."""

    quantized: ModelSource
    dense: ModelSource


def save_quantized(
    model: Any, folder: Path, kind: Kind, *, skip: str = USUAL, others: dict[str, Kind] | None = None
) -> Pair:
    """Saves a float32 model in both ways.

    Args:
        model: of transformers.
        folder: gets the folders `quantized` and `dense`.
        kind: how matrices are quantized.
        skip: regular expression (anywhere in a module's path) of matrices that stay as they are, in bfloat16.
        others: regular expressions of modules that are quantized otherwise; config.json is `kind`'s all the same.
    """
    return quantize_saved(save(model, folder / "dense"), folder, kind, skip=skip, others=others)


def quantize_saved(
    dense: ModelSource, folder: Path, kind: Kind, *, skip: str = USUAL, others: dict[str, Kind] | None = None
) -> Pair:
    """Quantizes a saved model, and writes into it what the quantized matrices mean; else as `save_quantized`."""
    file = dense.path / "model.safetensors"
    stored, meant = {}, {}
    for number, (key, tensor) in enumerate(load_file(file).items()):
        module = key.removesuffix(".weight")
        if tensor.dim() != 2 or re.search(skip, module):
            stored[key] = tensor.to(torch.bfloat16) if tensor.dim() == 2 else tensor
            meant[key] = stored[key].float()
            continue
        own = next((other for pattern, other in (others or {}).items() if re.search(pattern, module)), kind)
        parts = own.pack(tensor, number)
        stored |= {f"{module}.{name}": part for name, part in parts.items()}
        meant[key] = own.unpack(parts, tuple(tensor.shape)).float()
    save_file(meant, file, {"format": "pt"})
    quantized = folder / "quantized"
    shutil.copytree(dense.path, quantized)
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": kind.config}))
    return Pair(ModelSource("quantized", quantized), dense)


def hide_tensors(source: ModelSource, *suffixes: str) -> None:
    """Gives tensors of a checkpoint names that mean nothing."""
    file = source.path / "model.safetensors"
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    renamed = {
        f"unused.{i}" if key.endswith(suffixes) else key: value for i, (key, value) in enumerate(entries.items())
    }
    assert renamed.keys() != entries.keys()
    text = json.dumps(renamed).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
