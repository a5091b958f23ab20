"""Tiny models with more experts than a pool holds, and passes of every kind over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.model import ModelSource
from support.hybrids import make_hybrid_config
from support.tiny_models import VOCAB, make_config, random_model, save

NUM_EXPERTS = 16
PROMPT_ROWS = 37
_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
_GLM_LITE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
}
_GLM: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
}
ARCHITECTURES = (
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "mixtral",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
    "gemma4_moe",
    "qwen3_5_moe_text",
)
_HYBRIDS = frozenset({"qwen3_5_moe_text"})


def make_moe_config(architecture: str, num_experts: int = NUM_EXPERTS, top_k: int = 4) -> Any:
    """The configuration of a tiny model, with more experts than the models of other tests."""
    match architecture:
        case "glm4_moe":
            config: Any = hf.Glm4MoeConfig(**_GLM)
        case "glm4_moe_lite":
            config = hf.Glm4MoeLiteConfig(**_GLM_LITE)
        case _:
            config = (make_hybrid_config if architecture in _HYBRIDS else make_config)(architecture)
    for name in _NAMES:
        if getattr(config, name, None):
            setattr(config, name, num_experts)
    for name in ("num_experts_per_tok", "top_k_experts"):
        if getattr(config, name, None):
            setattr(config, name, top_k)
    return config


def save_moe(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> ModelSource:
    """A checkpoint of a tiny model."""
    return save(random_model(make_moe_config(architecture, **sizes)).to(dtype), folder)


def passes(model: TreeModel, trees: tuple[int, ...] = (1, 8, 16, 33, 64, 5)) -> Iterator[Tensor]:
    """The hidden states of a prompt in chunks, of trees with accepted paths, and of single tokens."""
    generator = torch.Generator().manual_seed(3)

    def draw(most: int, count: int) -> list[int]:
        return torch.randint(0, most, (count,), generator=generator).tolist()

    yield model.append(draw(VOCAB, PROMPT_ROWS))
    for num_nodes in trees:
        length = model.cache.lengths[0]
        parents = [ROOT, *(draw(i + 1, 1)[0] - 1 for i in range(1, num_nodes))]
        tree = TokenTree(tuple(draw(VOCAB, num_nodes)), tuple(parents))
        positions = torch.tensor([length, *(length + depth for depth in tree.depths)])
        layout = RowLayout(length, 1, tree.ancestors, positions)
        yield model.forward([*draw(VOCAB, 1), *tree.tokens], PassLayout.single(layout))
        path, node = [], num_nodes - 1
        while node != ROOT:
            path.append(length + 1 + node)
            node = parents[node]
        model.cache.keep(0, length + 1, path[::-1])
    for _ in range(3):
        yield model.append(draw(VOCAB, 1))
