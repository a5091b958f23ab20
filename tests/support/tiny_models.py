"""Tiny random models of many architectures, saved as real checkpoints: built from configs, nothing downloaded."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from specchat.records.model import ModelSource

VOCAB = 211
WINDOW = 12

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_hidden_layers": 5, "head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": _SLIDING_THEN_FULL},
    ),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": WINDOW, **_EXPERTS}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL}),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW, "layer_types": _SLIDING_THEN_FULL}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
}
_OLD: dict[str, Any] = {"num_key_value_heads": None, "tie_word_embeddings": False, "is_decoder": True}
# Architectures with something of their own: heads, decoders, windows or layer inputs. They have a test of their own.
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
}
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3nTextConfig",
        {**_GEMMA, "global_head_dim": None, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2},
    ),
    "gemma4": ("Gemma4TextConfig", _GEMMA),
    "gemma4_shared": ("Gemma4TextConfig", {**_GEMMA, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "gemma4_moe": (
        "Gemma4TextConfig",
        {**_GEMMA, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_k_eq_v": (
        "Gemma4TextConfig",
        {**_GEMMA, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            "head_dim": 24,
            "v_head_dim": 16,
            "sliding_window": WINDOW,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "beam": (
        "BeamConfig",
        {
            "sliding_window": WINDOW,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
    "bert": ("BertConfig", _OLD),
    "cwm": ("CwmConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "gpt2": ("GPT2Config", {**_OLD, "n_positions": 512}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**_OLD, "n_positions": 512}),
    "gpt_neox": ("GPTNeoXConfig", _OLD),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["full_attention"] * 4, "num_local_experts": 0, "shared_intermediate_size": 96},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 96,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0] * 2,
        },
    ),
    "mistral4": (
        "Mistral4Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "opt": ("OPTConfig", {**_OLD, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": False,
        },
    ),
}
# The oldest transformers that is allowed knows only some of them.
SPECIAL = {architecture: known for architecture, known in SPECIAL.items() if known[0] in dir(hf)}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 2}),
}


def make_config(architecture: str, **changes: Any) -> Any:
    name, extra = (ARCHITECTURES | SPECIAL)[architecture]
    values = {**BASE, **extra, **changes}
    return getattr(hf, name)(**{key: value for key, value in values.items() if value is not None})


def random_model(config: Any, seed: int = 0) -> Any:
    """A float32 model with weights large enough that its texts differ and its scores are far apart.

    The fused attention of transformers 5.17 ignores the caps of scores, so capped models get the unfused one.
    """
    is_registered = type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = hf.AutoModelForCausalLM if is_registered else hf.AutoModelForImageTextToText
    more = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    return randomize(model_class.from_config(copy.deepcopy(config), dtype=torch.float32, **more).eval(), seed)


def randomize(model: Any, seed: int = 0, embedding_std: float | None = None) -> Any:
    """The model with weights large enough that its texts differ and its scores are far apart."""
    generator = torch.Generator().manual_seed(seed)
    if embedding_std is None:
        # a tied head with large rows would score the token just read highest, for ever
        embedding_std = 0.02 if getattr(model.config, "tie_word_embeddings", False) else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, embedding_std if "embed" in name else 0.15, generator=generator)
            elif "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def perturbed(model: Any, relative: float, seed: int = 3) -> Any:
    """A copy of `model` with noise on its matrices: a draft that is often right."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * relative)
    return twin


def save(model: Any, folder: Path, **kwargs: Any) -> ModelSource:
    """A checkpoint as transformers writes it, with a tokenizer that all tiny models share."""
    model.save_pretrained(folder, **kwargs)
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return ModelSource(folder.name, folder)


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer
