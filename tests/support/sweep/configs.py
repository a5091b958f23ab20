"""Tiny configurations of all types of language models in transformers, made from the defaults of their classes.

Sizes are known by the names of their fields. Every kind of layer occurs at least twice. Nothing here uses the product's
own way of shrinking configurations, so its faults show.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import transformers as hf
from transformers.models.auto import modeling_auto as auto

VOCAB = 264
WINDOW = 12
POSITIONS = 512
_MIN_LAYERS = 4
_PART_LAYERS = 2  # of encoders and projectors

# The first pattern that matches a field's whole name gives the most that its value may be.
_SIZES = [
    (re.compile(pattern), size)
    for pattern, size in (
        (r"(?!type_|additional_).*vocab_size(_per_layer_input)?", VOCAB),
        (r".*position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length", POSITIONS),
        (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", WINDOW),
        (r"q_lora_rank", 24),
        (r"kv_lora_rank|o_lora_rank|index_topk|query_pre_attn_scalar", 16),
        (r"qk_rope_head_dim|laurel_rank|rotary_dim", 8),
        (r"global_head_dim", 32),
        (r".*(head_dim|dim_head|head_size|kv_channels|d_kv|d_head|hidden_size_per_layer_input|ple_embed_dim)", 16),
        (r".*(kv_heads|key_value_heads|kv_n_heads)", 2),
        (r"(?!.*router).*(attention_heads|n_heads|num_heads|n_head|_heads)", 4),
        (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
        (r".*(experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts)", 2),
        (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
        (r"num_kv_shared_layers", 2),
        (r"first_k_dense_replace|interleave_moe_layer_step", 2),
        (r".*(moe|expert).*(size|dim)", 32),
        (
            r".*(intermediate_(size|dim)|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|dim_ff|dff|dim_feedforward|mlp_dim).*",
            96,
        ),
        (
            r".*(hidden_sizes?|hidden_dim|d_model|n_embd|emb_dim|embed_dims?|embedding_(size|dim)|output_dim|input_dim)",
            64,
        ),
        (r".*(proj(ection|ector)?(_dims?|_size)|vit_dim|dim_model|width)|dim", 64),
        (r"image_size", 56),
        (r"patch_size", 14),
        (r"adapter_.*(dim|size)", 64),
        (r"num_position_embeddings", 16),
        (r".*(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers)|depth", _PART_LAYERS),
    )
]
_NAMES_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Values of released models, by the type of a configuration or of a part of one. With its own defaults, transformers
# cannot build these models, or it builds them without the layers that distinguish the type.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = _ROPE | {"mrope_section": [16, 24, 24]}
_VISION_TOKENS = {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653}
_RELEASED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 10,
        "rope_parameters": {"sliding_attention": _ROPE | {"mrope_section": [24, 20, 20]}, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 10_752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "emu3": {"vocabulary_map": {"<image>": 260, "<|extra_200|>": 261, "<|visual token 000000|>": 262}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [22, 22, 20]}},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4v_text": {"rope_parameters": _ROPE | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}},
    "glm_ocr_text": {"rope_parameters": _ROPE | {"mrope_section": [8, 12, 12]}},
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 9], [-1, 6]],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128, "rope_parameters": _ROPE | {"mrope_section": [16, 16, 16, 16]}},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "layer_types": None},
    "lfm2_moe": {"layer_types": (["conv"] * 3 + ["full_attention"]) * 8},
    "minimax_m3_vl_text": {"layer_types": None, "sparse_attention_config": {"sparse_attention_freq": [0, 1] * 30}},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_thinker": _VISION_TOKENS,
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": _VISION_TOKENS,
    "qwen3_omni_moe_text": {"num_attention_heads": 32, "head_dim": 128},
    "step3p5": {"sliding_window": 512, "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
}

# Values that no rule finds, by the type of a configuration or of a part of one; by its class if it has no type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    # transformers' own cached text differs from its uncached one once the window is full: the mask ignores the window
    "moshi": {"sliding_window": POSITIONS},
    # heads of the recurrent part fill its width, 128
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 32},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "nemotron_h": {"n_groups": 2},
    # kinds of attention in a form of its own
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    # no field of its class
    "DbrxAttentionConfig": {"rope_theta": 500_000.0},
    # a quarter of the text's width
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    # layers of parts
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [2, 3]},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": VOCAB - 1},
    "radio": {"video_temporal_patch_size": 2},
    "timm_wrapper": {"hidden_size": 64, "model_args": {"embed_dim": 64}},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 64},
    # half of each key is rotary, as the rotary parameters say
    "mistral4": {"qk_nope_head_dim": 8},
    # keys are wider than values
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
}


def causal_types() -> list[str]:
    """All types that transformers opens as causal LMs."""
    return sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def composite_types() -> list[str]:
    """All types with a `text_config`, at any depth, that transformers opens for text."""
    names = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    return sorted(name for name in names if _has_text(hf.CONFIG_MAPPING[name]))


def _has_text(config_class: Any) -> bool:
    parts = getattr(config_class, "sub_configs", {})
    return "text_config" in parts or any(_has_text(part) for part in parts.values())


def all_types() -> list[str]:
    """All of these, and the types that write text from images or sound without a `text_config`."""
    return sorted({*causal_types(), *composite_types(), *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def model_class(config: Any) -> Any:
    """The class that transformers opens such a checkpoint with, or None; for composites, the whole wrapper."""
    mappings = (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    for mapping in mappings if _has_text(type(config)) else reversed(mappings):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def default_config(kind: str) -> Any:
    """The configuration that transformers makes without values: a whole-size model of the family."""
    config = _released(hf.CONFIG_MAPPING[kind](**_RELEASED.get(kind, {})))
    config.architectures = [found.__name__] if (found := model_class(config)) else None
    return config


def _released(config: Any) -> Any:
    """The configuration as a decoder, and with the values of released models in all of its parts."""
    values = dict(_RELEASED.get(config.model_type, {}))
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        values["is_decoder"] = True
    values |= {name: _released(part) for name in config.sub_configs if (part := getattr(config, name)) is not None}
    return type(config).from_dict(config.to_dict() | values)


def tiny_config(kind: str) -> Any:
    """A tiny configuration; every kind of layer occurs at least twice."""
    default = default_config(kind)
    config = _shrunk(default, default.get_text_config(decoder=True))
    config.architectures = default.architectures
    return config


def with_tie(config: Any, tie: bool) -> Any:
    """The configuration with tied or untied embeddings."""
    twin = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": tie})
    for part in (getattr(twin, name) for name in config.sub_configs):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = tie
    return twin


def _shrunk(config: Any, text: Any) -> Any:
    names = {field.name for field in fields(config)}
    values = _switches(config) | _RELEASED.get(config.model_type, {})
    for name in names:
        value = _value(config, name)
        if isinstance(value, hf.PreTrainedConfig):
            values[name] = _shrunk(value, text)
        elif (size := _size(name, value)) is not None:
            values[name] = size
    values |= _layers(config, names)
    if config is text:
        values |= _text_values(config, names)
    _match_heads(values, config)
    values |= {name: token for name, token in _TOKENS.items() if name in names}
    values |= _OVERRIDES.get(config.model_type or type(config).__name__, {})
    return type(config)(**values)


def _value(config: Any, name: str) -> Any:
    """A field's value; attributes cannot be read where they differ from layer to layer."""
    return vars(config).get(config.attribute_map.get(name, name))


def _switches(config: Any) -> dict[str, Any]:
    """Values that are no sizes and not the defaults of the class; wrappers have defaults for their parts."""
    return {
        field.name: value
        for field in fields(config)
        if (value := _value(config, field.name)) != field.default and (not value or type(value) in (bool, str, float))
    }


def _size(name: str, value: Any) -> Any:
    """The reduced value of a size; None for fields that are no sizes."""
    is_list = isinstance(value, list | tuple) and value and all(type(each) is int for each in value)
    if not is_list and (type(value) is not int or value <= 0):
        return None
    for pattern, size in _SIZES:
        if pattern.fullmatch(name):
            return [min(each, size) for each in value] if is_list else min(value, size)
    return None


def _match_heads(values: dict[str, Any], config: Any) -> None:
    """Keep multi-head attention multi-head, and rotary sections as wide as the heads."""
    heads = _value(config, "num_attention_heads")
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in values and _value(config, name) == heads:
            values[name] = values.get("num_attention_heads", 4)
    if isinstance(rope := _value(config, "rope_parameters"), dict):
        values["rope_parameters"] = {
            name: _narrow_rope(value) if isinstance(value, dict) else value
            for name, value in _narrow_rope(rope).items()
        }


def _narrow_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fill heads of 16 values as they filled wider ones."""
    width = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
    if wide := rope.get("mrope_section"):
        sections = [each * width // sum(wide) for each in wide]
        left = width - sum(sections)
        rope["mrope_section"] = [size + (index < left) for index, size in enumerate(sections)]
    return rope


def _layers(config: Any, names: set[str]) -> dict[str, Any]:
    """The number of layers and all values by layer, such that each kind of layer occurs twice or more."""
    count = next((name for name in _NAMES_OF_LAYERS if isinstance(getattr(config, name, None), int)), None)
    if count is None:
        return {}
    num_layers = getattr(config, count)
    lists = {name: _value(config, name) for name in names}
    lists = {
        name: list(value)
        for name, value in lists.items()
        if isinstance(value, list | tuple) and len(value) == num_layers and not _are_indices(value)
    }
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) if lists else [()]
    tiny = kinds * max(2, -(-_MIN_LAYERS // len(kinds)))
    by_layer = {name: [_smaller(name, kind[index]) for kind in tiny] for index, name in enumerate(lists)}
    field = config.attribute_map.get(count, count)
    return by_layer | ({field: len(tiny)} if field in names else {})


def _smaller(name: str, value: Any) -> Any:
    size = _size(name, value)
    return value if size is None else size


def _are_indices(values: Any) -> bool:
    """Whether a list names layers, not one value for each layer."""
    return len(values) > 1 and all(type(value) is int for value in values) and len(set(values)) == len(values)


def _text_values(config: Any, names: set[str]) -> dict[str, Any]:
    """Values that turn kinds of layers on which defaults leave out."""
    values: dict[str, Any] = {}
    if {"use_sliding_window", "layer_types"} <= names and not config.use_sliding_window:
        kinds = ["sliding_attention", "full_attention"] * 2
        values |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    if "mlp_only_layers" in names and not config.mlp_only_layers:
        values["mlp_only_layers"] = [1, 2]
    return values
