"""Quantized models in the engine give transformers' scores for the same weights, streamed or not, drafted or not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.engines import make_plan, random_prompt, write
from support.hybrids import HYBRIDS, make_hybrid_config, random_hybrid
from support.loading import load_engine, load_model, prepare
from support.tiny_models import ARCHITECTURES, VOCAB, perturbed, save

from specchat.engine.model import TreeModel
from specchat.models.hf.matrices import find_matrices
from specchat.models.hf.skeleton import build_skeleton, skeleton_of
from specchat.models.packs.pack import Pack
from specchat.models.quant.modules import Matrix, QuantLinear, quant_linears
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import dequantize_bytes, layer_bytes, weight_bytes
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.recipe import QuantizeRecipe, apply_recipe
from specchat.records.generation import Sampling
from specchat.records.model import LOWER_QUANTS, ModelSource
from specchat.records.plan import Plan

CPU = torch.device("cpu")
QUANTS = LOWER_QUANTS
DEFAULT = ("llama", "llama_tied", "qwen2", "mixtral", "gpt_oss")
SHARED = "zamba2"  # its layers share a block
PROMPT = random_prompt(30, VOCAB)


def make_config(architecture: str) -> Any:
    return (make_hybrid_config if architecture in HYBRIDS else tiny_models.make_config)(architecture)


def make_model(architecture: str) -> Any:
    if architecture in HYBRIDS:
        return random_hybrid(architecture)
    return tiny_models.random_model(make_config(architecture))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, tuple[Any, ModelSource, ModelSource]] = {}
    root = tmp_path_factory.mktemp("quantized")

    def get(architecture: str) -> tuple[Any, ModelSource, ModelSource]:
        if architecture not in made:
            model = make_model(architecture)
            draft = save(perturbed(model, 0.03), root / f"{architecture}-draft")
            made[architecture] = (model, save(model, root / architecture), draft)
        return made[architecture]

    return get


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(source: ModelSource, quant: str, **kwargs: Any) -> TreeModel:
    return load_model(
        source, dtype=torch.float32, device=CPU, cache_rows=256, chunk_rows=512, quant=quant, num_slots=2, **kwargs
    )


def pack_of(source: ModelSource, quant: str) -> Pack:
    pack = prepare(source, "fp32", quant, progress=lambda _: None, warn=lambda _: None)
    assert pack is not None and pack.quantizer.startswith({"int8": "int8", "int4": "nf4", "int3": "int3"}[quant])
    return pack


def quantize_in_place(model: Any, quant: str) -> None:
    """Replace the weights of transformers' model by the dequantized ones, in the slow, obvious way."""
    recipe = QuantizeRecipe(quant)  # type: ignore[arg-type]
    skeleton = skeleton_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for matrix in find_matrices(skeleton):
        weight = parameters[matrix.path if matrix.num_experts else f"{matrix.path}.weight"]
        if matrix.is_head:  # the embeddings of a tied head stay as they are
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(rounded(weight.detach(), recipe, matrix))
            continue
        with torch.no_grad():
            for each in weight if matrix.num_experts else weight[None]:
                dense = each.T.contiguous() if matrix.transposed else each
                each.copy_(rounded(dense, recipe, matrix).T if matrix.transposed else rounded(dense, recipe, matrix))


def rounded(weight: torch.Tensor, recipe: QuantizeRecipe, matrix: Matrix) -> torch.Tensor:
    quantizer = recipe.quantizer(matrix)
    segments = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in quantizer.format.segments(*matrix.shape)}
    quantizer.quantize(weight, segments)
    return quantizer.format.dequantize(segments, 0, len(weight), torch.empty(weight.shape)).clone()


def logits(model: TreeModel) -> torch.Tensor:
    return model.logits(model.append(PROMPT))


def check_numbers(architecture: str, quant: str, models: Any) -> None:
    model, source, _ = models(architecture)
    twin = make_model(architecture)  # the same numbers
    quantize_in_place(twin, quant)
    twin.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = twin(torch.tensor([PROMPT])).logits[0]
        original = model(torch.tensor([PROMPT])).logits[0]
    found = logits(load(source, quant))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert (found - original).abs().max() > 10 * (found - expected).abs().max(), "nothing was quantized"


def check_streaming(architecture: str, quant: str, models: Any) -> None:
    """Check equal bits for slots filled from checkpoint or pack, for mapped pages and for resident layers."""
    _, source, _ = models(architecture)
    expected = logits(load(source, quant))
    pack = pack_of(source, quant)
    for kwargs in (
        {"pack": pack},
        {"resident": ()},
        {"resident": (), "pack": pack},
        {"resident": (1,), "pack": pack, "in_ram": range(99)},
    ):
        model = load(source, quant, **kwargs)
        assert torch.equal(logits(model), expected), kwargs
        model.close()


def check_speculation(architecture: str, quant: str, models: Any) -> None:
    """Check equal text with and without a draft, greedy and sampled, with the draft quantized or not."""
    _, source, draft = models(architecture)
    num_layers = make_config(architecture).num_hidden_layers

    def text(plan: Plan, sampling: Sampling) -> tuple[list[int], float]:
        with load_engine(plan, source, draft if plan.draft else None) as engine:
            tokens, steps = write(engine, PROMPT, sampling, 40)
        return tokens, len(tokens) / len(steps)

    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5)):
        plain = dataclasses.replace(make_plan(source, None, num_layers=num_layers), quant=quant)
        tree = dataclasses.replace(make_plan(source, draft, num_layers=num_layers, resident=(0,)), quant=quant)
        expected, _ = text(plain, sampling)
        for draft_quant in ("none", quant):
            found, tokens_per_step = text(dataclasses.replace(tree, draft_quant=draft_quant), sampling)
            assert found == expected
            assert tokens_per_step > (1.1 if quant == "int3" else 1.2)  # random weights lose much in 3 bits


@pytest.mark.parametrize(
    ("architecture", "quant"),
    [*itertools.product(DEFAULT, ("int8", "int4")), (SHARED, "int4"), ("mixtral", "int3")],
)
def test_scores_are_those_of_the_rounded_weights(architecture, quant, models):
    check_numbers(architecture, quant, models)


@pytest.mark.parametrize(
    ("architecture", "quant"),
    [*itertools.product(["llama_tied", "mixtral"], ("int8", "int4")), (SHARED, "int4"), ("llama_tied", "int3")],
)
def test_streamed_equals_resident(architecture, quant, models, cache):
    check_streaming(architecture, quant, models)


@pytest.mark.parametrize(("architecture", "quant"), [("llama_tied", "int8"), ("mixtral", "int4")])
def test_speculation_is_lossless(architecture, quant, models):
    check_speculation(architecture, quant, models)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, SHARED])
def test_scores_streaming_and_speculation_on_every_architecture(architecture, quant, models, cache):
    check_numbers(architecture, quant, models)
    check_streaming(architecture, quant, models)
    check_speculation(architecture, quant, models)


@pytest.mark.parametrize("quant", QUANTS)
def test_described_sizes_match_the_loaded_model(quant, models):
    for architecture in ("llama_tied", "gpt_oss", *([SHARED] if quant == "int8" else [])):
        tiny, source, _ = models(architecture)
        spec, model = describe(source, quant), load(source, quant)
        logits(model)
        layers = model.skeleton.layers
        assert [layer_bytes(spec, i, "fp32") for i in range(len(layers))] == [
            LayerLayout.of(layer).nbytes for layer in layers
        ]
        pieces = dequantize_bytes(spec, "fp32", "cpu")
        if quant == "int3":  # beside four bytes of a value, it takes up to six that come and go
            pieces = pieces * 4 // 10
        assert weight_bytes(spec, "fp32") + pieces == model.nbytes - model.cache.nbytes
        scratches = {id(linear.scratch): linear.scratch for _, linear in quant_linears(model.skeleton.model)}
        assert [scratch.memory.numel() for scratch in scratches.values()] == [pieces]
        assert spec.num_params == describe(source).num_params == tiny.num_parameters()


def test_quantize_selects_large_matrices():
    """All large matrices are quantized, but no embedding, norm or router."""
    skeleton = build_skeleton(make_config("qwen3_moe"), torch.float32)
    dense = {name for name, _ in skeleton.model.named_parameters()}
    apply_recipe(skeleton, QuantizeRecipe("int4"))
    left = {name for name, _ in skeleton.model.named_parameters()} & dense
    assert {name.rpartition("layers.")[2].lstrip("0123456789.") for name in left} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate.weight",
    }
    head = skeleton.model.get_output_embeddings()
    assert isinstance(head, QuantLinear) and head.format.name == "int8"
