"""Hybrids write what their own modules write one token at a time, for every draft, budget and placement."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support import reference
from support.crosses import DRAFTS, STREAMING, Case, Zoo, check_steps, opened_zoo, pairs
from support.engines import make_plan, random_prompt, write
from support.hybrids import HYBRIDS, OneByOne, random_hybrid
from support.loading import load_engine, load_model
from support.tiny_models import VOCAB, save

from specchat.engine.measuring import measure_pass
from specchat.engine.selfcheck import check_architecture
from specchat.records.generation import Sampling

BUDGETS = (1, 16, 64, 256)
SAMPLINGS = {"greedy": Sampling(), "t0.8": Sampling(temperature=0.8, seed=5)}
NUM_TOKENS = 20


def slow_text(model: Any, sampling: str) -> reference.Reference:
    return OneByOne(model).generate(random_prompt(41, VOCAB), SAMPLINGS[sampling], NUM_TOKENS)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    with opened_zoo(Zoo(tmp_path_factory.mktemp("zoo"), random_hybrid, slow_text)) as zoo:
        yield zoo


def full_cross() -> list[Case]:
    return list(itertools.product(HYBRIDS, DRAFTS, BUDGETS, STREAMING, SAMPLINGS))


def covering_set() -> list[Case]:
    """Choose one case per architecture, so that many values of any two other factors meet."""
    rng = random.Random(1)
    cases = full_cross()
    rng.shuffle(cases)
    chosen: list[Case] = []
    missing = {pair for case in cases for pair in pairs(case[1:])}
    for architecture in HYBRIDS:
        of_architecture = [case for case in cases if case[0] == architecture]
        chosen.append(max(of_architecture, key=lambda case: len(missing & pairs(case[1:]))))
        missing -= pairs(chosen[-1][1:])
    return chosen


def check(zoo: Zoo, case: Case) -> None:
    architecture, draft, budget, _, sampling = case
    expected = zoo.text(architecture, sampling)
    plan = zoo.plan(case, chunk_rows=24 if budget < 100 else 160)  # several chunks in either case
    with load_engine(plan, zoo.source(architecture, "target"), zoo.source(architecture, draft)) as engine:
        ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
        again, retried = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    if zoo.compare(case, expected, ours):
        check_steps(case, steps, NUM_TOKENS)
    assert again == ours and retried[0].new_rows == 1


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if number % 2 else ()) for number, case in enumerate(covering_set())],
    ids=lambda case: "-".join(map(str, case)),
)
def test_text_is_the_targets_own(zoo: Zoo, case: Case):
    check(zoo, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_cross(), ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(zoo: Zoo, case: Case):
    check(zoo, case)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", HYBRIDS)
def test_ten_thousand_tokens_are_the_targets_own(zoo: Zoo, architecture: str):
    """Every second prompt is sampled; trees of 16 and 64 nodes take turns."""
    target, draft = zoo.source(architecture, "target"), zoo.source(architecture, "perturbed")
    slow, num_layers = OneByOne(zoo.models[architecture]), zoo.models[architecture].config.num_hidden_layers
    num_before, excused_before = zoo.num_tokens, len(zoo.excused)
    for budget in (16, 64):
        plan = make_plan(target, draft, num_layers=num_layers, ctx=448, tree_budget=budget, chunk_rows=24)
        with load_engine(plan, target, draft) as engine:
            for seed in range(13):
                sampling = Sampling(temperature=0.8, seed=seed) if seed % 2 else Sampling()
                expected = slow.generate(random_prompt(30, VOCAB, seed), sampling, 400)
                ours, _ = write(engine, expected.prompt, sampling, 400)
                zoo.compare((architecture, budget, seed), expected, ours)
    num_tokens, near_ties = zoo.num_tokens - num_before, len(zoo.excused) - excused_before
    print(f"\n{architecture}: {num_tokens} tokens compared, {near_ties} near-ties excused")
    assert num_tokens >= 10_000 and near_ties <= 1


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_transformers_generates_the_same_text(zoo: Zoo, architecture: str):
    expected = zoo.text(architecture, "greedy")
    theirs = reference.generate(zoo.models[architecture], expected.prompt, Sampling(), NUM_TOKENS)
    difference = expected.first_difference(theirs.tokens)
    assert difference is None or expected.is_near_tie(difference)


@torch.inference_mode()
def test_small_time_steps_of_nemotron_are_those_of_decoding(tmp_path: Path):
    """transformers' form by chunks clamps them; its form for one token, and the publisher's limits, do not."""
    theirs = random_hybrid("nemotron_h")
    theirs.config.time_step_min = 0.5
    source = save(theirs, tmp_path / "target")
    prompt = random_prompt(24, VOCAB)
    by_chunks = hf.AutoModelForCausalLM.from_pretrained(source.path)(torch.tensor([prompt])).logits[0]
    one_by_one = OneByOne(theirs).scores(prompt)
    ours = load_model(source, cache_rows=32, chunk_rows=7)
    found = ours.logits(ours.append(prompt))
    assert float((found - one_by_one).abs().max()) < 1e-4 * float(one_by_one.abs().max())
    assert float((by_chunks - one_by_one).abs().max()) > 0.05 * float(one_by_one.abs().max())


def test_passes_are_timed_with_and_without_room_for_trees(zoo: Zoo):
    target, draft = (zoo.source("qwen3_5_text", role) for role in ("target", "perturbed"))
    for source in (draft, None):
        with load_engine(make_plan(target, source, num_layers=4, tree_budget=16), target, source) as engine:
            assert measure_pass(engine, 16).pass_s > 0
            assert measure_pass(engine, 40).pass_s > 0


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_self_check_accepts(zoo: Zoo, architecture: str):
    check_architecture(zoo.source(architecture, "target"))
