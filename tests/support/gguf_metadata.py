"""The metadata of tiny GGUF files, as llama.cpp's converter writes it from a configuration of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch

PREDICTS_FURTHER = {"glm4moe"}  # a layer after the others that predicts a further token
_SIGMOID = {"glm4_moe", "deepseek_v3", "glm4_moe_lite", "minimax_m2", "lfm2_moe"}
_LOCAL_EXPERTS = {"llama", "gpt-oss", "granitemoe", "granitehybrid", "minimax-m2"}
_EPS = ("layer_norm_eps", "rms_norm_eps", "norm_eps", "layer_norm_epsilon")
_PLAIN_EPS = {"cohere2", "nemotron_h", "nemotron_h_moe"}
TILED = {"qwen35", "qwen35moe"}


def metadata_of(config: Any, arch: str, *, splits_kv: bool) -> dict[str, Any]:
    if arch == "gemma4":
        return _gemma4(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0}
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 0),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": int(head_dim * full.get("partial_rotary_factor", 1.0)),
    }
    eps = "layer_norm_epsilon" if arch in _PLAIN_EPS else "layer_norm_rms_epsilon"
    values[f"attention.{eps}"] = float(next(getattr(config, name) for name in _EPS if hasattr(config, name)))
    optional = {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_count": "num_local_experts" if arch in _LOCAL_EXPERTS else "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier",
        "logit_scale": "logits_scaling" if arch in ("granite", "granitemoe", "granitehybrid") else "logit_scale",
    }
    if hasattr(config, "n_routed_experts") and arch != "nemotron_h":
        optional |= {
            "expert_count": "n_routed_experts",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_norm": "norm_topk_prob",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "leading_dense_block_count": "first_k_dense_replace",
        }
    if arch == "granitehybrid":
        values |= {
            "attention.head_count_kv": [
                config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types
            ],
            "expert_shared_feed_forward_length": config.shared_intermediate_size,
            "feed_forward_length": config.intermediate_size
            if config.num_local_experts
            else config.shared_intermediate_size,
            "rope.scaling.finetuned": False,
            "ssm.conv_kernel": config.mamba_d_conv,
            "ssm.state_size": config.mamba_d_state,
            "ssm.group_count": config.mamba_n_groups,
            "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
            "ssm.time_step_rank": config.mamba_n_heads,
        }
    if arch == "ernie4_5-moe":
        values |= {
            "expert_count": config.moe_num_experts,
            "expert_used_count": config.moe_k,
            "expert_shared_count": config.moe_num_shared_experts,
            "leading_dense_block_count": config.moe_layer_start_index,
            "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
            "interleave_moe_layer_step": config.moe_layer_interval,
        }
    if arch == "hunyuan-moe":
        values |= {
            "expert_used_count": config.moe_topk,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_feed_forward_length": config.intermediate_size,
        }
    values |= _gemma3n(config) if arch == "gemma3n" else {}
    values |= _falcon_h1(config) if arch == "falcon-h1" else {}
    values |= _nemotron_h(config) if arch.startswith("nemotron_h") else {}
    if arch in ("lfm2", "lfm2moe"):
        heads = [config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types]
        values |= {"attention.head_count_kv": heads, "shortconv.l_cache": config.conv_L_cache}
    if arch == "lfm2moe":
        values["leading_dense_block_count"] = config.num_dense_layers
    if arch in TILED or arch == "qwen3next":
        values |= {
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
            "attention.recurrent_layers": [each == "linear_attention" for each in config.layer_types],
            **({"rope.dimension_sections": [*full["mrope_section"], 0]} if "mrope_section" in full else {}),
        }
    if arch == "deepseek2":
        values |= _latent(config, splits_kv=splits_kv)
    if config.model_type in _SIGMOID:
        values["expert_gating_func"] = 2
    if arch in PREDICTS_FURTHER:
        values |= {"block_count": config.num_hidden_layers + 1, "nextn_predict_layers": 1}
    skipped = {"llama": {"attention.sliding_window"}, "qwen2moe": {"attention.sliding_window"}}.get(arch, set())
    for key, name in optional.items():
        value = getattr(config, name, None)
        if value is not None and key not in skipped:
            values[key] = value
    if not values.get("expert_count"):
        values.pop("expert_used_count", None)
    if full.get("rope_type") == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(full["factor"]),
            "rope.scaling.original_context_length": full["original_max_position_embeddings"],
        }
    if "mscale_all_dim" in full:
        values["rope.scaling.yarn_log_multiplier"] = full["mscale_all_dim"] * (0.1 if arch == "deepseek2" else 1.0)
    if "llama_4_scaling_beta" in full:
        values["attention.temperature_scale"] = full["llama_4_scaling_beta"]
    if arch in ("gpt-oss", "minimax-m2"):
        values["expert_feed_forward_length"] = config.intermediate_size
    if full.get("rope_type") == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if full.get("rope_type") == "longrope":
        context, original = config.max_position_embeddings, full["original_max_position_embeddings"]
        values |= {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(context / original) / math.log(original)),
        }
    return values


def _gemma3n(config: Any) -> dict[str, Any]:
    """What Gemma 3n has beside the values of the others."""
    sparsity = torch.tensor(config.activation_sparsity_pattern)
    return {
        "altup.active_idx": config.altup_active_idx,
        "altup.num_inputs": config.altup_num_inputs,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "activation_sparsity_scale": torch.distributions.Normal(0, 1).icdf(sparsity).tolist(),
    }


def _falcon_h1(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_d_ssm,
        "ssm.time_step_rank": config.mamba_n_heads,
    }


def _nemotron_h(config: Any) -> dict[str, Any]:
    """The sizes of Nemotron-H, and which layer is of which kind."""
    kinds, has_experts = config.layers_block_type, "moe" in config.layers_block_type
    width = config.moe_intermediate_size if has_experts else config.intermediate_size
    values = {
        "attention.head_count_kv": [config.num_key_value_heads * (kind == "full_attention") for kind in kinds],
        "feed_forward_length": [width * (kind in ("mlp", "moe")) for kind in kinds],
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.time_step_rank": config.mamba_num_heads,
    }
    if has_experts:
        values["expert_shared_feed_forward_length"] = config.moe_shared_expert_intermediate_size
        values |= {"moe_latent_size": config.moe_latent_size} if config.moe_latent_size else {}
    return values


def _gemma4(config: Any) -> dict[str, Any]:
    """The sizes of Gemma 4, whose layers differ."""
    count, kinds = config.num_hidden_layers, config.layer_types
    layers = [config.per_layer_config[index] for index in range(count)]
    full, sliding = layers[kinds.index("full_attention")], layers[kinds.index("sliding_attention")]
    wide = [1 + (config.use_double_wide_mlp and index >= count - config.num_kv_shared_layers) for index in range(count)]
    experts = {
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    return {
        "block_count": count,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "feed_forward_length": [config.intermediate_size * each for each in wide],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "rope.freq_base": float(config.rope_parameters["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
        **(experts if config.enable_moe_block else {}),
    }


def _latent(config: Any, *, splits_kv: bool) -> dict[str, Any]:
    """The sizes of latent attention; newer files describe it as attention with one shared head."""
    nope, rope, latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    mla = {"attention.key_length_mla": nope + rope, "attention.value_length_mla": config.v_head_dim}
    return {
        "attention.head_count_kv": 1 if splits_kv else config.num_attention_heads,
        "attention.key_length": latent + rope if splits_kv else nope + rope,
        "attention.value_length": latent if splits_kv else config.v_head_dim,
        **(mla if splits_kv else {}),
        "attention.kv_lora_rank": latent,
        **({"attention.q_lora_rank": config.q_lora_rank} if config.q_lora_rank else {}),
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
    }
