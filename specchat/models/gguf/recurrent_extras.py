"""Values of the configuration of architectures with recurrent layers, made from the metadata of a GGUF file."""

from typing import Any

from specchat.models.gguf.extras import (
    attention_bias,
    check_sigmoid,
    experts,
    granite,
    partial_rotary,
    routed_experts,
    shared_expert,
)
from specchat.models.gguf.metadata import Metadata

_FALCON_MULTIPLIERS = (
    "embedding_multiplier",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)


def qwen35(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Qwen 3.5 and later ones: gated delta nets, with attention in every fourth layer or so."""
    keys, values = metadata.integer("ssm.group_count"), metadata.integer("ssm.time_step_rank")
    if not keys or not values or values % keys:
        metadata.fail("ssm.group_count", keys, "a number of key heads")
    return partial_rotary(metadata) | {
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_value_head_dim": metadata.integer("ssm.inner_size") // values,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "layer_types": _recurrent_types(metadata),
    }


def qwen35_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Qwen 3.5 and Qwen3-Next with experts."""
    return qwen35(metadata) | shared_expert(metadata)


def _recurrent_types(metadata: Metadata) -> list[str]:
    """Return the kind of each layer; without a list in the file, the last layer of each period has attention."""
    count = metadata.integer("block_count") - metadata.integer("nextn_predict_layers", 0)
    is_recurrent = metadata.flags("attention.recurrent_layers")
    if is_recurrent is None:
        period = metadata.integer("full_attention_interval", 4) or 1
        is_recurrent = [(layer + 1) % period != 0 for layer in range(count)]
    return ["linear_attention" if each else "full_attention" for each in is_recurrent[:count]]


def lfm2(metadata: Metadata) -> dict[str, Any]:
    """Return the values of LFM2; layers without heads of keys and values are short convolutions."""
    heads = metadata.integers("attention.head_count_kv")
    if heads is None or len(heads) != metadata.integer("block_count"):
        metadata.fail("attention.head_count_kv", heads, "a number of heads for each layer")
    return {
        "norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.conv.bias") for name in metadata.file.tensors),
        "block_auto_adjust_ff_dim": False,  # the file has the adjusted size
        "layer_types": ["full_attention" if each else "conv" for each in heads],
    }


def lfm2_moe(metadata: Metadata) -> dict[str, Any]:
    """Return the values of LFM2 with experts, which are weighed as llama.cpp does where the file says nothing.

    Raises:
        UnsupportedModelError: experts are weighed by another function than a sigmoid.
    """
    check_sigmoid(metadata)
    return (
        lfm2(metadata)
        | experts(metadata)
        | {
            "num_dense_layers": metadata.integer("leading_dense_block_count"),
            "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in metadata.file.tensors),
            "norm_topk_prob": True,
            "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0) or 1.0,
        }
    )


def granite_hybrid(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Granite 4 H; layers without heads of keys and values are Mamba 2.

    Raises:
        UnsupportedModelError: attention with rotated positions.
    """
    if metadata.has("rope.scaling.finetuned") and metadata.flag("rope.scaling.finetuned"):
        metadata.refuse("has Granite's recurrent layers beside rotated positions")
    kv_heads = metadata.each("attention.head_count_kv", metadata.integer("block_count"))
    hidden, inner = metadata.integer("embedding_length"), metadata.integer("ssm.inner_size")
    heads, count = metadata.integer("ssm.time_step_rank"), metadata.integer("expert_count", 0)
    if not heads or inner % heads or not hidden or inner % hidden:
        metadata.fail("ssm.inner_size", inner, "a multiple of the width")
    shared = "expert_shared_feed_forward_length" if count else "feed_forward_length"
    return granite(metadata) | {
        "layer_types": ["attention" if each else "mamba" for each in kv_heads],
        "position_embedding_type": "nope",
        "num_local_experts": count,
        "num_experts_per_tok": metadata.integer("expert_used_count", 0),
        "shared_intermediate_size": metadata.integer(shared),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // hidden,
        "mamba_n_groups": metadata.integer("ssm.group_count"),
        "mamba_d_state": metadata.integer("ssm.state_size"),
        "mamba_d_conv": metadata.integer("ssm.conv_kernel"),
        "mamba_conv_bias": _has_conv_bias(metadata),
    }


def falcon_h1(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Falcon-H1, whose multipliers are part of the matrices in a file.

    Raises:
        UnsupportedModelError: a head that is the input embeddings, which have multipliers of their own.
    """
    if "output.weight" not in metadata.file.tensors:
        metadata.refuse("shares the input embeddings of Falcon-H1 with its head")
    inner, heads = _mamba_sizes(metadata)
    return attention_bias(metadata) | {
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": metadata.integer("ssm.group_count"),
        "mamba_d_state": metadata.integer("ssm.state_size"),
        "mamba_d_conv": metadata.integer("ssm.conv_kernel"),
        "mamba_conv_bias": _has_conv_bias(metadata),
        "mamba_rms_norm": any(name.endswith("ssm_norm.weight") for name in metadata.file.tensors),
        "mamba_norm_before_gate": False,
        **dict.fromkeys(_FALCON_MULTIPLIERS, 1.0),
        "mlp_multipliers": [1.0] * 2,
        "ssm_multipliers": [1.0] * 5,
    }


def nemotron_h(metadata: Metadata) -> dict[str, Any]:
    """Return the values of Nemotron-H and Nemotron 3: a layer is attention, an MLP, experts, or Mamba 2."""
    count = metadata.integer("block_count") - metadata.integer("nextn_predict_layers", 0)
    inner, heads = _mamba_sizes(metadata)
    has_experts = metadata.integer("expert_count", 0) > 0
    kinds = zip(
        metadata.each("attention.head_count_kv", count), metadata.each("feed_forward_length", count), strict=True
    )
    mlp = "moe" if has_experts else "mlp"
    return {
        "layers_block_type": [
            "full_attention" if kv_heads else mlp if width else "linear_attention" for kv_heads, width in kinds
        ],
        "layer_norm_epsilon": metadata.number(
            "attention.layer_norm_rms_epsilon", metadata.number("attention.layer_norm_epsilon", 1e-5)
        ),
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "n_groups": metadata.integer("ssm.group_count"),
        "ssm_state_size": metadata.integer("ssm.state_size"),
        "conv_kernel": metadata.integer("ssm.conv_kernel"),
        "use_conv_bias": _has_conv_bias(metadata),
        **(_nemotron_experts(metadata) if has_experts else {}),
    }


def _nemotron_experts(metadata: Metadata) -> dict[str, Any]:
    check_sigmoid(metadata)
    return routed_experts(metadata) | {
        "moe_shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "moe_latent_size": metadata.integer("moe_latent_size", 0) or None,
    }


def _mamba_sizes(metadata: Metadata) -> tuple[int, int]:
    """Return the width of Mamba 2, and its number of heads."""
    inner, heads = metadata.integer("ssm.inner_size"), metadata.integer("ssm.time_step_rank")
    if not heads or inner % heads:
        metadata.fail("ssm.inner_size", inner, "a multiple of the number of heads")
    return inner, heads


def _has_conv_bias(metadata: Metadata) -> bool:
    return any(name.endswith("ssm_conv1d.bias") for name in metadata.file.tensors)
