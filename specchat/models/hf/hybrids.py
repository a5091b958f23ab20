"""Hybrid architectures: which of their layers are recurrent, by model type."""

import math
from typing import Any, Literal

# What a layer keeps between passes: rows of keys and values, a running state, both, or nothing.
LayerKind = Literal["rows", "state", "both", "nothing"]

# Model types whose recurrent layers run with specchat's scans.
HYBRIDS = frozenset(
    {
        *("lfm2", "lfm2_moe", "lfm3"),
        *("granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "jamba", "zamba2"),
        *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid"),
        "minimax",
    }
)
_KINDS: dict[str, LayerKind] = {
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "hybrid": "both",
    "hybrid_sliding": "both",
    "mlp": "nothing",
    "moe": "nothing",
}
# Lengths of the tuples that the layers of some architectures return; the others return hidden states.
_TUPLE_LENGTHS = {"bamba": 2, "falcon_h1": 1}


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Return what each layer of a configuration keeps between passes."""
    if config.model_type not in HYBRIDS:
        return ("rows",) * config.num_hidden_layers
    return tuple(_KINDS.get(kind, "rows") for kind in config.layer_types)


def known_kinds(config: Any) -> set[str]:
    """Return the names of kinds of recurrent layers that specchat computes for a configuration."""
    return set(_KINDS) if config.model_type in HYBRIDS else set()


def asks_for_caches(config: Any) -> bool:
    """Return whether a model may be told to use its cache: MiniMax then only takes a cache of its own class."""
    return bool(config.model_type != "minimax")


def layer_output(config: Any, hidden: Any) -> Any:
    """Return hidden states in the form in which a layer of the architecture returns them."""
    length = _TUPLE_LENGTHS.get(config.model_type)
    return hidden if length is None else (hidden, *[None] * (length - 1))


def tiny_values(config: Any, hidden_size: int, layers: list[int]) -> dict[str, Any]:
    """Return the sizes of a tiny model's recurrent layers; dimensions of heads stay.

    Args:
        config: configuration of the whole model.
        hidden_size: hidden size of the tiny model.
        layers: indices of the layers that the tiny model keeps.
    """
    if config.model_type not in HYBRIDS:
        return {}
    values: dict[str, Any] = {"linear_num_heads": 2, "moe_shared_expert_intermediate_size": 32}
    if value_heads := getattr(config, "linear_num_value_heads", None):
        served = value_heads // config.linear_num_key_heads
        values |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * served}
    if kinds := getattr(config, "mlp_layer_types", None):
        values["mlp_layer_types"] = [kinds[layer] for layer in layers]
    return values | _tiny_mamba(config, hidden_size)


def _tiny_mamba(config: Any, hidden_size: int) -> dict[str, Any]:
    if getattr(config, "hybrid_layer_ids", None):
        return _tiny_zamba(config, hidden_size)
    if getattr(config, "mamba_num_heads", None):  # Nemotron-H
        groups = min(config.n_groups, 2)
        return {"n_groups": groups, "mamba_num_heads": 2 * groups}
    if getattr(config, "mamba_d_ssm", None):  # Falcon-H1
        groups = min(config.mamba_n_groups, 2)
        heads = 2 * groups
        return {"mamba_n_groups": groups, "mamba_n_heads": heads, "mamba_d_ssm": heads * config.mamba_d_head}
    if getattr(config, "mamba_d_head", None):  # Mamba 1 has channels instead of heads
        heads = config.mamba_expand * hidden_size // config.mamba_d_head
        return {"mamba_n_heads": heads, "mamba_n_groups": math.gcd(heads, config.mamba_n_groups)}
    return {}


def _tiny_zamba(config: Any, attention_size: int) -> dict[str, Any]:
    """Return the sizes of a tiny Zamba 2, whose attention is twice as wide as its layers.

    Its first block serves two layers. All blocks have adapters for each of their layers.
    """
    num_blocks = min(config.num_mem_blocks, 2)
    hidden_size = attention_size // 2
    head_dim = math.gcd(config.mamba_expand * hidden_size, config.mamba_headdim)
    heads = config.mamba_expand * hidden_size // head_dim
    kinds = ["linear_attention"] + ["hybrid"] * (num_blocks + 1)
    return {
        "hidden_size": hidden_size,
        "attention_hidden_size": attention_size,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "hybrid_layer_ids": list(range(1, len(kinds))),
        "num_mem_blocks": num_blocks,
        "adapter_rank": 8,
        "mamba_headdim": head_dim,
        "n_mamba_heads": heads,
        "mamba_ngroups": math.gcd(heads, config.mamba_ngroups),
    }
