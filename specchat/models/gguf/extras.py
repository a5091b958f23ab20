"""Values of the configuration that only some architectures have, made from the metadata of a GGUF file."""

from statistics import NormalDist
from typing import Any

from specchat.models.gguf.metadata import Metadata

# llama.cpp's numbers of functions that weigh experts.
_SOFTMAX, _SIGMOID = 1, 2
# From this number of experts on, DeepSeek's models choose among groups of them.
_DEEPSEEK_GROUPED = 160
_GLM_VOCABULARY = 154880
# Layers of Gemma 3n with keys and values of their own, and number of its first ones that drop most activations.
_GEMMA3N_OWN_LAYERS = 20
_GEMMA3N_SPARSE = 10


def attention_bias(metadata: Metadata) -> dict[str, Any]:
    """Return whether q, k and v have a bias."""
    return {"attention_bias": metadata.in_first_layer("attn_q.bias") is not None}


def experts(metadata: Metadata) -> dict[str, Any]:
    """Return the sizes of the experts."""
    return {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
    }


def shared_expert(metadata: Metadata) -> dict[str, Any]:
    """Return the sizes of the experts and of the one that all tokens share."""
    shared = metadata.integer("expert_shared_feed_forward_length", 0)
    stored = metadata.in_first_layer("ffn_up_shexp.weight")
    return experts(metadata) | {"shared_expert_intermediate_size": shared or (0 if stored is None else stored.shape[0])}


def mixtral(metadata: Metadata) -> dict[str, Any]:
    """Return the number of experts by the names of Mixtral."""
    return {
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
    }


def gpt_oss(metadata: Metadata) -> dict[str, Any]:
    """Return the values of gpt-oss."""
    return mixtral(metadata) | {
        "intermediate_size": metadata.integer("expert_feed_forward_length"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 2),
    }


def gemma2(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Gemma 2."""
    # As in llama.cpp, the 27B model is known by its number of layers: its attention is scaled by its width.
    is_27b = metadata.integer("block_count") == 46
    return {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _width_per_head(metadata) if is_27b else _head_dim(metadata),
    }


def gemma3(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Gemma 3."""
    is_27b = metadata.integer("block_count") == 62
    return {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "query_pre_attn_scalar": _width_per_head(metadata) if is_27b else _head_dim(metadata),
        "layer_types": _layer_types(metadata, 6),
        "final_logit_softcapping": metadata.number("final_logit_softcapping")
        if metadata.has("final_logit_softcapping")
        else None,
    }


def gemma3n(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Gemma 3n; those that older files leave out are the ones that llama.cpp has in its code."""
    count, tensors = metadata.integer("block_count"), metadata.file.tensors
    lookup, laurel = tensors.get("per_layer_token_embd.weight"), tensors.get("blk.0.laurel_l.weight")
    if lookup is None or laurel is None:
        metadata.fail("embedding_length_per_layer_input", None, "the width of inputs that the file has")
    scales = metadata.numbers("activation_sparsity_scale")
    sparsity = (
        [round(NormalDist().cdf(scale), 6) for scale in scales] if scales else [0.95] * _GEMMA3N_SPARSE + [0.0] * count
    )
    return {
        "layer_types": _layer_types(metadata, 5),
        "num_kv_shared_layers": metadata.integer("attention.shared_kv_layers", max(count - _GEMMA3N_OWN_LAYERS, 0)),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": lookup.shape[0],
        "laurel_rank": laurel.shape[0],
        "altup_num_inputs": metadata.integer("altup.num_inputs"),
        "altup_active_idx": metadata.integer("altup.active_idx"),
        "activation_sparsity_pattern": sparsity[:count],
    }


def gemma4(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Gemma 4, whose full layers have other heads than the sliding ones."""
    count, tensors = metadata.integer("block_count"), metadata.file.tensors
    kinds = _layer_types(metadata, 6)
    sizes, heads = metadata.each("feed_forward_length", count), metadata.each("attention.head_count_kv", count)
    if set(kinds) != {"sliding_attention", "full_attention"} or len(kinds) != count:
        metadata.fail("attention.sliding_window_pattern", kinds, "a pattern of both kinds of layers")
    full, sliding = kinds.index("full_attention"), kinds.index("sliding_attention")
    has_experts = metadata.integer("expert_count", 0) > 0
    lookup = tensors.get("per_layer_token_embd.weight")
    return {
        "layer_types": kinds,
        "head_dim": metadata.integer("attention.key_length_swa"),
        "global_head_dim": metadata.integer("attention.key_length"),
        "num_key_value_heads": heads[sliding],
        "num_global_key_value_heads": heads[full] if heads[full] != heads[sliding] else None,
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in tensors,
        "num_kv_shared_layers": metadata.integer("attention.shared_kv_layers", 0),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": sizes[-1] == 2 * sizes[0],
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input", 0),
        **({} if lookup is None else {"vocab_size_per_layer_input": lookup.shape[0]}),
        **(_gemma4_experts(metadata) if has_experts else {}),
    }


def _gemma4_experts(metadata: Metadata) -> dict[str, Any]:
    return {
        "enable_moe_block": True,
        "num_experts": metadata.integer("expert_count"),
        "top_k_experts": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
    }


def _layer_types(metadata: Metadata, default_period: int) -> list[str]:
    """Return the kind of each layer; without a pattern in the file, the last layer of each period is a full one."""
    pattern = metadata.flags("attention.sliding_window_pattern")
    if pattern is None:
        period = metadata.integer("attention.sliding_window_pattern", default_period) or 1
        pattern = [(layer + 1) % period != 0 for layer in range(metadata.integer("block_count"))]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def olmo3(metadata: Metadata) -> dict[str, Any]:
    """Return the values of OLMo 3."""
    window = metadata.integer("attention.sliding_window")
    return attention_bias(metadata) | {"sliding_window": window, "layer_types": _layer_types(metadata, 4)}


def exaone4(metadata: Metadata) -> dict[str, Any]:
    """Return the values of EXAONE 4."""
    window = metadata.integer("attention.sliding_window", 0)
    if not window:
        kinds = ["full_attention"] * metadata.integer("block_count")
        return {"sliding_window": None, "layer_types": kinds}
    return {"sliding_window": window, "layer_types": _layer_types(metadata, 4)}


def cohere2(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Cohere 2."""
    return attention_bias(metadata) | {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 4),
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon", 1e-5),
        "logit_scale": metadata.number("logit_scale", 1.0),
    }


def granite(metadata: Metadata) -> dict[str, Any]:
    """Return Granite's multipliers."""
    return attention_bias(metadata) | {
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "attention_multiplier": metadata.number("attention.scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }


def granite_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Granite with experts.

    Raises:
        UnsupportedModelError: an expert that all tokens share.
    """
    if metadata.integer("expert_shared_feed_forward_length", 0):
        metadata.refuse("has Granite's layers with a shared expert")
    return granite(metadata) | mixtral(metadata)


def minimax_m2(metadata: Metadata) -> dict[str, Any]:
    """Return the values of MiniMax M2.

    Raises:
        UnsupportedModelError: experts are weighed by another function than a sigmoid.
    """
    check_sigmoid(metadata)
    size = {"intermediate_size": metadata.integer("expert_feed_forward_length")}
    return mixtral(metadata) | partial_rotary(metadata) | size


def mistral3(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Ministral 3, which scales its attention by the position, or of earlier models like Llama."""
    is_scaled = metadata.number("attention.temperature_scale", 0.0) > 0
    return {} if is_scaled else {"model_type": "llama"} | attention_bias(metadata)


def partial_rotary(metadata: Metadata) -> dict[str, Any]:
    """Return the part of each head that is rotated."""
    head_dim = _head_dim(metadata)
    return {"partial_rotary_factor": metadata.integer("rope.dimension_count", head_dim) / head_dim}


def glm4(metadata: Metadata) -> dict[str, Any]:
    """Return the values of GLM-4."""
    return attention_bias(metadata) | partial_rotary(metadata)


def glm4_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of GLM-4.5 and later ones with experts.

    Raises:
        UnsupportedModelError: experts are weighed by another function than a sigmoid.
    """
    check_sigmoid(metadata)
    return (
        glm4(metadata)
        | routed_experts(metadata)
        | {"use_qk_norm": metadata.in_first_layer("attn_q_norm.weight") is not None}
    )


def deepseek2(metadata: Metadata) -> dict[str, Any]:
    """Return the values of DeepSeek 2 and 3, and of models with the same layers, such as GLM-4.7-Flash and Kimi K2.

    Raises:
        UnsupportedModelError: experts are chosen in a way that the file does not state or transformers does not know.
    """
    heads = metadata.integer("attention.head_count")
    is_split = metadata.has("attention.key_length_mla")
    head_dim = metadata.integer("attention.key_length_mla" if is_split else "attention.key_length")
    rotated = metadata.integer("rope.dimension_count")
    if not 0 < rotated < head_dim:
        metadata.fail("rope.dimension_count", rotated, "the rotated part of a head")
    if metadata.number("attention.temperature_scale", 0.0):
        metadata.refuse("scales its attention by the position")
    return _deepseek_experts(metadata) | {
        "num_key_value_heads": heads,
        "q_lora_rank": metadata.integer("attention.q_lora_rank")
        if metadata.in_first_layer("attn_q_a.weight") is not None
        else None,
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "head_dim": rotated,  # what transformers computes the frequencies of
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head_dim - rotated,
        "v_head_dim": metadata.integer("attention.value_length_mla" if is_split else "attention.value_length"),
        "rope_interleave": True,
    }


def _deepseek_experts(metadata: Metadata) -> dict[str, Any]:
    """Return the choice of experts of a deepseek2 file; version 3 weighs them by a sigmoid, version 2 by a softmax."""
    if not metadata.integer("expert_count", 0):
        metadata.refuse("has the layers of DeepSeek without experts")
    if metadata.integer("expert_count") >= _DEEPSEEK_GROUPED and not metadata.has("expert_group_count"):
        metadata.refuse("comes from an older converter, which did not store the groups of its experts")
    routed, function = routed_experts(metadata), metadata.integer("expert_gating_func", 0)
    if not function:  # as in llama.cpp, files without a value are version 2 or GLM-4.7-Flash
        function = _SIGMOID if metadata.file.tensors["token_embd.weight"].shape[0] == _GLM_VOCABULARY else _SOFTMAX
    if function == _SIGMOID:
        return routed
    has_bias = any(name.endswith("exp_probs_b.bias") for name in metadata.file.tensors)
    if function != _SOFTMAX or routed["norm_topk_prob"] or has_bias:
        metadata.refuse("weighs its experts as neither DeepSeek 2 nor 3 does")
    method = "group_limited_greedy" if routed["n_group"] > 1 else "greedy"
    return routed | {"model_type": "deepseek_v2", "topk_method": method}


def check_sigmoid(metadata: Metadata) -> None:
    """Refuse experts that are weighed by another function than a sigmoid.

    Raises:
        UnsupportedModelError: another function.
    """
    if (metadata.integer("expert_gating_func", 0) or _SIGMOID) != _SIGMOID:
        metadata.refuse("weighs its experts by another function than a sigmoid")


def routed_experts(metadata: Metadata) -> dict[str, Any]:
    """Return the sizes and the choice of routed experts, as DeepSeek names them."""
    return {
        "n_routed_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "n_shared_experts": metadata.integer("expert_shared_count", 0),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0),
        "norm_topk_prob": metadata.flag("expert_weights_norm"),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0) or 1.0,
        "n_group": metadata.integer("expert_group_count", 1) or 1,
        "topk_group": metadata.integer("expert_group_used_count", 1) or 1,
    }


def phi3(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Phi 3."""
    window = metadata.integer("attention.sliding_window", 0)
    return partial_rotary(metadata) | {
        "sliding_window": window or None,
        "original_max_position_embeddings": metadata.integer(
            "rope.scaling.original_context_length", metadata.integer("context_length")
        ),
    }


def seed_oss(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Seed-OSS."""
    return attention_bias(metadata) | {"attention_out_bias": metadata.in_first_layer("attn_output.bias") is not None}


def ernie4_5(metadata: Metadata) -> dict[str, Any]:
    """Return the values of ERNIE 4.5."""
    return {"use_bias": metadata.in_first_layer("attn_q.bias") is not None}


def ernie4_5_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of ERNIE 4.5 with experts."""
    return ernie4_5(metadata) | {
        "moe_num_experts": metadata.integer("expert_count"),
        "moe_k": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "moe_num_shared_experts": metadata.integer("expert_shared_count", 0),
        "moe_layer_start_index": metadata.integer("leading_dense_block_count"),
        "moe_layer_interval": metadata.integer("interleave_moe_layer_step", 1) or 1,
        "moe_layer_end_index": metadata.integer("block_count") - 1,
    }


def hunyuan_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Hunyuan with experts, each of which has the width of the shared one."""
    return attention_bias(metadata) | {
        "num_experts": metadata.integer("expert_count"),
        "moe_topk": metadata.integer("expert_used_count"),
    }


def _head_dim(metadata: Metadata) -> int:
    size = metadata.integer("attention.key_length", _width_per_head(metadata))
    return size or metadata.fail("attention.key_length", size, "the width of a head")


def _width_per_head(metadata: Metadata) -> int:
    return metadata.integer("embedding_length") // max(metadata.integer("attention.head_count"), 1)
