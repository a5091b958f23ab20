"""GGUF files run as the models that they were made from: resident, streamed as they lie, with and without a draft."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support import reference
from support.engines import make_plan, random_prompt, write
from support.gguf_files import dequantized, differing, save_gguf
from support.hybrids import HYBRIDS, random_hybrid
from support.loading import load_engine, load_model, prepare
from support.streamed import silent
from support.tiny_models import ARCHITECTURES, BASE, SPECIAL, VOCAB, WINDOW, make_config, perturbed, random_model

from specchat.engine.model import TreeModel
from specchat.engine.streaming.readers import ShardLayerReader
from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.quant.formats import ggml_compiled
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import weight_bytes
from specchat.models.weights.open import open_weights
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 20
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Case:
    """One architecture; `values` change the configuration that the tiny models have elsewhere."""

    name: str
    config: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def model(self) -> Any:
        if self.config in HYBRIDS:
            return varied(random_hybrid(self.config, **self.values))
        if self.config in SPECIAL:
            return varied(random_model(make_config(self.config, **self.values)))
        known = dict(reversed((ARCHITECTURES | SPECIAL).values())).get(self.config, {})  # the first of several
        return varied(random_model(getattr(hf, self.config)(**{**BASE, **known, **self.values})))


def varied(model: Any) -> Any:
    """The model with different values in each norm and router; they are multiples of 1/256, so adding 1 is exact."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and ("norm" in name or "correction_bias" in name or "expert_bias" in name):
                tensor.add_((torch.randn(tensor.shape, generator=generator) * 40).round() / 256)
    return model


ROUTED = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT = {
    **{name: value for name, value in ROUTED.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
}
HALF_ROTARY = {
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
MINISTRAL_YARN = {
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 8,
}
LATENT_YARN = {"mscale": 0.707, "mscale_all_dim": 0.707}
GEMMA3 = {"num_hidden_layers": 7, "layer_types": None}
CASES = [
    Case("llama", "LlamaConfig"),
    Case("llama_3", "LlamaConfig", {"rope_parameters": _LLAMA3, "head_dim": 32, "tie_word_embeddings": True}),
    Case("llama_bias", "LlamaConfig", {"attention_bias": True}),
    Case("mistral", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    Case("mixtral", "MixtralConfig", {"sliding_window": None}),
    Case("qwen2", "Qwen2Config"),
    Case("qwen2_yarn", "Qwen2Config", {"rope_parameters": _YARN}),
    Case("qwen2_moe", "Qwen2MoeConfig"),
    Case("qwen3", "Qwen3Config", {"tie_word_embeddings": True}),
    Case("qwen3_moe", "Qwen3MoeConfig", {"norm_topk_prob": True}),
    Case("gpt_oss", "GptOssConfig", {"layer_types": None}),
    Case("gemma2", "Gemma2Config"),
    Case("gemma3", "Gemma3TextConfig", GEMMA3),
    Case("phi3", "Phi3Config", {"sliding_window": None}),
    Case("phi3_long", "Phi3Config", {"rope_parameters": _LONG, "original_max_position_embeddings": 256}),
    Case("glm4", "Glm4Config"),
    Case(
        "granite",
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    Case("smollm3", "SmolLM3Config"),
    Case("olmo2", "Olmo2Config"),
    Case("olmo3", "Olmo3Config", {"layer_types": None}),
    Case("cohere2", "Cohere2Config", {"layer_types": None, "logit_scale": 0.3}),
    Case("exaone4", "Exaone4Config", {"sliding_window": WINDOW, "sliding_window_pattern": 4}),
    Case("seed_oss", "SeedOssConfig", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
    Case("ernie4_5", "Ernie4_5Config", {"head_dim": 16}),
    Case("hunyuan", "HunYuanDenseV1Config", {"head_dim": 16}),
]
NEMOTRON_EXPERTS = {
    "layers_block_type": ["moe", "linear_attention", "full_attention", "linear_attention", "moe"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
}
# Their texts are compared among the slow tests.
MORE_CASES = [
    Case("glm4_moe", "Glm4MoeConfig", {**ROUTED, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    Case("deepseek_v3", "DeepseekV3Config", LATENT),
    Case("granite_hybrid", "granitemoehybrid"),
    Case("granite_hybrid_dense", "granitemoehybrid", {"num_local_experts": 0}),
    *(Case(name, name) for name in ("gemma4", "gemma4_shared", "gemma4_moe", "gemma4_k_eq_v")),
    Case(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        {"head_dim": 16, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    ),
    Case("hunyuan_moe", "HunYuanMoEV1Config", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    Case("gemma3n", "gemma3n"),
    Case("falcon_h1", "falcon_h1"),
    Case("falcon_h1_groups", "falcon_h1", {"mamba_n_groups": 2}),
    Case("nemotron_h", "nemotron_h"),
    Case("nemotron_h_moe", "nemotron_h", NEMOTRON_EXPERTS),
    Case("nemotron_h_latent", "nemotron_h", {**NEMOTRON_EXPERTS, "moe_latent_size": 48}),
    Case("qwen3_next", "qwen3_next"),
    Case("lfm2", "lfm2"),
    Case("lfm2_moe", "lfm2_moe"),
    Case("qwen35", "qwen3_5_text", {"linear_num_value_heads": 6}),
    Case("qwen35_moe", "qwen3_5_moe_text"),
    Case("granite_moe", "GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0}),
    Case("minimax_m2", "MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2, **HALF_ROTARY}),
    Case("ministral_3", "Ministral3Config", {"head_dim": 32, "rope_parameters": {**_YARN, **MINISTRAL_YARN}}),
    Case("deepseek_v2", "DeepseekV2Config", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    Case("deepseek_v2_groups", "DeepseekV2Config", {**LATENT, "n_group": 2, "topk_method": "group_limited_greedy"}),
    Case("deepseek_v3_yarn", "DeepseekV3Config", {**LATENT, "rope_parameters": {**_YARN, **LATENT_YARN}}),
    Case("glm4_moe_lite", "Glm4MoeLiteConfig", LATENT),
    Case("glm4_moe_bias", "Glm4MoeConfig", {**ROUTED, "attention_bias": True, "norm_topk_prob": False}),
]


def load(source: ModelSource, resident: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> TreeModel:
    return load_model(source, dtype=dtype, resident=resident, num_slots=1, cache_rows=64, chunk_rows=16)


def logits(model: TreeModel, prompt: list[int]) -> torch.Tensor:
    model.cache.truncate(0, 0)
    return model.logits(model.append(prompt))


def plain_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_every_parameter_is_reproduced(case: Case, tmp_path: Path):
    model = case.model()
    loaded = load(save_gguf(model, tmp_path / "x.gguf"), None)
    assert not differing(loaded.skeleton.model, model)
    name, some = next((name, each) for name, each in loaded.skeleton.model.named_parameters() if "norm" in name)
    some.data = some.data + 2**-20
    assert differing(loaded.skeleton.model, model) == [name]


# One model of each way in which scores depend on the file: row orders, experts, norms with an offset, sinks, biases.
QUICK = {"llama", "qwen2_moe", "qwen3", "gemma3", "gpt_oss", "glm4", "phi3_long"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(each, marks=() if str(each) in QUICK else pytest.mark.slow) for each in (*CASES, *MORE_CASES)],
    ids=str,
)
def test_scores_and_text_are_those_of_the_model(case: Case, tmp_path: Path):
    model = case.model()
    source = save_gguf(model, tmp_path / "x.gguf")
    prompt = random_prompt(20, VOCAB)
    expected = plain_logits(model, prompt)
    resident = load(source, None)
    assert not differing(resident.skeleton.model, model)
    ours = logits(resident, prompt)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4 * float(expected.std()))
    for stays in ((), (0, 2)):
        streamed = load(source, stays)
        assert torch.equal(logits(streamed, prompt), ours)
        streamed.close()
    text = reference.generate(model, prompt, Sampling(), NUM_TOKENS)
    draft = save_gguf(perturbed(model, 0.02), tmp_path / "draft.gguf", "F16")
    plan = make_plan(source, draft, num_layers=model.config.num_hidden_layers, resident=())
    with load_engine(plan, source, draft) as engine:
        tokens, steps = write(engine, prompt, Sampling(), NUM_TOKENS)
    assert text.first_difference(tokens) is None
    assert len(steps) < NUM_TOKENS


def test_latent_attention_is_read_whole_and_in_packed_halves(tmp_path: Path):
    wide = {"qk_nope_head_dim": 32, "kv_lora_rank": 32}
    model = Case("x", "DeepseekV3Config", {**LATENT, **wide, "num_hidden_layers": 2}).model()
    older = load(save_gguf(model, tmp_path / "older.gguf", splits_kv=False), None)
    assert not differing(older.skeleton.model, model)
    newer = load(save_gguf(model, tmp_path / "newer.gguf", "Q8_0"), None)
    wanted = model.model.layers[1].self_attn.kv_b_proj.weight
    error = (newer.skeleton.layers[1].self_attn.kv_b_proj.weight - wanted).abs().max()
    assert 0 < error <= wanted.abs().max() / 220  # half a step of 8 bits, and the scale's rounding


@pytest.mark.parametrize(
    ("config", "kind"), [("qwen3_5_text", "Q8_0"), ("qwen3_5_text", "BF16"), ("qwen3_next", "Q8_0")]
)
def test_value_heads_are_put_in_order_across_blocks(config: str, kind: str, tmp_path: Path):
    """Heads are 16 wide and blocks 32, so that a block of the columns holds parts of two heads."""
    model = Case("x", config, {"linear_num_value_heads": 6}).model()
    loaded = load(save_gguf(model, tmp_path / "x.gguf", kind), None).skeleton.layers[1].linear_attn
    for name in ("in_proj_qkv", "in_proj_z", "out_proj") if config != "qwen3_next" else ("in_proj_qkvz", "out_proj"):
        matrix, wanted = getattr(loaded, name), getattr(model.model.layers[1].linear_attn, name).weight
        ours = matrix.format.dequantize(matrix.segments, 0, len(wanted), torch.empty(wanted.shape))
        assert (
            0 < (ours - wanted).abs().max() <= wanted.abs().max() / 220
        )  # half a step of 8 bits, and the scale's rounding
        some = matrix.format.dequantize(matrix.segments, 5, 23, torch.empty(18, wanted.shape[1]))
        assert torch.equal(some, ours[5:23])


def test_mistral_models_before_ministral_3_are_read_as_llama(tmp_path: Path):
    model = Case("x", "MistralConfig", {"sliding_window": None, "num_hidden_layers": 2}).model()
    loaded = load(save_gguf(model, tmp_path / "x.gguf", arch="mistral3"), None)
    assert not differing(loaded.skeleton.model, model)
    prompt = random_prompt(20, VOCAB)
    expected = plain_logits(model, prompt)
    torch.testing.assert_close(logits(loaded, prompt), expected, rtol=1e-4, atol=2e-4 * float(expected.std()))


def test_multipliers_of_falcon_are_part_of_its_matrices(tmp_path: Path):
    names = ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out")
    factors = {f"{name}_multiplier": 0.6 + 0.2 * index for index, name in enumerate(names)}
    lists = {"mlp_multipliers": [0.7, 1.3], "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "num_hidden_layers": 2}
    model = Case("x", "falcon_h1", factors | lists).model()
    loaded = load(save_gguf(model, tmp_path / "x.gguf"), None)
    prompt = random_prompt(20, VOCAB)
    expected = plain_logits(model, prompt)
    torch.testing.assert_close(logits(loaded, prompt), expected, rtol=1e-4, atol=2e-4 * float(expected.std()))


def test_older_files_of_gemma_3n_drop_as_many_activations_as_llama_cpp(tmp_path: Path):
    model = Case("x", "gemma3n").model()
    scales = [1.6448534727096558, float("-inf")] * 3
    newer = save_gguf(model, tmp_path / "newer.gguf", activation_sparsity_scale=scales)
    assert json.loads((newer.path / "config.json").read_text())["activation_sparsity_pattern"] == [0.95, 0.0] * 3
    older = save_gguf(model, tmp_path / "older.gguf", activation_sparsity_scale=[])
    assert json.loads((older.path / "config.json").read_text())["activation_sparsity_pattern"] == [0.95] * 6


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"expert_count": 256}, "older converter"),
        ({"expert_gating_func": 1}, "as neither DeepSeek 2 nor 3"),
        ({"attention__temperature_scale": 0.1}, "by the position"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "without a multiplier"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unclear_variants_of_deepseek_are_refused(values: dict[str, Any], why: str, tmp_path: Path):
    model = Case("x", "DeepseekV3Config", {**LATENT, "num_hidden_layers": 1, "n_group": None}).model()
    with pytest.raises(UnsupportedModelError, match=why):
        save_gguf(model, tmp_path / "x.gguf", **values)


# --- blocks ----------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 3}


def mixed(name: str) -> str:
    """A type for each matrix, as in real files."""
    kinds = {"attn_v": "Q8_0", "ffn_down": "Q5_1", "attn_q": "Q5_0", "output.": "Q8_0", "token_embd": "Q4_1"}
    return next((kind for part, kind in kinds.items() if part in name), "Q4_0")


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q8_0", "MXFP4", "BF16", "F16", mixed], ids=lambda kind: getattr(kind, "__name__", kind)
)
@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen3MoeConfig", "Gemma3TextConfig"])
def test_packed_models_score_as_their_dequantized_twins(kind: Any, config: str, tmp_path: Path):
    own = {"layer_types": None, "query_pre_attn_scalar": 32}
    values = own if config.startswith("Gemma") else {"moe_intermediate_size": 64, "norm_topk_prob": True}
    model = Case("x", config, WIDE | values).model()
    source = save_gguf(model, tmp_path / "x.gguf", kind)
    dequantized(model, kind)
    prompt = random_prompt(20, VOCAB)
    expected = plain_logits(model, prompt)
    ours = logits(load(source, None), prompt)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4 * float(expected.std()))
    streamed = load(source, (1,))
    assert torch.equal(logits(streamed, prompt), ours)
    streamed.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", ["LlamaConfig", "Gemma2Config", "MixtralConfig"])
def test_files_are_streamed_as_they_lie(config: str, dtype: Any, tmp_path: Path):
    model = Case("x", config, WIDE).model()
    source = save_gguf(model, tmp_path / "x.gguf", "Q4_0")
    weights = open_weights(source, dtype, "none")
    assert weights.reader.is_streamable
    assert prepare(source, dtype, progress=silent, warn=silent) is None
    for index, layer in enumerate(weights.skeleton.layers):
        segments = dict(layer.named_parameters())
        places = weights.reader.places(index)
        held = weights.reader.held(index)
        assert places.keys() | held.keys() == segments.keys()
        assert all(info.nbytes == segments[name].nbytes for name, info in places.items())
        assert sum(t.nbytes for t in held.values()) < 0.05 * sum(info.nbytes for info in places.values())
        begins = sorted((info.offset, info.offset + info.nbytes) for info in places.values())
        assert begins[-1][1] - begins[0][0] < 1.05 * sum(info.nbytes for info in places.values()) + 4096  # one run
    weights.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_text_is_the_same_with_compiled_loops_and_by_torch(dtype: Any, tmp_path: Path, monkeypatch):
    pytest.importorskip("numba")
    model = Case("x", "LlamaConfig", WIDE).model()
    source = save_gguf(model, tmp_path / "x.gguf", "Q4_0")
    draft = save_gguf(perturbed(model, 0.02), tmp_path / "draft.gguf", "Q8_0")
    plan = make_plan(source, draft, num_layers=model.config.num_hidden_layers, resident=())
    plan = replace(plan, work=replace(plan.work, dtype=dtype))
    texts = []
    for _ in range(2):
        with load_engine(plan, source, draft) as engine:
            texts.append(write(engine, random_prompt(20, VOCAB), Sampling(), NUM_TOKENS)[0])
        monkeypatch.setattr(ggml_compiled, "fill", lambda kind, rows, out: False)
    assert texts[0] == texts[1]


def test_loops_are_compiled_while_a_model_is_loaded(tmp_path: Path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(ggml_compiled, "_compiled", {})
    model = load(save_gguf(Case("x", "LlamaConfig", WIDE).model(), tmp_path / "x.gguf", "Q5_0"), ())
    assert ggml_compiled._compiled["Q5_0", torch.float32] is not None
    model.close()


def test_each_pass_reads_the_packed_bytes_of_streamed_layers(tmp_path: Path):
    source = save_gguf(Case("x", "LlamaConfig", WIDE).model(), tmp_path / "x.gguf", "Q8_0")
    model = load(source, ())
    reader = model.streamer._reader
    assert isinstance(reader, ShardLayerReader)
    slot = torch.full((reader._layouts[1].nbytes,), 255, dtype=torch.uint8)
    for task in reader.chunks(1, slot):
        task()
    resident = load(source, None).skeleton.layers[1]
    for name, view in reader._layouts[1].views(slot).items():
        assert torch.equal(view, resident.get_parameter(name)), name
    model.close()


def test_sizes_are_known_from_the_header(tmp_path: Path):
    model = Case("x", "Qwen3MoeConfig", WIDE | {"moe_intermediate_size": 64}).model()
    source = save_gguf(model, tmp_path / "x.gguf", mixed)
    spec = describe(source)
    assert spec.quant.startswith("gguf q")
    assert spec.num_params == sum(p.numel() for p in model.parameters())
    loaded = load(source, None)
    in_layers = sum(p.nbytes for layer in loaded.skeleton.layers for p in layer.parameters())
    others = sum(p.nbytes for p in loaded.skeleton.model.parameters()) - in_layers
    padding = weight_bytes(spec, "fp32") - in_layers - others
    assert 0 <= padding < 256 * sum(map(len, spec.layer_params)) + 4096 * spec.num_layers + spec.buffer_bytes


def test_unknown_tensors_and_architectures_are_refused_by_name(tmp_path: Path):
    model = Case("x", "LlamaConfig").model()
    with pytest.raises(UnsupportedModelError, match="scales its positions by 'magic'") as caught:
        save_gguf(model, tmp_path / "a.gguf", rope__scaling__type="magic", rope__scaling__factor=2.0)
    assert caught.value.hint
    with pytest.raises(UnsupportedModelError, match=r"'llama4', whose experts transformers computes all at once"):
        save_gguf(model, tmp_path / "c.gguf", arch="llama4")
    with pytest.raises(CorruptCheckpointError, match="head_count"):
        save_gguf(model, tmp_path / "b.gguf", attention__head_count="many")


def test_packed_matrices_are_read_straight_into_their_layer(tmp_path: Path, monkeypatch):
    """A copy of each matrix beside its layer would be a peak that no ledger counts."""
    source = save_gguf(Case("x", "LlamaConfig", WIDE).model(), tmp_path / "x.gguf", mixed)
    expected = load(source, None).skeleton.layers[0]
    found: list[str] = []
    read = TensorReader.read
    monkeypatch.setattr(TensorReader, "read", lambda self, key, *rest: (found.append(key), read(self, key, *rest))[1])
    layer = load(source, None).skeleton.layers[0]
    assert not [key for key in found if "proj" in key]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
