"""Multimodal models answer text with their text half exactly as the whole model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine, load_model, prepare
from support.quantized import awq, save_quantized
from support.streamed import silent, tiny_packs
from support.tiny_models import VOCAB, perturbed, save
from support.tiny_wrappers import WRAPPERS, random_wrapper, wrapper_config

from specchat.models.hf.config import load_config
from specchat.models.hf.wrappers import wrapper_type
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 24
IDS = random_prompt(30, VOCAB)


SAMPLINGS = {"greedy": Sampling(repetition_penalty=1.3), "drawn": Sampling(temperature=0.8, top_k=0, seed=5)}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        pytest.param(name, sampling, marks=() if (number + place) % 2 else pytest.mark.slow)
        for number, name in enumerate(WRAPPERS)
        for place, sampling in enumerate(SAMPLINGS)
    ],
)
def test_text_is_the_whole_models_own(name: str, sampling: str, tmp_path: Path):
    """Compare with the wrapper's own `generate`, half of the layers streamed."""
    model = random_wrapper(wrapper_config(name))
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    expected = reference.generate(_text_only(model), IDS, SAMPLINGS[sampling], NUM_TOKENS)
    assert len(set(expected.tokens)) > 8
    plan = make_plan(target, draft, num_layers=4, resident=(0, 2), chunk_rows=16)
    with load_engine(plan, target, draft) as engine:
        ours, steps = write(engine, IDS, SAMPLINGS[sampling], NUM_TOKENS)
    difference = expected.first_difference(ours)
    assert difference is None or expected.is_near_tie(difference), f"token {difference}: {ours}, {expected.tokens}"
    assert len(steps) < NUM_TOKENS


def _text_only(model):
    """Let the reference find the vocabulary's size where it looks for it."""
    model.config.vocab_size = VOCAB
    return model


def test_a_tied_head_follows_the_wrapper(tmp_path: Path):
    model = random_wrapper(wrapper_config("gemma3", tied=True))
    source = save(model, tmp_path / "tied")
    assert _scores(source).allclose(_expected(model), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gemma3", "language_model.model.", "model.language_model."),  # as the modules are called today
        ("gemma3", "language_model.model.", "model."),  # the language model alone
        ("qwen3_vl", "model.language_model.", "language_model.model."),
        ("qwen2_vl", "model.", "model.language_model."),
        ("qwen3_vl_moe", "model.language_model.", "language_model."),
    ],
)
def test_names_of_old_and_new_checkpoints(name: str, old: str, new: str, tmp_path: Path):
    model = random_wrapper(wrapper_config(name))
    source = save(model, tmp_path / "model")
    tensors = load_file(source.path / "model.safetensors")
    renamed = {f"{new}{key.removeprefix(old)}" if key.startswith(old) else key: t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    renamed["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 3)  # a draft head, which is not read
    save_file(renamed, source.path / "model.safetensors")
    assert _scores(source).allclose(_expected(model), atol=1e-4)


def test_a_configuration_without_a_text_part_is_split(tmp_path: Path):
    """The first Qwen2-VL files have the values of the text half at the top."""
    model = random_wrapper(wrapper_config("qwen2_vl"))
    source = save(model, tmp_path / "flat")
    config = json.loads((source.path / "config.json").read_text())
    config |= {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
    (source.path / "config.json").write_text(json.dumps(config))
    assert wrapper_type(load_config(source.path)) == "qwen2_vl"
    assert _scores(source).allclose(_expected(model), atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe"])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_packs_of_text_halves_hold_the_same_numbers(name: str, quant: str, tmp_path: Path):
    """Experts are transposed in the checkpoint, under the name that they have in the model."""
    source = save(random_wrapper(wrapper_config(name)), tmp_path / "model")
    with tiny_packs(tmp_path):
        pack = prepare(source, "fp32", quant, progress=silent, warn=silent)
        assert (pack is None) is (name == "gemma3" and quant == "none")  # nothing to convert
        assert torch.equal(_scores(source, quant=quant, pack=pack), _scores(source, quant=quant))


@pytest.mark.parametrize("place", ["", "text_config"])
def test_a_prequantized_text_half_has_the_values_of_its_format(place: str, tmp_path: Path):
    """Some makers describe the quantization with the whole model, others with the text half."""
    model = random_wrapper(wrapper_config("gemma3"))
    pair = save_quantized(model, tmp_path, awq(), skip="embed|lm_head|vision|projector")
    file = pair.quantized.path / "config.json"
    config = json.loads(file.read_text())
    if place:
        config[place]["quantization_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    assert torch.equal(_scores(pair.quantized, quant="awq int4"), _scores(pair.dense))


def _expected(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].float()


def _scores(source: ModelSource, **kwargs) -> torch.Tensor:
    model = load_model(source, cache_rows=len(IDS), chunk_rows=16, **kwargs)
    try:
        return model.logits(model.append(IDS))
    finally:
        model.close()
