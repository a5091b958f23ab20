"""Sizes of known models by arithmetic, in milliseconds instead of the seconds that `describe` takes.

The layers match those that transformers builds for a configuration. Tests compare the two, and the activations with
profiled ones. Nothing here imports torch, so recommendations are shown at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from specchat.models.catalog.known_models import KnownModel, known_models
from specchat.models.checkpoint.dtypes import short_name
from specchat.models.sizes.gguf_specs import gguf_spec
from specchat.models.sizes.hybrid_specs import active_hybrid_params, hybrid_spec
from specchat.records.limits import MASK_FLAG_BYTES, MASK_POSITION_BYTES, is_sensitive
from specchat.records.model import (
    DTYPE_BYTES,
    Activations,
    Dtype,
    KvShape,
    ModelSpec,
    ParamSize,
    Quant,
    RoutedExperts,
    RowCost,
)

_FLOAT_BYTES = 4  # rotary frequencies and scores are float32 in every compute dtype


def _int8(rows: int, cols: int) -> tuple[ParamSize, ...]:
    return ParamSize(rows * cols, 1), ParamSize(rows * -(-cols // 128), 2)


def _int3(rows: int, cols: int) -> tuple[ParamSize, ...]:
    return tuple(ParamSize(rows * -(-cols // columns), 1) for columns in (4, 8, 32, 128))


def _nf4(rows: int, cols: int) -> tuple[ParamSize, ...]:
    blocks = -(-rows * cols // 64)
    codes = -(-rows * cols // 2)
    return ParamSize(codes, 1), ParamSize(blocks, 1), ParamSize(-(-blocks // 256), 4), ParamSize(1, 4)


def _awq(rows: int, cols: int) -> tuple[ParamSize, ...]:
    groups = rows * -(-cols // 128)
    return ParamSize(rows * -(-cols // 2), 1), ParamSize(groups, 2), ParamSize(groups, 1)


# Returns the segments of a matrix [rows, cols], as in models/quant.
_Stored = Callable[[int, int], tuple[ParamSize, ...]]
_OWN_QUANTS: Mapping[Quant, _Stored] = {"int8": _int8, "int4": _nf4, "int3": _int3}
# Formats of sensitive matrices, where they are not those of the others.
_SENSITIVE: Mapping[str, _Stored] = {"int3": _nf4}
# Pre-quantized checkpoints: name in plans, and segments of the layers' matrices; heads stay plain.
_PREQUANTIZED: Mapping[str, tuple[str, _Stored]] = {"awq": ("awq int4", _awq), "bnb-4bit": ("bitsandbytes 4-bit", _nf4)}


@dataclass(frozen=True)
class _Architecture:
    """How the decoder layers of a model type differ from Llama's.

    Attributes:
        model_class: class in transformers.
        fused_qkv, fused_gate: whether the projections for q, k and v, or for gate and up, are one matrix.
        qkv_bias: whether queries, keys and values have biases.
        head_norms: scope of the norms of queries and keys: "" for no norms, "head" for each head, "all" for all heads.
        num_norms: number of norms per layer, each as wide as the residual stream.
        sinks: whether heads have a sink, all projections a bias, and attention is unfused, so that scores take memory.
        softcap: whether scores are capped by unfused attention, so that they take memory.
        windows: whether some layers have sliding windows, which need another mask.
    """

    model_class: str
    fused_qkv: bool = False
    fused_gate: bool = False
    qkv_bias: bool = False
    head_norms: str = ""
    num_norms: int = 2
    sinks: bool = False
    softcap: bool = False
    windows: bool = False


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("LlamaForCausalLM"),
    "mistral": _Architecture("MistralForCausalLM"),
    "mixtral": _Architecture("MixtralForCausalLM"),
    "qwen2": _Architecture("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _Architecture("Qwen3ForCausalLM", head_norms="head"),
    "qwen3_moe": _Architecture("Qwen3MoeForCausalLM", head_norms="head"),
    "gemma2": _Architecture("Gemma2ForCausalLM", num_norms=4, softcap=True, windows=True),
    "gemma3_text": _Architecture("Gemma3ForCausalLM", num_norms=4, head_norms="head", windows=True),
    "phi3": _Architecture("Phi3ForCausalLM", fused_qkv=True, fused_gate=True),
    "olmo2": _Architecture("Olmo2ForCausalLM", head_norms="all"),
    "olmo3": _Architecture("Olmo3ForCausalLM", head_norms="all", windows=True),
    "gpt_oss": _Architecture("GptOssForCausalLM", qkv_bias=True, sinks=True, windows=True),
    "smollm3": _Architecture("SmolLM3ForCausalLM"),
    "granite": _Architecture("GraniteForCausalLM"),
    "glm4": _Architecture("Glm4ForCausalLM", fused_gate=True, num_norms=4),
}


@dataclass(frozen=True)
class _Weight:
    """A parameter, or one matrix (rows, cols) for each of `experts`; `name` as in `limits.is_sensitive`."""

    shape: tuple[int, ...]
    is_matrix: bool = True
    experts: int = 0
    name: str = ""

    @property
    def count(self) -> int:
        return math.prod(self.shape) * max(self.experts, 1)

    def sizes(self, stored: _Stored | None) -> tuple[ParamSize, ...]:
        """Return the parameters that store the weight; `stored` is the format of matrices, None for plain ones."""
        if stored is None or not self.is_matrix:
            return (ParamSize(self.count),)
        return stored(self.shape[0], self.shape[1]) * max(self.experts, 1)


def known_spec(model_id: str, quant: Quant = "none") -> ModelSpec:
    """Return `spec_of` one of `known_models`, by its id; cached."""
    return _known_spec(model_id, quant)


@cache
def _known_spec(model_id: str, quant: Quant) -> ModelSpec:
    return spec_of(known_models()[model_id], quant)


def spec_of(model: KnownModel, quant: Quant = "none") -> ModelSpec:
    """Compute the sizes of a model.

    Args:
        model: figures of the model.
        quant: requested quantization; a pre-quantized model ignores it.
    """
    if model.stored == "gguf":
        return gguf_spec(model.id)
    if is_hybrid(model):
        return hybrid_spec(model.id, quant)
    config = SimpleNamespace(**model.config)
    architecture = _ARCHITECTURES[config.model_type]
    name, stored, head_stored = _formats(model.stored, quant)
    layer = _layer_weights(config, architecture)
    embedding = _Weight((config.vocab_size, config.hidden_size))
    num_layer_params = config.num_hidden_layers * sum(weight.count for weight in layer)
    return ModelSpec(
        name=model.id,
        architecture=architecture.model_class,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        mlp_size=_mlp_size(config),
        num_heads=config.num_attention_heads,
        max_positions=_max_positions(config),
        dtype=_dtype(config),
        num_params=num_layer_params + _num_rest(config, embedding),
        num_layer_params=num_layer_params,
        layer_params=_layer_params(layer, name, stored, config.num_hidden_layers),
        other_params=_other_sizes(config, embedding, head_stored),
        buffer_bytes=_buffer_bytes(config, architecture),
        kv_shapes=(KvShape(config.num_key_value_heads, config.head_dim, config.head_dim),) * config.num_hidden_layers,
        quant=name,
        quant_shapes=_quant_shapes(layer, stored, embedding, head_stored),
        layer_quant=_layer_quant(layer, stored, config.num_hidden_layers),
        activations={size: _activations(config, architecture, size) for size in set(DTYPE_BYTES.values())},
        lookup_params=embedding.count if _has_own_head(config, head_stored) else 0,
        experts=_routed_experts(config, layer, stored),
    )


def _routed_experts(config: Any, layer: tuple[_Weight, ...], stored: _Stored | None) -> RoutedExperts | None:
    """Return the experts that can be read one by one, in the order of the modules: segments follow the biases."""
    fused = [weight for weight in layer if weight.experts]
    if not fused:
        return None
    matrices = [_Weight(weight.shape).sizes(stored) for weight in fused]
    has_biases = _ARCHITECTURES[config.model_type].sinks
    biases = [(ParamSize(weight.shape[0]),) if has_biases else () for weight in fused]
    if stored is None:
        parts = [each for pair in zip(matrices, biases, strict=True) for each in pair]
    else:
        parts = [*biases, *matrices]
    params = tuple(size for part in parts for size in part)
    layers, has_kernel = tuple(range(config.num_hidden_layers)), stored is not _int3
    return RoutedExperts(layers, fused[0].experts, config.num_experts_per_tok, params, has_kernel)


def _layer_params(
    layer: tuple[_Weight, ...], quant: str, stored: _Stored | None, num_layers: int
) -> tuple[tuple[ParamSize, ...], ...]:
    """Return the parameters of each layer; equal layers share one tuple."""
    known: dict[bool, tuple[ParamSize, ...]] = {}
    for index in range(num_layers):
        is_end = is_sensitive("", index, num_layers)
        if is_end not in known:
            formats = {True: _SENSITIVE.get(quant, stored), False: stored}
            sizes = (
                weight.sizes(formats[not weight.experts and is_sensitive(weight.name, index, num_layers)])
                for weight in layer
            )
            known[is_end] = tuple(size for own in sizes for size in own)
    layers = tuple(known[is_sensitive("", index, num_layers)] for index in range(num_layers))
    return layers if quant in _SENSITIVE else (layers[0],) * num_layers


def _layer_quant(layer: Sequence[_Weight], stored: _Stored | None, num_layers: int) -> tuple[int, ...]:
    """Return the number of weights of each layer in quantized matrices; empty without any."""
    return () if stored is None else (sum(weight.count for weight in layer if weight.is_matrix),) * num_layers


def is_hybrid(model: KnownModel) -> bool:
    """Return whether a model's sizes are recorded for every precision, because its layers differ in kind."""
    return model.stored != "gguf" and model.config["model_type"] not in _ARCHITECTURES


def active_params(model: KnownModel) -> int:
    """Return the number of weights that one token uses: all except those of inactive experts."""
    if model.stored == "gguf":
        return active_params(known_models()[model.like])
    if is_hybrid(model):
        return active_hybrid_params(model.id)
    config = SimpleNamespace(**model.config)
    total, experts = known_spec(model.id).num_params, _num_experts(config)
    if not experts:
        return total
    layer = _layer_weights(config, _ARCHITECTURES[config.model_type])
    in_experts: int = config.num_hidden_layers * sum(weight.count for weight in layer if weight.experts)
    idle: int = experts - config.num_experts_per_tok
    return total - in_experts * idle // experts


def _formats(stored: str, quant: Quant) -> tuple[str, _Stored | None, _Stored | None]:
    """Return the name of the quantization, the segments of the layers' matrices, and those of the head."""
    if stored:
        return (*_PREQUANTIZED[stored], None)
    if quant == "none":
        return "none", None, None
    return quant, _OWN_QUANTS[quant], _int8


def _mlp_size(config: Any) -> int:
    """Return the MLP's inner width per row, summed over the active experts."""
    dense: int = config.intermediate_size
    active: int = getattr(config, "num_experts_per_tok", 1)
    return max(dense, _expert_width(config) * active)


def _dtype(config: Any) -> Dtype:
    dtype = short_name(config.dtype)
    assert dtype is not None, f"no known model is stored in {config.dtype}"
    return dtype


def _max_positions(config: Any) -> int:
    """Return the longest context without scaled positions."""
    longest: int = config.max_position_embeddings
    unscaled: int = getattr(config, "original_max_position_embeddings", longest)
    return min(longest, unscaled)


# --- parameters --------------------------------------------------------------------------------------------------


def _layer_weights(config: Any, architecture: _Architecture) -> tuple[_Weight, ...]:
    """Return all weights of a decoder layer."""
    experts = _num_experts(config)
    mlp = _expert_weights(config, architecture, experts) if experts else _mlp_weights(config, architecture)
    return (*_attention_weights(config, architecture), *mlp, *(_vector(config.hidden_size),) * architecture.num_norms)


def _attention_weights(config: Any, architecture: _Architecture) -> list[_Weight]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    projections = [q + 2 * kv] if architecture.fused_qkv else [q, kv, kv]
    names = [""] if architecture.fused_qkv else ["q_proj", "k_proj", "v_proj"]
    weights = [_Weight((rows, hidden), name=name) for rows, name in zip(projections, names, strict=True)]
    weights.append(_Weight((hidden, q)))
    if architecture.qkv_bias or getattr(config, "attention_bias", False):
        weights += [_vector(rows) for rows in projections]
    if architecture.sinks:
        weights += [_vector(hidden), _vector(config.num_attention_heads)]
    match architecture.head_norms:
        case "head":
            weights += [_vector(head_dim)] * 2
        case "all":
            weights += [_vector(q), _vector(kv)]
    return weights


def _mlp_weights(config: Any, architecture: _Architecture) -> list[_Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    up = [_Weight((2 * inner, hidden))] if architecture.fused_gate else [_Weight((inner, hidden))] * 2
    return [*up, _Weight((hidden, inner))]


def _expert_weights(config: Any, architecture: _Architecture, experts: int) -> list[_Weight]:
    """Return the weights of a router and of fused experts."""
    hidden, inner = config.hidden_size, _expert_width(config)
    router = _Weight((experts, hidden), is_matrix=False)
    matrices = [_Weight((2 * inner, hidden), experts=experts), _Weight((hidden, inner), experts=experts)]
    biases = [_vector(experts), _vector(experts * 2 * inner), _vector(experts * hidden)] if architecture.sinks else []
    return [router, *matrices, *biases]


def _num_experts(config: Any) -> int:
    """Return the number of experts; 0 for a dense MLP."""
    experts: int = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)
    return experts


def _expert_width(config: Any) -> int:
    width: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return width


def _vector(length: int) -> _Weight:
    return _Weight((length,), is_matrix=False)


def _num_rest(config: Any, embedding: _Weight) -> int:
    """Return the number of weights in embedding, head and final norm."""
    rest: int = embedding.count * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    return rest


def _other_sizes(config: Any, embedding: _Weight, head_stored: _Stored | None) -> tuple[ParamSize, ...]:
    """Return the sizes of embedding, final norm and head; a quantized head is never tied to the embedding."""
    sizes = [ParamSize(embedding.count), ParamSize(config.hidden_size)]
    if _has_own_head(config, head_stored):
        sizes += embedding.sizes(head_stored)
    return tuple(sizes)


def _has_own_head(config: Any, head_stored: _Stored | None) -> bool:
    """Return whether the head has its own matrix, not tied to the embeddings."""
    return head_stored is not None or not config.tie_word_embeddings


def _quant_shapes(
    layer: tuple[_Weight, ...], stored: _Stored | None, head: _Weight, head_stored: _Stored | None
) -> tuple[tuple[int, int], ...]:
    quantized = [weight for weight in layer if weight.is_matrix and stored is not None]
    quantized += [head] if head_stored is not None else []
    return tuple(sorted({(weight.shape[0], weight.shape[1]) for weight in quantized}))


def _buffer_bytes(config: Any, architecture: _Architecture) -> int:
    """Return the bytes of rotary frequencies, scaled and unscaled, for each kind of layer."""
    head_dim: int = config.head_dim
    return head_dim * _FLOAT_BYTES * (2 if architecture.windows else 1)


# --- activations -------------------------------------------------------------------------------------------------


def _activations(config: Any, architecture: _Architecture, element: int) -> Activations:
    """Return the activations of a pass in values of `element` bytes: never less than profiled, and little more."""
    hidden, head_dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    q, kv = heads * head_dim, config.num_key_value_heads * head_dim
    if architecture.sinks or architecture.softcap:  # scores in both dtypes; capping adds a copy
        score = 2 * _FLOAT_BYTES if architecture.sinks else 2 * element + _FLOAT_BYTES
        attending = RowCost(0, (hidden + 2 * q + 2 * head_dim) * element, 0, heads * score)
    else:  # one mask row, and the positions it is made from
        kept = q + 2 * kv if architecture.fused_qkv else 0
        attending = RowCost(0, (hidden + q + kept) * element, MASK_POSITION_BYTES, MASK_FLAG_BYTES)
    projecting = (5 * q + 4 * kv) if architecture.head_norms == "all" else 4 * q + 2 * kv
    most = 2 * hidden + max(projecting, _mlp_values(config, architecture))
    # Norms make a float32 copy of their input rows; each kind of layer has its own rotary embeddings.
    outside = (4 if element == _FLOAT_BYTES else 7) * hidden + 4 * head_dim + 4
    return Activations(
        outside=(RowCost(4 * hidden * element, outside * element),),
        entry=(RowCost(0, (2 * hidden + 8 * head_dim) * element),),
        layer=(attending, RowCost(4 * hidden * element, most * element)),
        head=(RowCost(0, config.vocab_size * (element + _FLOAT_BYTES)),),
        num_masks=2 if architecture.windows else 1,
    )


def _mlp_values(config: Any, architecture: _Architecture) -> int:
    """Return the peak number of values per row in an MLP; with experts, the sum over all active ones."""
    hidden: int = config.hidden_size
    if experts := _num_experts(config):
        inner = _expert_width(config)
        active: int = config.num_experts_per_tok
        widest = 10 * inner + 64 if architecture.sinks else max(4 * hidden, hidden + 4 * inner)
        return active * widest + 4 * experts
    width: int = config.intermediate_size
    return (4 if architecture.fused_gate else 3) * width
