"""Random runs against the target alone; each round prints its seed.

TEST_SEED repeats a round. `pytest -m soak -s tests/engine/test_differential.py` goes on for TEST_MINUTES, 60 by
default, and takes one architecture after the other.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.differential import NAMES, Tally, Target, is_near, run_round
from support.engines import random_prompt
from support.streamed import tiny_packs
from support.tiny_models import VOCAB, make_config, random_model

from specchat.engine.sampling import Sampler
from specchat.records.generation import Request, Sampling


def test_random_runs_write_the_targets_text(tmp_path: Path):
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    tally = Tally()
    with tiny_packs(tmp_path):
        run_round(seed, tmp_path / "models", tally)
    assert tally.total and tally.is_good


def test_a_token_that_the_target_would_not_write_is_found():
    model, prompt = random_model(make_config("llama")), random_prompt(9, VOCAB)
    best = int(Target(model).scores(prompt, "fp32")[-1].argmax())
    twin, other = VOCAB - 1, (best + 1) % (VOCAB - 1)
    model.lm_head.weight.data[twin] = model.lm_head.weight.data[best]
    target, request = Target(model), Request(tuple(prompt), Sampling(), max_tokens=1)
    assert [target.differences(request, [token], "fp32") for token in (best, twin, other)] == [
        [],
        [(0, True)],
        [(0, False)],
    ]


BORDERS: list[tuple[dict[str, Any], tuple[float, float, float], bool]] = [
    ({"top_k": 2}, (0.5, 0.25001, 0.24999), True),
    ({"top_k": 2}, (0.5, 0.3, 0.2), False),
    ({"top_p": 0.79999}, (0.5, 0.3, 0.2), True),
    ({"top_p": 0.75}, (0.5, 0.3, 0.2), False),
    ({"min_p": 0.40001}, (0.5, 0.3, 0.2), True),
    ({"min_p": 0.45}, (0.5, 0.3, 0.2), False),
]


@pytest.mark.parametrize("limit, probabilities, expected", BORDERS, ids=str)
def test_a_token_that_is_left_out_by_a_hair_is_near(
    limit: dict[str, Any], probabilities: tuple[float, ...], expected: bool
):
    """Token 2 would win its race, but it is not among the kept tokens."""
    scores = torch.tensor(probabilities).log()

    def sampler(seed: int, **kept: Any) -> Sampler:
        return Sampler(Sampling(1.0, seed=seed, **kept), 3, torch.device("cpu"))

    seed = next(seed for seed in range(99) if sampler(seed).draw(scores, [0]) == 2)
    assert sampler(seed, **limit).draw(scores, [0]) != 2
    assert is_near(sampler(seed, **limit), scores, [0], 2, "fp32") is expected


@pytest.mark.soak
def test_random_runs_for_an_hour(tmp_path: Path):
    end = time.monotonic() + 60 * float(os.environ.get("TEST_MINUTES", "60"))
    first = seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    tally = Tally()
    with tiny_packs(tmp_path):
        while time.monotonic() < end:
            before, begin = tally.total, time.monotonic()
            name = run_round(seed, tmp_path / "models", tally, engines=2, requests=3, most_tokens=400)
            seconds = time.monotonic() - begin
            print(f"TEST_SEED={seed} {name}: {tally.total - before:,} tokens in {seconds:.0f} s", flush=True)
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # some models need no pack
            seed += 1
    print(f"TEST_SEED={first} to {seed - 1}: {tally}")
    assert tally.is_good and (len(tally.tokens) == len(NAMES) or seed - first < len(NAMES))
