"""Synthetic mixtures of experts: they compute the demo target's function, whatever experts their routers choose."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import init_empty_weights
from support import reference
from support.engines import make_plan, write
from support.loading import load_engine, prepare

from specchat.errors import UsageError
from specchat.models.catalog.ref import demo_source
from specchat.models.catalog.shape import parse_shape
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import read_bytes
from specchat.models.synthetic.layers import ShapeLayers, materialise, shape_files
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.plan import ExpertSlots

NUM_EXPERTS, PER_TOKEN = 8, 2
SMALL = (
    f"hidden=256,layers=9,heads=4,kv_heads=2,head_dim=64,mlp=704,experts={NUM_EXPERTS},experts_per_token={PER_TOKEN}"
)
QUESTION = "Tell me a story about a fox."
GREEDY = Sampling()


@cache
def question() -> tuple[int, ...]:
    tokenizer = load_tokenizer(demo_source("target").path)
    return tuple(tokenizer.encode(tokenizer.render([Message("user", QUESTION)])))


@cache
def demo_text() -> reference.Reference:
    model = hf.LlamaForCausalLM.from_pretrained(demo_source("target").path, dtype=torch.float32).eval()
    return reference.generate(model, list(question()), GREEDY, 30)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_model(text: str) -> Any:
    """The shape in transformers' own model, without files; in float32."""
    shape = parse_shape(text)
    layers = ShapeLayers(shape)
    tensors = dict(layers.rest())
    for i in range(layers.num_layers):
        tensors |= {f"{layers.layers_name}.{i}.{k}": v.to(copy=True) for k, v in layers.read_layer(i).items()}
    with init_empty_weights(include_buffers=False):
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**json.loads(shape_files(shape)["config.json"]))).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


@pytest.mark.slow
@torch.no_grad()
def test_every_choice_of_experts_computes_the_demo_target():
    demo = hf.LlamaForCausalLM.from_pretrained(demo_source("target").path, dtype=torch.float32).eval()
    model, text = make_model(f"{SMALL},dtype=fp32"), torch.tensor([question() * 2])
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, found: chosen.append(found[2]))
    assert (model(text).logits - demo(text).logits).abs().max() <= 1e-4
    assert len(chosen) == 9
    assert all(len(ids.unique()) > NUM_EXPERTS // 2 for ids in chosen), "also in the idle layer"
    shared = [len(set(a.tolist()) & set(b.tolist())) for ids in chosen for a, b in pairwise(ids)]
    assert sum(shared) / len(shared) > 1.3 * PER_TOKEN**2 / NUM_EXPERTS, "neighbours share more than by chance"


def test_names_order_and_shapes_match_the_module():
    shape = parse_shape("qwen-30b-a3b")
    assert (shape.experts, shape.experts_per_token, shape.mlp, shape.layers) == (128, 8, 768, 48)
    with torch.device("meta"):
        layers = hf.MixtralForCausalLM(hf.MixtralConfig(**json.loads(shape_files(shape)["config.json"]))).model.layers
    ours = ShapeLayers(shape).layer_meta(0)
    assert [(k, v.shape) for k, v in layers[0].named_parameters()] == [(k, v.shape) for k, v in ours.items()]
    assert shape.num_bytes == pytest.approx(2 * 30.5e9, rel=0.03)
    assert "128 experts of 768, 8 for a token" in shape.describe()


def test_figures_are_completed_and_checked():
    shape = parse_shape("hidden=2048,layers=12,experts=128")
    assert (shape.mlp, shape.experts_per_token) == (768, 8)
    assert parse_shape(parse_shape(SMALL).label) == parse_shape(SMALL)
    assert parse_shape("llama-8b").experts == 0
    for text in (f"{SMALL.rpartition(',')[0]},experts_per_token=17", "hidden=512,layers=8,experts_per_token=2"):
        with pytest.raises(UsageError, match="experts"):
            parse_shape(text)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_engine_reads_experts_and_writes_the_demo_target_s_text(cache_dir: Path, quant: str):
    target = materialise(replace(parse_shape(f"{SMALL},dtype=fp32"), quant=quant), warn=lambda _: None)
    draft, spec = demo_source("draft"), describe(target, quant)
    assert spec.experts is not None
    plan = replace(make_plan(target, draft, num_layers=spec.num_layers), quant=quant)
    plan = replace(plan, placement=replace(plan.placement, experts=ExpertSlots(3, NUM_EXPERTS)))
    pack = prepare(target, "fp32", quant, progress=lambda _: None, warn=lambda _: None, by_experts=True)
    with load_engine(plan, target, draft, pack) as engine:
        tokens, steps = write(engine, list(question()), GREEDY, 30)
    difference = demo_text().first_difference(tokens)
    assert quant != "none" or difference is None or demo_text().is_near_tie(difference)
    assert len(steps) < 28 and any(step.expert_hits for step in steps)
    num_read = sum(step.expert_misses + step.useless_guesses for step in steps)
    assert sum(step.streamed_bytes for step in steps) == num_read * read_bytes(spec.experts, "fp32") > 0
