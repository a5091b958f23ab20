"""llama.cpp's quantization mixes: which tensor of a GGUF file gets which type in Q4_K_M, IQ4_XS and so on.

The rules are those of llama.cpp's quantizer, written down anew for the mixes and architectures that known uploads have.
`tests/models/sizes/test_gguf_specs.py` compares them with `llama-quantize --dry-run` where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES

MIXES = {"Q4_K_M": "Q4_K", "IQ4_XS": "IQ4_XS", "IQ3_XXS": "IQ3_XXS", "IQ3_M": "IQ3_S", "MXFP4": "MXFP4", "Q8_0": "Q8_0"}
# Types for rows that are no whole number of blocks.
_FALLBACKS = {
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_KEPT = ("_norm.weight", "ffn_gate_inp", "ssm_conv1d", "shortconv.conv", "per_layer_model_proj", "altup", "laurel")
# Kinds of tensors by a part of the name; the first that fits counts.
_KINDS = {
    "attn_qkv.": "v",
    "attn_kv_b.": "v",
    "attn_v.": "v",
    "attn_k.": "k",
    "attn_q.": "q",
    "attn_output.": "o",
    "ffn_down": "down",
}


@dataclass(frozen=True)
class Facts:
    """What the rules depend on beside names and shapes.

    Attributes:
        num_layers: number of layers, those that predict further tokens included.
        heads_per_kv: number of query heads that share keys and values.
        num_experts: number of experts; 0 for dense models.
        has_importances: whether an importance matrix is given, as for most uploads.
    """

    num_layers: int
    heads_per_kv: int
    num_experts: int = 0
    has_importances: bool = True


def types_of(shapes: Mapping[str, tuple[int, ...]], mix: str, facts: Facts) -> dict[str, str]:
    """Return the type of each tensor.

    Args:
        shapes: shapes by name, in torch's order.
        mix: one of `MIXES`.
        facts: facts about the model.
    """
    values = [name for name in sorted(shapes, key=_place) if _kind(name) == "v"]
    is_tied = "output.weight" not in shapes
    chosen = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith("weight") or any(part in name for part in _KEPT):
            chosen[name] = "F32"
            continue
        wanted = _wanted(name, shape, mix, facts, values, is_tied=is_tied)
        chosen[name] = wanted if _fits(shape, wanted) else _FALLBACKS[wanted]
    return chosen


def _place(name: str) -> tuple[int, str]:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1, name


def _kind(name: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in name and name.endswith("weight")), "")


def _fits(shape: tuple[int, ...], kind: str) -> bool:
    return shape[-1] % BLOCK_TYPES[kind].numbers == 0


def _wanted(name: str, shape: tuple[int, ...], mix: str, facts: Facts, values: Iterable[str], *, is_tied: bool) -> str:
    default = MIXES[mix]
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return _of_head(shape, mix, default)
    if mix == "MXFP4":
        return "MXFP4" if len(shape) > 2 else "Q8_0"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "IQ3_S" if mix == "IQ3_XXS" else default
    layer, num_layers, many = int(name.split(".")[1]), facts.num_layers, facts.heads_per_kv >= 4
    match _kind(name), mix:
        case "v", "Q4_K_M":
            is_fused = "attn_qkv" in name
            order = list(values)
            more = _has_more_bits(order.index(name), len(order))
            return "Q6_K" if more else _lifted(default, facts, is_fused=is_fused)
        case "v", "IQ4_XS":
            return "Q5_K" if many else default
        case "v", "IQ3_XXS":
            return _lifted("Q4_K", facts) if many else default if facts.has_importances else "IQ3_S"
        case "v", "IQ3_M":
            return _lifted("Q4_K", facts)
        case (("q" | "k"), "IQ3_XXS"):
            return "IQ2_S"
        case "down", "Q4_K_M":
            return "Q6_K" if _has_more_bits(layer, num_layers) else default
        case "down", "IQ4_XS" if layer < num_layers // 8 and not facts.has_importances:
            return "Q5_K"
        case "down", "IQ3_XXS" if not facts.has_importances:
            return "Q4_K" if layer < num_layers // 8 else "Q3_K"
        case "down", "IQ3_M" if layer < num_layers // 8:
            return "Q4_K"
        case "o", "IQ3_XXS":
            return "IQ3_S"
        case "o", "IQ3_M":
            return "Q4_K"
    return default


def _of_head(shape: tuple[int, ...], mix: str, default: str) -> str:
    if mix in ("MXFP4", "Q8_0") or not _fits(shape, default):
        return "Q8_0"
    return "Q5_K" if mix == "IQ3_XXS" else "Q6_K"


def _lifted(kind: str, facts: Facts, *, is_fused: bool = False) -> str:
    """Return a type for values: models of 80 layers, as Llama's 70B, have few of them and give them more bits."""
    return "Q5_K" if kind == "Q4_K" and facts.num_layers == 80 and not facts.num_experts else kind


def _has_more_bits(index: int, count: int) -> bool:
    """Return whether a layer is one of the first or last eighth, or every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
