"""Architectures of GGUF files: names of tensors, changes of their values, and values of the configuration.

An architecture that is missing here is refused by name. Names and changes are those of llama.cpp's converter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.gguf import GgufFile
from specchat.models.gguf import extras, recurrent_extras
from specchat.models.gguf.metadata import Metadata

# Stands for `kv_b_proj` where a file holds it in two halves, of which this is the first.
KEY_HALF = "self_attn.kv_b_proj.key_half"
# Modules within a layer: names in GGUF files -> names in checkpoints of transformers.
_LLAMA: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SHARED: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_MIXTRAL: Mapping[str, str] = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_MINIMAX: Mapping[str, str] = {
    **_LLAMA,
    **_MIXTRAL,
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
}
_GRANITE_MOE: Mapping[str, str] = {
    **_LLAMA,
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.gate_up_proj.*.gate",
    "ffn_up_exps": "block_sparse_moe.experts.gate_up_proj.*.up",
    "ffn_down_exps": "block_sparse_moe.experts.down_proj.*",
}
_MAMBA: Mapping[str, str] = {
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_FALCON_H1: Mapping[str, str] = {
    **{stem: name.replace("mlp.", "feed_forward.") for stem, name in _LLAMA.items() if stem != "ffn_norm"},
    **_MAMBA,
    **dict.fromkeys(("ffn_norm", "ffn_norm.weight"), "pre_ff_layernorm.weight"),
}
# One module of each layer has the name `mixer`, whatever its kind.
_NEMOTRON_H: Mapping[str, str] = {
    **{stem: name.replace("self_attn.", "mixer.").replace("mlp.", "mixer.") for stem, name in _LLAMA.items()},
    **{stem: name.replace("mamba.", "mixer.") for stem, name in _MAMBA.items()},
    "attn_norm": "norm",
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_up_exps": "mixer.experts.up_proj.*",
    "ffn_down_exps": "mixer.experts.down_proj.*",
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}
_GRANITE_HYBRID: Mapping[str, str] = {
    **_GRANITE_MOE,
    **_MAMBA,
    "ffn_gate_shexp.weight": "shared_mlp.input_linear.weight_top",
    "ffn_up_shexp.weight": "shared_mlp.input_linear.weight_bottom",
    "ffn_down_shexp": "shared_mlp.output_linear",
    # without other experts, the shared one has plain names
    "ffn_gate.weight": "shared_mlp.input_linear.weight_top",
    "ffn_up.weight": "shared_mlp.input_linear.weight_bottom",
    "ffn_down": "shared_mlp.output_linear",
}
_FOUR_NORMS: Mapping[str, str] = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA4: Mapping[str, str] = {
    **_FOUR_NORMS,
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps": "experts.gate_up_proj.*",
    "ffn_gate_exps": "experts.gate_up_proj.*.gate",
    "ffn_up_exps": "experts.gate_up_proj.*.up",
    "ffn_down_exps": "experts.down_proj.*",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
_GEMMA3N: Mapping[str, str] = {
    **_FOUR_NORMS,
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
_NORMS_AFTER: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if stem not in {"attn_norm", "ffn_norm"}},
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4: Mapping[str, str] = {
    **_LLAMA,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
_GLM4_MOE: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if stem != "ffn_norm"},
    "post_attention_norm": "post_attention_layernorm",
    **_SHARED,
}
# Newer files hold the two halves of kv_b_proj; see `tensors.Halves`.
_DEEPSEEK2: Mapping[str, str] = {
    **_LLAMA,
    **_SHARED,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b.weight": f"{KEY_HALF}.weight",
    "attn_v_b.weight": "",
}
_PHI3: Mapping[str, str] = {**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_SEED: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if stem != "ffn_norm"},
    "post_attention_norm": "post_attention_layernorm",
}
_HUNYUAN: Mapping[str, str] = {
    **_LLAMA,
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
_HUNYUAN_MOE: Mapping[str, str] = {
    **_HUNYUAN,
    **_EXPERTS,
    "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
    "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}
_ERNIE_MOE: Mapping[str, str] = {
    **_LLAMA,
    **_SHARED,
    "exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias",
}
_DELTA_NET: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if stem != "ffn_norm"},
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN3_NEXT: Mapping[str, str] = {
    **_DELTA_NET,
    **_EXPERTS,
    "attn_qkv.weight": "linear_attn.in_proj_qkvz.weight_first",
    "attn_gate.weight": "linear_attn.in_proj_qkvz.weight_second",
    "ssm_in": "linear_attn.in_proj_qkvz",  # of older files
    "ssm_ba": "linear_attn.in_proj_ba",
}
_STACKED_EXPERTS: Mapping[str, str] = {
    **_EXPERTS,
    "ffn_gate_exps": "mlp.experts.gate_up_proj.*.gate",
    "ffn_up_exps": "mlp.experts.gate_up_proj.*.up",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj.*",
    "ffn_down_exps": "mlp.experts.down_proj.*",
}
_LFM2: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if stem.startswith(("attn_q", "attn_k", "attn_v"))},
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_LFM2_MOE: Mapping[str, str] = {
    **_LFM2,
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b.bias": "feed_forward.expert_bias",
    "ffn_gate_exps": "feed_forward.experts.*.w1",
    "ffn_up_exps": "feed_forward.experts.*.w3",
    "ffn_down_exps": "feed_forward.experts.*.w2",
}
# A key with a leaf stands for one tensor; an empty name means that another tensor of the table includes it.
_GPT_OSS: Mapping[str, str] = {
    **{stem: name for stem, name in _LLAMA.items() if not stem.startswith("ffn")},
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps.weight": "mlp.experts.gate_up_proj.*.weight_even",
    "ffn_up_exps.weight": "mlp.experts.gate_up_proj.*.weight_odd",
    "ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias",
    "ffn_up_exps.bias": "",
    "ffn_down_exps.weight": "mlp.experts.down_proj.*.weight",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
# Within a layer that predicts a further token, of any architecture.
_NEXT_TOKEN: Mapping[str, str] = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_norm": "shared_head.norm",
    "nextn.shared_head_head": "shared_head.head",
}
# Outside the layers.
_REST: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "token_embd_norm": "model.embedding_norm",  # of LFM2, in the place of output_norm
    "output_norm": "model.norm",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "altup_proj": "model.altup_projections.*",
    "altup_unembd_proj": "model.altup_unembed_projections.*",
    "output": "lm_head",
}
_NEMOTRON_REST = {"token_embd": "model.embeddings", "output_norm": "model.norm_f"}
# Tensors that the configuration is made from.
_IN_CONFIG = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

# Architectures that are not read, with the reason.
_REFUSED = {
    "llama4": "whose experts transformers computes all at once, from weights that are not packed",
}
_UNKNOWN = "which specchat does not read from GGUF files"

Extra = Callable[[Metadata], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter stores one architecture.

    Attributes:
        model_type: model type of transformers.
        names: modules within a layer, GGUF's name -> name in checkpoints; "*" stands for the index of an expert.
        interleaves: whether the two halves of each head's rows of q and k are interleaved.
        adds_one: whether 1 has been added to the weights of norms, but for those within gated delta nets.
        tiles_values: whether value heads of gated delta nets are in the order of `TiledHeads`.
        varies: whether layers may have different sizes, which `extra` describes.
        fixed: values of the configuration that no file states.
        extra: further values of the configuration.
        rest: modules outside the layers that have other names than elsewhere.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    interleaves: bool = False
    adds_one: bool = False
    tiles_values: bool = False
    varies: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Extra = lambda _: {}
    rest: Mapping[str, str] = field(default_factory=dict)

    def rename(self, name: str) -> tuple[int | None, str] | None:
        """Return the layer of a tensor, None outside the layers, and its name in checkpoints; None if it is unknown.

        The name of a tensor in a layer begins after the layer's index. An empty name means that another tensor
        includes it.
        """
        is_in_layer = name.startswith("blk.")
        index, _, rest = name.removeprefix("blk.").partition(".") if is_in_layer else ("", "", name)
        stem, _, leaf = rest.rpartition(".")
        names = {**_NEXT_TOKEN, **self.names} if is_in_layer else {**_REST, **self.rest}
        if (is_in_layer and not index.isdecimal()) or (leaf not in ("weight", "bias") and rest not in names):
            return None
        full = names[rest] if rest in names else f"{names[stem]}.{leaf}" if stem in names else None
        return None if full is None else ((int(index) if is_in_layer else None), full)


def is_in_config(name: str) -> bool:
    """Return whether a tensor only serves to make the configuration."""
    return name in _IN_CONFIG


def architecture_of(file: GgufFile) -> Architecture:
    """Return the architecture of a file.

    Raises:
        UnsupportedModelError: specchat does not know the architecture.
    """
    name = file.architecture
    if name == "llama" and file.metadata.get("llama.expert_count"):
        return _MIXTRAL_ARCHITECTURE
    if name == "olmo2" and "olmo2.attention.sliding_window" in file.metadata:
        return _OLMO3
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.files[0]} has the architecture '{name}', {_REFUSED.get(name, _UNKNOWN)}",
            hint=f"use the model in safetensors, or one of: {', '.join(sorted(ARCHITECTURES))}",
        )
    return ARCHITECTURES[name]


_MIXTRAL_ARCHITECTURE = Architecture("mixtral", {**_LLAMA, **_MIXTRAL}, interleaves=True, extra=extras.mixtral)
_OLMO3 = Architecture("olmo3", _NORMS_AFTER, extra=extras.olmo3)
_NEMOTRON = Architecture(
    "nemotron_h", _NEMOTRON_H, interleaves=True, extra=recurrent_extras.nemotron_h, rest=_NEMOTRON_REST
)
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaves=True, extra=extras.attention_bias),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", extra=extras.attention_bias),
    "qwen2moe": Architecture(
        "qwen2_moe", {**_LLAMA, **_EXPERTS}, fixed={"norm_topk_prob": False}, extra=extras.shared_expert
    ),
    "qwen3moe": Architecture("qwen3_moe", {**_LLAMA, **_EXPERTS}, fixed={"norm_topk_prob": True}, extra=extras.experts),
    "qwen3next": Architecture(
        "qwen3_next", _QWEN3_NEXT, adds_one=True, fixed={"norm_topk_prob": True}, extra=recurrent_extras.qwen35_moe
    ),
    "qwen35": Architecture("qwen3_5_text", _DELTA_NET, adds_one=True, tiles_values=True, extra=recurrent_extras.qwen35),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        {**_DELTA_NET, **_STACKED_EXPERTS},
        adds_one=True,
        tiles_values=True,
        extra=recurrent_extras.qwen35_moe,
    ),
    "gemma2": Architecture("gemma2", _FOUR_NORMS, adds_one=True, fixed=_GELU, extra=extras.gemma2),
    "gemma3": Architecture("gemma3_text", _FOUR_NORMS, adds_one=True, fixed=_GELU, extra=extras.gemma3),
    "gemma3n": Architecture("gemma3n_text", _GEMMA3N, fixed=_GELU, extra=extras.gemma3n),
    "gemma4": Architecture("gemma4_text", _GEMMA4, varies=True, fixed=_GELU, extra=extras.gemma4),
    "gpt-oss": Architecture("gpt_oss", _GPT_OSS, extra=extras.gpt_oss),
    "phi3": Architecture("phi3", _PHI3, extra=extras.phi3),
    "glm4": Architecture("glm4", _GLM4, extra=extras.glm4),
    "glm4moe": Architecture("glm4_moe", _GLM4_MOE, extra=extras.glm4_moe),
    "deepseek2": Architecture("deepseek_v3", _DEEPSEEK2, extra=extras.deepseek2),
    "granite": Architecture("granite", interleaves=True, extra=extras.granite),
    "granitemoe": Architecture("granitemoe", _GRANITE_MOE, interleaves=True, extra=extras.granite_moe),
    "granitehybrid": Architecture(
        "granitemoehybrid", _GRANITE_HYBRID, interleaves=True, extra=recurrent_extras.granite_hybrid
    ),
    "falcon-h1": Architecture(
        "falcon_h1",
        _FALCON_H1,
        extra=recurrent_extras.falcon_h1,
        rest={"output_norm": "model.final_layernorm"},
    ),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "minimax-m2": Architecture("minimax_m2", _MINIMAX, extra=extras.minimax_m2),
    "mistral3": Architecture("ministral3", interleaves=True, extra=extras.mistral3),
    "smollm3": Architecture("smollm3", interleaves=True, extra=extras.attention_bias),
    "lfm2": Architecture("lfm2", _LFM2, extra=recurrent_extras.lfm2),
    "lfm2moe": Architecture("lfm2_moe", _LFM2_MOE, extra=recurrent_extras.lfm2_moe),
    "olmo2": Architecture("olmo2", _NORMS_AFTER, extra=extras.attention_bias),
    "cohere2": Architecture("cohere2", extra=extras.cohere2),
    "exaone4": Architecture("exaone4", _NORMS_AFTER, extra=extras.exaone4),
    "seed_oss": Architecture("seed_oss", _SEED, extra=extras.seed_oss),
    "ernie4_5": Architecture("ernie4_5", extra=extras.ernie4_5),
    "ernie4_5-moe": Architecture("ernie4_5_moe", _ERNIE_MOE, extra=extras.ernie4_5_moe),
    "hunyuan-moe": Architecture("hunyuan_v1_moe", _HUNYUAN_MOE, extra=extras.hunyuan_moe),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", _HUNYUAN, extra=extras.attention_bias),
}
