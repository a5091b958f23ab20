"""Models are described without the memory of their weights, however large one tensor is."""

import torch
import transformers as hf

from specchat.models.hf.skeleton import build_skeleton


def test_experts_larger_than_any_memory_are_built():
    config = hf.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=1 << 12,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=1 << 14,
        moe_intermediate_size=1 << 14,
    )
    skeleton = build_skeleton(config, torch.float32)
    experts = skeleton.layers[0].mlp.experts
    assert experts.gate_up_proj.numel() == 1 << 41
    assert experts.gate_up_proj.is_meta
    assert not skeleton.model.model.rotary_emb.inv_freq.is_meta  # a table with values stays
