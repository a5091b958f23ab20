"""Hybrids that answer several requests in shared passes: each text is the one that its request gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engines import make_plan, random_prompt
from support.hybrids import HYBRIDS, OneByOne, random_hybrid
from support.loading import load_engine
from support.tiny_models import VOCAB, perturbed, save

from specchat.records.generation import Request, Sampling

NUM_TOKENS = 10
QUICK = ("qwen3_5_text", "falcon_h1", "lfm2")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in HYBRIDS],
)
def test_each_text_is_that_of_the_request_alone(architecture: str, tmp_path: Path):
    model = random_hybrid(architecture)
    slow = OneByOne(model)
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    requests = [
        Request(
            tuple(random_prompt(5 + 11 * number, VOCAB, number)),
            Sampling(temperature=0.8 * (number % 2), seed=number),
            max_tokens=NUM_TOKENS + number,
        )
        for number in range(5)
    ]
    num_layers = model.config.num_hidden_layers
    plan = make_plan(
        target, draft, num_layers=num_layers, resident=range(0, num_layers, 2), tree_budget=24, chunk_rows=16, seats=3
    )
    texts: list[list[int]] = [[] for _ in requests]
    with load_engine(plan, target, draft) as engine:
        most = 0
        for number, step in engine.generate_many(requests):
            texts[number] += step.token_ids
            most = max(most, step.num_sharing)
    assert most == 3
    for request, text in zip(requests, texts, strict=True):
        expected = slow.generate(list(request.prompt_ids), request.sampling, request.max_tokens)
        difference = expected.first_difference(text)
        assert difference is None or expected.is_near_tie(difference)
