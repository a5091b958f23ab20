"""A model's configuration: reading, checking, and shrinking for the load-time self-check."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.hf.config_values import make_config
from specchat.models.hf.hybrids import known_kinds, tiny_values
from specchat.models.hf.refusals import CANNOT_BUILD, HAS_ENCODER, HINT, refusing
from specchat.models.hf.wrappers import text_half, text_half_class
from specchat.records.model import KvShape

_QUANTIZATION = ("quantization_config", "compression_config")

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def load_config(folder: Path) -> Any:
    """Read a model's configuration and check that the engine can verify trees on the architecture.

    Returns:
        Configuration of the text half where the model is multimodal.

    Raises:
        CorruptCheckpointError: an invalid config.json.
        UnsupportedModelError: remote code, recurrent layers, ALiBi, no text half, or an unknown architecture.
    """
    values = read_json(folder / "config.json")
    config = make_config(folder / "config.json", values)
    kind = values["model_type"]
    with refusing(kind, CANNOT_BUILD):
        config = without_quantization(text_half(config))
        model_class = text_model_class(config)
        if model_class is None:
            raise UnsupportedModelError(f"'{kind}' is not a model that generates text")
        _check_layer_kinds(config, model_class)
    return config


def without_quantization(config: Any) -> Any:
    """Return a configuration that no longer says how its tensors are quantized.

    specchat reads this itself, and transformers would start its own quantizers.
    """
    for name in _QUANTIZATION:
        vars(config).pop(name, None)
    return config


def text_model_class(config: Any) -> Any | None:
    """Return transformers' class of causal LMs for a configuration; None if there is none."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Mistral 4 is a causal LM that is only registered here.
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if found is not None and found.__name__.endswith("ForCausalLM"):
        return found
    return text_half_class(config)


def _check_layer_kinds(config: Any, model_class: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"'{kind}' {HAS_ENCODER}", HINT)
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(f"'{kind}' has no plain list of decoder layers", HINT)
    layer_types = set(getattr(config, "layer_types", None) or [])
    is_recurrent = getattr(model_class, "_is_stateful", False) and not layer_types  # hybrid classes name their layers
    unknown = layer_types - _ATTENTION_KINDS - known_kinds(config)
    if unknown or is_recurrent:
        names = ", ".join(sorted(unknown)) or "recurrent"
        raise UnsupportedModelError(f"'{kind}' has {names} layers, on which specchat cannot verify trees yet", HINT)
    if kind in {"bloom", "mpt"} or getattr(config, "alibi", False):
        raise UnsupportedModelError(f"'{kind}' has ALiBi positions, on which specchat cannot verify trees", HINT)
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedModelError(
            f"'{kind}' has layers that attend to images only, which a pass cannot skip yet", HINT
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise UnsupportedModelError(f"'{kind}' reads its prompt in both directions, but trees are causal", HINT)


def max_positions(config: Any) -> int:
    """Return the longest context, below the length where longrope or dynamic scaling would change earlier positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if not longest:
        raise UnsupportedModelError(f"'{config.model_type}' names no longest context (max_position_embeddings)", HINT)
    longest = int(longest)
    for rope in _dynamic_ropes(config):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None) or longest
        longest = min(longest, int(original))
    return longest


def has_dynamic_positions(config: Any) -> bool:
    """Return whether the scaling of rotary positions depends on the length of the text."""
    return bool(_dynamic_ropes(config))


def _dynamic_ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the rotary parameters whose scaling depends on the length of the text, of all kinds of layers."""
    scaling = getattr(config, "rope_parameters", None) or {}
    variants = scaling.values() if all(isinstance(v, dict) for v in scaling.values()) else [scaling]
    return [rope for rope in variants if rope and rope.get("rope_type") in {"longrope", "dynamic"}]


def kv_shapes(config: Any) -> tuple[KvShape, ...]:
    """Return the KV cache entry of each layer per token; the load-time self-check compares it with the modules."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None) and hasattr(config, "qk_rope_head_dim"):
        shape = KvShape(1, config.kv_lora_rank, config.qk_rope_head_dim)  # latent attention, cached before expansion
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = KvShape(getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)
    return (shape,) * config.num_hidden_layers


def mlp_size(config: Any) -> int:
    """Return the MLP's inner width per row, summed over the active experts: an upper bound for the ledger."""
    return max(_layer_mlp_size(config, layer) for layer in range(config.num_hidden_layers))


def _layer_mlp_size(config: Any, layer: int) -> int:
    config = config.per_layer_config[layer]
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    dense = int(dense[layer] if isinstance(dense, list) else dense)
    dense *= 2 if getattr(config, "use_double_wide_mlp", False) else 1
    ffn = getattr(config, "ffn_config", None)  # DBRX
    if ffn is not None:
        return int(ffn.ffn_hidden_size) * int(ffn.moe_top_k)
    expert = getattr(config, "moe_intermediate_size", None) or dense
    expert = max(expert) if isinstance(expert, list) else expert  # of text and of images
    return max(dense, int(expert) * experts_per_row(config))


def experts_per_row(config: Any) -> int:
    """Return the number of routed experts that one row uses; 1 without experts."""
    return int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1)


# Sizes that DBRX keeps in parts of its configuration, and values of them for a tiny model.
_PART_VALUES = {"kv_n_heads": 1, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}


def tiny_config(config: Any) -> Any:
    """Shrink a configuration so far that a model of its architecture can run at every load.

    Head dimensions and layer kinds stay. Heads, widths, experts and vocabulary shrink. Windows shrink so that they have
    an effect.
    """
    tiny = copy.deepcopy(config)
    tiny.per_layer_config = None  # values of single layers are set last
    whole = copy.deepcopy(tiny)
    heads = whole.num_attention_heads
    kv_heads = getattr(whole, "num_key_value_heads", None) or heads
    tiny_kv = min(kv_heads, 2)
    tiny_heads = tiny_kv * min(heads // kv_heads, 4)
    head_dim = getattr(whole, "head_dim", None) or whole.hidden_size // heads
    layers, num_shared = _kept_layers(whole)
    kinds = getattr(whole, "layer_types", None)
    values: dict[str, Any] = {
        "num_attention_heads": tiny_heads,
        "num_key_value_heads": tiny_heads if heads == kv_heads else tiny_kv,
        "hidden_size": tiny_heads * head_dim,
        "head_dim": head_dim,
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": num_shared,
        "layer_types": [kinds[layer] for layer in layers] if kinds else None,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "top_k_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "attention_chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if heads == kv_heads:
        values["num_attention_heads"] = values["num_key_value_heads"] = min(heads, 2)
        values["hidden_size"] = min(heads, 2) * head_dim
    for name in ("intermediate_size", "activation_sparsity_pattern"):
        if isinstance(by_layer := getattr(whole, name, None), list):
            values[name] = [min(by_layer[layer], 64) for layer in layers]
    values |= tiny_values(whole, values["hidden_size"], layers)
    for name, value in values.items():
        is_derived = isinstance(getattr(type(config), config.attribute_map.get(name, name), None), property)
        own = getattr(whole, name, None)
        if not is_derived and own:  # windows and experts of 0 mean that there are none
            setattr(tiny, name, [value] * len(own) if isinstance(own, list) and isinstance(value, int) else value)
    for part in ("attn_config", "ffn_config"):
        for name, value in (_PART_VALUES | {"hidden_size": tiny.hidden_size}).items():
            if hasattr(getattr(tiny, part, None), name):
                setattr(getattr(tiny, part), name, value)
    tiny.per_layer_config = _layer_overrides(config, whole, layers)
    return tiny


def _kept_layers(config: Any) -> tuple[list[int], int]:
    """Return the layers that a tiny model keeps, and how many of them use keys and values of the layers before."""
    kinds = list(getattr(config, "layer_types", None) or [])
    if getattr(config, "num_kv_shared_layers", None):
        each = sorted({kinds.index(kind) for kind in kinds}, key=lambda layer: kinds[layer] == "full_attention")
        return each + each, len(each)
    num_layers = max(2, 1 + max((kinds.index(kind) for kind in set(kinds)), default=0))
    return list(range(min(num_layers, config.num_hidden_layers))), 0


def _layer_overrides(config: Any, whole: Any, layers: list[int]) -> dict[int, dict[str, Any]] | None:
    """Return the values of a tiny model's layers that differ from those of the whole model."""
    overrides: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        own = config.per_layer_config[layer]
        for name, value in (("head_dim", None), ("num_key_value_heads", 1)):
            if getattr(own, name, None) != getattr(whole, name, None):
                overrides.setdefault(index, {})[name] = value or getattr(own, name)
    return overrides or None
