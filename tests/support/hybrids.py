"""Tiny random hybrids, and their texts the slow way: one token at a time through transformers' own cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from specchat.engine.sampling import Sampler
from specchat.records.generation import Sampling
from support.reference import Reference
from support.tiny_models import BASE, WINDOW, random_model

# Of a model whose number of layers follows from their kinds.
_ANY_DEPTH = {key: value for key, value in BASE.items() if key != "num_hidden_layers"}
_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 32}
_CONV = ["conv", "conv", "full_attention", "conv"]
_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]

_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {**BASE, "block_auto_adjust_ff_dim": False, "layer_types": _CONV}),
    "lfm2_moe": ("Lfm2MoeConfig", {**BASE, **_EXPERTS, "num_dense_layers": 1, "layer_types": _CONV}),
    "lfm3": (
        "Lfm3Config",
        {**BASE, "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["conv", "sliding_attention", *_CONV[2:]]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {**BASE, **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96}
        | {"layer_types": _LINEAR},
    ),
    "bamba": ("BambaConfig", {**BASE, **_MAMBA, "attn_layer_indices": [2]}),
    "falcon_h1": ("FalconH1Config", {**BASE, **_MAMBA, "head_dim": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_ANY_DEPTH,
            **{"head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
            "chunk_size": 16,
            # With other values, the two forms of transformers clamp different time steps; see `unclamp_time_steps`.
            "time_step_min": 1e-9,
            "layers_block_type": ["mlp", "linear_attention", "full_attention", "linear_attention", "mlp"],
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", {**BASE, **_GDN, **_SHARED}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**BASE, **_GDN, "rope_parameters": _ROPE}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", {**BASE, **_GDN, **_SHARED, "rope_parameters": _ROPE}),
    "jamba": (
        "JambaConfig",
        {**BASE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 3, "attn_layer_offset": 2}
        | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {
            **BASE,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 16,
            "num_mtp_layers": 0,
            "layer_types": _LINEAR,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {**BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16}
        | {"layer_types": _LINEAR},
    ),
    # The first block of attention serves the second and the last layer, and the second block one layer.
    "zamba2": (
        "Zamba2Config",
        {
            **BASE,
            **{"mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 16, "adapter_rank": 8},
            "num_hidden_layers": 5,
            "num_key_value_heads": 4,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "time_step_min": 1e-9,  # as above
            "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {**BASE, **_GDN, "head_dim": None, "num_key_value_heads": 4, "linear_num_key_heads": 4},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "model_max_length": 512,
            "layer_types": _LINEAR,
        },
    ),
}
# The oldest transformers that is allowed knows only some of them.
HYBRIDS = {architecture: known for architecture, known in _KNOWN.items() if known[0] in dir(hf)}

# The text half of Qwen3.8-27B: three gated delta nets to one attention layer.
LIKE_QWEN_27B = {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 17408,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "vocab_size": 248320,
    "dtype": "bfloat16",
}


def make_hybrid_config(architecture: str, **changes: Any) -> Any:
    name, values = HYBRIDS[architecture]
    return getattr(hf, name)(**{key: value for key, value in (values | changes).items() if value is not None})


def random_hybrid(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 hybrid whose states decay slowly in some heads and fast in others."""
    model = random_model(make_hybrid_config(architecture, **changes), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            if "A_log" in name:
                parameter.copy_((numbers.abs() + 0.05).log())
            elif "dt_bias" in name:
                parameter.copy_(numbers - 1)
            elif "conv" in name and parameter.ndim == 3:
                parameter.copy_(numbers / 2)
    return model


class OneByOne:
    """Scores of texts through a model's own single-token form; prefixes that were read before are read again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def generate(self, prompt: list[int], sampling: Sampling, num_tokens: int) -> Reference:
        """Write tokens, drawn by specchat's own sampler, with the margins of the draws."""
        sampler = Sampler(sampling, self._vocab_size, torch.device("cpu"))
        cache = self._new_cache()
        text, margins = list(prompt), []
        for position, token in enumerate(prompt):
            scores = self._score(cache, token, position)
        for _ in range(num_tokens):
            noisy = scores if sampler.noise is None else scores / sampling.temperature + sampler.noise.row(len(text))
            best = noisy.topk(2).values
            margins.append(float(best[0] - best[1]))
            text.append(sampler.draw(scores, text))
            scores = self._score(cache, text[-1], len(text) - 1)
        return Reference(prompt, text[len(prompt) :], margins)

    def scores(self, prompt: list[int]) -> torch.Tensor:
        """Scores after each token of a prompt, [S, V]."""
        cache = self._new_cache()
        return torch.stack([self._score(cache, token, position) for position, token in enumerate(prompt)])

    def _new_cache(self) -> Any:
        if self.model.config.model_type == "minimax":
            return MiniMaxCache()
        return hf.DynamicCache(config=self.model.config)

    def _score(self, cache: Any, token: int, position: int) -> torch.Tensor:
        """Read one token and return the scores of the next, [V]."""
        out = self.model(
            torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.tensor([[position]]),
        )
        return out.logits[0, -1].float()
