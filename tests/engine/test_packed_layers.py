"""Layers that stay in a CPU's memory, packed or dequantized: the same text, within the bytes that are planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf
from support.engines import make_plan, random_prompt, write
from support.gguf_files import save_gguf
from support.loading import load_engine, load_model
from support.plans import changed
from support.tiny_models import BASE, VOCAB, perturbed, save

from specchat.engine import linear
from specchat.models.quant import packing
from specchat.models.quant.kernels import matmul, packed
from specchat.models.quant.kernels.packed import can_pack
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import expanded_sizes, layer_sizes
from specchat.records.generation import Sampling

PROMPT = random_prompt(30, VOCAB)
FIGURES = BASE | {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}


class Packs:
    """Takes what is packed, whichever way is faster."""

    def fastest(self, product, calls, device):
        return next(iter(calls))


@pytest.fixture
def _packs(monkeypatch):
    for module in (matmul, packed):
        monkeypatch.setattr(module, "MIN_NUMBERS", 1)
    for module in (linear, packing):
        monkeypatch.setattr(module, "autotuner", Packs)
    if not can_pack((128, 64), torch.float32):
        pytest.skip("this torch cannot pack")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**FIGURES)).eval()
    folder = tmp_path_factory.mktemp("packed")
    return model, save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft")


SLOW = [("int8", "bf16"), ("int4", "fp32")]


def test_packed_layers_score_as_transformers_and_take_their_bytes(models, _packs):
    model, source, _ = models
    plain = sum(layer_sizes(describe(source), "fp32"))
    loaded = load_model(source, cache_rows=64)
    layers = loaded.skeleton.layers
    assert all(each.self_attn.q_proj.weight.is_meta and each.mlp.down_proj.weight.is_meta for each in layers)
    kept = sum(p.nbytes for layer in layers for p in layer.parameters() if not p.is_meta)
    assert 0.9 * plain < linear.held_bytes(loaded.skeleton.model) + kept <= plain
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(loaded.logits(loaded.append(PROMPT)), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("quant", ["none", "int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_trees_on_packed_layers_write_the_plain_text(quant, models, _packs):
    """The streamed layer is not packed, and the draft is."""
    _, source, draft = models
    made = {each: make_plan(source, each, num_layers=3, resident=(0, 2)) for each in (None, draft)}
    plain, tree = (
        changed(dataclasses.replace(plan, quant=quant), expanded=(0, 2), expanded_bytes=1) for plan in made.values()
    )
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=5)):
        with load_engine(plain, source, None) as engine:
            expected, _ = write(engine, PROMPT, sampling, 20)
        with load_engine(tree, source, draft) as engine:
            found, steps = write(engine, PROMPT, sampling, 20)
            assert linear.held_bytes(engine.target.skeleton.model) > 0
        assert found == expected and len(steps) < len(found)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [("int8", "fp32"), ("int4", "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_expanded_layers_take_at_most_the_planned_bytes(quant, dtype, models, _packs):
    _, source, _ = models
    sizes = {True: 0, False: 0}
    for is_expanded in sizes:
        plan = changed(make_plan(source, None, num_layers=3), expanded=(0, 1, 2) if is_expanded else (), dtype=dtype)
        with load_engine(dataclasses.replace(plan, quant=quant), source, None) as engine:
            sizes[is_expanded] = engine.target.nbytes
    spec = describe(source, quant)
    assert spec.layer_quant == tuple(
        sum(p.numel() for p in each.parameters() if p.ndim == 2) for each in _layers(models)
    )
    larger = {each: sum(expanded_sizes(spec, dtype, has_row_kernel=each)) for each in (True, False)}
    planned = min(larger.values()) if quant == "int4" and _keeps_codes(sizes, spec, dtype) else larger[False]
    assert sizes[False] < sizes[True] <= sizes[False] + planned - sum(layer_sizes(spec, dtype))


def test_plain_blocks_of_gguf_files_are_packed_without_more_memory(models, tmp_path, _packs):
    """Their bytes are those of the numbers; each half of a head's rows is put in order once."""
    model, _, _ = models
    source = save_gguf(model, tmp_path / "x.gguf")
    loaded = load_model(source, cache_rows=64)
    assert linear.held_bytes(loaded.skeleton.model) > 0.8 * sum(layer_sizes(describe(source), "fp32"))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(loaded.logits(loaded.append(PROMPT)), expected, atol=2e-4, rtol=1e-4)


def _layers(models):
    return models[0].model.layers


def _keeps_codes(sizes, spec, dtype):
    """Whether the processor's kernel for few rows was used, which needs fewer bytes than dequantized matrices."""
    return sizes[True] - sizes[False] < sum(spec.layer_quant)
