"""Parsing of `shape:` arguments: the figures of a Llama-like model, or of one like Mixtral. No weights, no torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from specchat.errors import UsageError
from specchat.models.catalog.known_models import known_models
from specchat.records.model import DTYPE_BYTES, Dtype, Quant
from specchat.units import format_bytes

VOCAB_SIZE = 4096  # all shapes use the demo's tokenizer and embeddings

_NUMBERS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")
_EXPERT_NUMBERS = ("experts", "experts_per_token")
_NUMBER = re.compile(r"[0-9]{1,7}")
# Matmul kernels need row lengths that are multiples of this; real models have no others.
_WIDTH_STEP = 64
_WRITE = "write shape:NAME, shape:hidden=2048,layers=16 or shape:NAME,layers=8"


@dataclass(frozen=True)
class Shape:
    """The figures of a Llama-like decoder, as in config.json, with the demo's vocabulary.

    Attributes:
        hidden: width of the residual stream.
        layers: number of decoder layers.
        heads, kv_heads: number of query heads, and of key-value heads that they share in equal groups.
        head_dim: width of a head.
        mlp: width of the MLP's inner activation, or of each expert's.
        dtype: dtype of the weights.
        quant: quantization of the matrices.
        experts, experts_per_token: experts of a layer, and experts that compute a token; 0 for a plain MLP.
        name: text that the user typed; ignored by comparisons.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    dtype: Dtype = "bf16"
    quant: Quant = "none"
    experts: int = 0
    experts_per_token: int = 0
    name: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """Text after `shape:` in a MODEL argument for this shape."""
        numbers = (*_NUMBERS, *_EXPERT_NUMBERS) if self.experts else _NUMBERS
        return self.name or ",".join(f"{key}={getattr(self, key)}" for key in (*numbers, "dtype"))

    @property
    def group(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def layer_tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Return name -> shape of a decoder layer's parameters, in module order of transformers.

        The modules are those of LlamaDecoderLayer, or of MixtralDecoderLayer with experts.
        """
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (q, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q),
            **self._mlp_tensors(),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    def _mlp_tensors(self) -> Mapping[str, tuple[int, ...]]:
        if self.experts:
            return {
                "mlp.gate.weight": (self.experts, self.hidden),
                "mlp.experts.gate_up_proj": (self.experts, 2 * self.mlp, self.hidden),
                "mlp.experts.down_proj": (self.experts, self.hidden, self.mlp),
            }
        return {
            "mlp.gate_proj.weight": (self.mlp, self.hidden),
            "mlp.up_proj.weight": (self.mlp, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.mlp),
        }

    def rest_tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Return name -> shape of the parameters outside the layers; the head is the embedding."""
        return {"model.embed_tokens.weight": (VOCAB_SIZE, self.hidden), "model.norm.weight": (self.hidden,)}

    @property
    def layer_bytes(self) -> int:
        """Bytes of one decoder layer's weights in full precision, without any alignment."""
        return self._num_bytes(self.layer_tensors())

    @property
    def rest_bytes(self) -> int:
        """Bytes of the weights outside the layers."""
        return self._num_bytes(self.rest_tensors())

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights in full precision."""
        return self.layers * self.layer_bytes + self.rest_bytes

    def describe(self) -> str:
        """Describe the model in one line that marks it as synthetic."""
        experts = f"{self.experts} experts of {self.mlp:,}, {self.experts_per_token} for a token"
        return (
            f"synthetic model of shape {self.label} (hidden {self.hidden:,}, {self.layers} layers, "
            f"{self.heads} heads and {self.kv_heads} key-value heads of {self.head_dim}, "
            f"{experts if self.experts else f'MLP {self.mlp:,}'}, "
            f"{self.dtype}, {format_bytes(self.num_bytes)}) computing the demo target; "
            f"vocabulary {VOCAB_SIZE:,} of the demo"
        )

    def _num_bytes(self, tensors: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in tensors.values()) * DTYPE_BYTES[self.dtype]


# Every shape computes this model inside its own layers, so no shape may be smaller.
DEMO_TARGET = Shape(hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, mlp=704, name="demo target")


@cache
def known_shapes() -> Mapping[str, Shape]:
    """Return the named shapes, with the figures of known models and 16-bit weights."""
    return {model.shape: _shape_of(model.config) for model in known_models().values() if model.shape}


def _shape_of(config: Mapping[str, Any]) -> Shape:
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp=config.get("moe_intermediate_size") or config["intermediate_size"],
        experts=config.get("num_experts", 0),
        experts_per_token=config.get("num_experts_per_tok", 0),
    )


def parse_shape(text: str) -> Shape:
    """Parse the text after `shape:` in a MODEL argument.

    Args:
        text: name of a known shape, figures as key=value, or a name and figures that replace its own. Without a name,
            hidden and layers are required; the other figures default to the proportions of current models.

    Raises:
        UsageError: the name or a key is unknown, a figure is not a number, or the shape cannot hold the demo target.
    """
    name, values = _split(text)
    dtype = _parse_dtype(values.pop("dtype", "bf16"))
    numbers = {key: _parse_number(key, value) for key, value in values.items()}
    base = _known(name) if name is not None else _complete(numbers)
    shape = replace(base, **numbers, dtype=dtype, name=text)  # type: ignore[arg-type]  # `numbers` has no dtype
    _check(shape)
    return shape


def _split(text: str) -> tuple[str | None, dict[str, str]]:
    """Split into the name, or None, and the values by key, as typed."""
    items = text.split(",")
    name = items.pop(0) if "=" not in items[0] else None
    values: dict[str, str] = {}
    for item in items:
        key, _, value = item.partition("=")
        if key not in (*_NUMBERS, *_EXPERT_NUMBERS, "dtype"):
            raise UsageError(
                f"'{key}' in shape:{text} is not a figure of a shape",
                hint=f"use {', '.join((*_NUMBERS, *_EXPERT_NUMBERS))}, dtype",
            )
        if key in values:
            raise UsageError(f"shape:{text} gives {key} twice", hint=_WRITE)
        values[key] = value
    return name, values


def _known(name: str) -> Shape:
    known = known_shapes()
    if name not in known:
        raise UsageError(f"unknown shape '{name}'", hint=f"known: {', '.join(known)}; or {_WRITE}")
    return known[name]


def _parse_dtype(text: str) -> Dtype:
    match text:
        case "bf16" | "fp16" | "fp32":
            return text
    raise UsageError(f"a shape cannot be stored as '{text}'", hint="use dtype=bf16, dtype=fp16 or dtype=fp32")


def _parse_number(key: str, text: str) -> int:
    number = int(text) if _NUMBER.fullmatch(text) else 0
    if number == 0:
        raise UsageError(f"{key}={text} is not a whole number from 1 to 9999999", hint=_WRITE)
    return number


def _complete(numbers: Mapping[str, int]) -> Shape:
    """Complete the given figures by the proportions of current models."""
    missing = [key for key in ("hidden", "layers") if key not in numbers]
    if missing:
        raise UsageError(f"a shape needs {' and '.join(missing)}", hint=_WRITE)
    hidden = numbers["hidden"]
    head_dim = numbers.get("head_dim") or _default_head_dim(hidden, numbers.get("heads"))
    heads = numbers.get("heads") or _default_heads(hidden, head_dim)
    kv_heads = numbers.get("kv_heads") or _default_kv_heads(heads)
    experts = numbers.get("experts", 0)
    per_token = numbers.get("experts_per_token") or -(-experts // 16)  # as in Qwen3-30B-A3B
    mlp = numbers.get("mlp") or (_default_expert(hidden) if experts else _default_mlp(hidden))
    return Shape(
        hidden, numbers["layers"], heads, kv_heads, head_dim, mlp, experts=experts, experts_per_token=per_token
    )


def _default_mlp(hidden: int) -> int:
    """Return 3.5 times the width, as in Llama 3."""
    return -(-7 * hidden // 512) * 256


def _default_expert(hidden: int) -> int:
    """Return 3/8 of the width, as in Qwen3-30B-A3B, and no less than the demo target needs."""
    return max(-(-3 * hidden // (8 * _WIDTH_STEP)) * _WIDTH_STEP, DEMO_TARGET.mlp)


def _default_head_dim(hidden: int, heads: int | None) -> int:
    """Return hidden / heads if that is a usual head size, else 128, or 64 in small models."""
    if heads is not None and hidden // heads in (64, 128, 256):
        return hidden // heads
    return 128 if hidden >= 3072 and hidden % 128 == 0 else 64


def _default_heads(hidden: int, head_dim: int) -> int:
    """Return the most heads that divide the residual stream and are together no wider than it."""
    least = DEMO_TARGET.heads
    most = max(hidden // max(head_dim, DEMO_TARGET.head_dim), least)
    return next((heads for heads in range(most, least, -1) if hidden % heads == 0), least)


def _default_kv_heads(heads: int) -> int:
    """Return the key-value heads for groups of 4, or of 2 or 1 if 4 does not divide or leaves too few."""
    group = next((g for g in (4, 2) if heads % g == 0 and heads // g >= DEMO_TARGET.kv_heads), 1)
    return heads // group


def _check(shape: Shape) -> None:
    """Check that the demo target fits in, and that kernels can compute the shape."""
    for key in ("hidden", "layers", "heads", "mlp"):
        least = getattr(DEMO_TARGET, key)
        if getattr(shape, key) < least:
            raise UsageError(
                f"{key}={getattr(shape, key)} is too small: the demo target, which every shape computes, has {least}",
                hint=f"use {key}={least} or more",
            )
    for key in ("hidden", "mlp", "head_dim"):
        if getattr(shape, key) % _WIDTH_STEP:
            raise UsageError(f"{key}={getattr(shape, key)} is not a multiple of {_WIDTH_STEP}", hint=_WRITE)
    if shape.experts_per_token > shape.experts or (shape.experts and not shape.experts_per_token):
        raise UsageError(
            f"{shape.experts_per_token} of {shape.experts} experts cannot compute a token",
            hint="write experts=128,experts_per_token=8",
        )
    _check_heads(shape)


def _check_heads(shape: Shape) -> None:
    if shape.hidden % shape.heads:  # transformers refuses such configurations for every head_dim
        raise UsageError(
            f"hidden={shape.hidden} is not a multiple of the {shape.heads} heads", hint="heads must divide hidden"
        )
    if shape.heads % shape.kv_heads:
        raise UsageError(
            f"{shape.heads} heads cannot share {shape.kv_heads} key-value heads equally",
            hint="kv_heads must divide heads",
        )
    least = num_live_kv_heads(shape)
    if shape.kv_heads < least:
        raise UsageError(
            f"kv_heads={shape.kv_heads} cannot hold the demo target's {DEMO_TARGET.kv_heads} key-value heads",
            hint=f"use kv_heads={least} or more",
        )


def num_live_kv_heads(shape: Shape) -> int:
    """Return how many key-value heads hold the demo's two: two, or four if the shape's query heads share none."""
    return DEMO_TARGET.heads // min(shape.group, DEMO_TARGET.group)
