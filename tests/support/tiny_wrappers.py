"""Tiny random multimodal models, saved as real checkpoints with all of their parts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from support.tiny_models import BASE, VOCAB, WINDOW

_TEXT: dict[str, Any] = {**BASE, "head_dim": 16}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_PARTIAL = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "mrope_interleaved": True}
_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": _PARTIAL,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TOKENS = {"image_token_id": 200, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203}

# Name -> (configuration class, text values, values of the other part, other values).
_Sizes = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]
WRAPPERS: dict[str, _Sizes] = {
    "gemma3": ("Gemma3Config", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}, _VISION, {}),
    "gemma4": (
        "Gemma4Config",
        {
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "final_logit_softcapping": 2.0,
        },
        {**_VISION, "head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 16},
        {"audio_config": None},
    ),
    "mistral3": ("Mistral3Config", {"model_type": "mistral"}, {**_VISION, "model_type": "pixtral", "head_dim": 16}, {}),
    "llava": ("LlavaConfig", {"model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}, {}),
    "qwen2_vl": ("Qwen2VLConfig", {"rope_parameters": _MROPE}, {"depth": 1, "embed_dim": 32, "num_heads": 2}, _TOKENS),
    "qwen3_vl": ("Qwen3VLConfig", {"rope_parameters": _MROPE}, _QWEN_VISION, _TOKENS),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", {"rope_parameters": _MROPE, **_EXPERTS}, _QWEN_VISION, _TOKENS),
    "qwen3_5": ("Qwen3_5Config", _GDN, _QWEN_VISION, _TOKENS),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        {**_GDN, **_EXPERTS, "shared_expert_intermediate_size": 32},
        _QWEN_VISION,
        _TOKENS,
    ),
    "granite_docling": ("GraniteDoclingConfig", {"logits_scaling": 3.0}, {**_VISION, "out_hidden_size": 64}, {}),
    "llama4": (
        "Llama4Config",
        {
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 96,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0] * 2,
        },
        {**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "voxtral": (
        "VoxtralConfig",
        {"model_type": "llama"},
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
        {},
    ),
}
# The oldest transformers that is allowed knows only some of them.
WRAPPERS = {name: sizes for name, sizes in WRAPPERS.items() if sizes[0] in dir(hf)}


def wrapper_config(name: str, *, tied: bool = False) -> Any:
    class_name, text, other, more = WRAPPERS[name]
    part = "audio_config" if name == "voxtral" else "vision_config"
    text = {**_TEXT, **text, "tie_word_embeddings": tied}
    return getattr(hf, class_name)(text_config=text, tie_word_embeddings=tied, **{part: other}, **more)


def random_wrapper(config: Any, seed: int = 0) -> Any:
    """A whole multimodal model in float32, with weights large enough that its texts differ."""
    generator = torch.Generator().manual_seed(seed)
    model = hf.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    embedding_std = 0.02 if config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, embedding_std if "embed_tokens" in name else 0.15, generator=generator)
            elif "norm" not in name.lower():
                parameter.normal_(0.0, 0.1, generator=generator)
    return model
