"""Tokens per step on the demo pair: gains of tree, growth and shared noise, next to SpecExec's own growth.

The default run measures a few prompts; `-m slow` measures the whole set, whose figures are in the README. Text and
steps depend only on the seed, so thresholds here do not depend on timing.
"""

from __future__ import annotations

import pytest
from support.acceptance import CTX, Acceptance, load_demo, measure, model_drafter, prompts
from support.specexec import SpecExecDrafter

from specchat.records.generation import Sampling

GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.7, seed=7)


def ours(sampling: Sampling, budget: int, token_lists: list[list[int]], *, shared_noise: bool = True) -> Acceptance:
    return measure(model_drafter(budget, shared_noise=shared_noise), budget, sampling, token_lists)


def specexec(sampling: Sampling, budget: int, token_lists: list[list[int]]) -> Acceptance:
    # the longest path below a root may be as long as the budget
    return measure(SpecExecDrafter(load_demo("draft", CTX + budget)), budget, sampling, token_lists)


@pytest.fixture(scope="module")
def token_lists() -> list[list[int]]:
    return prompts()


def test_trees_of_a_few_prompts(token_lists: list[list[int]]):
    few = token_lists[::6]
    assert ours(GREEDY, 64, few).tokens_per_step >= 3.3
    assert ours(SAMPLED, 64, few).tokens_per_step >= 3.5


@pytest.mark.slow
def test_thresholds_on_the_whole_set(token_lists: list[list[int]]):
    greedy, sampled = ours(GREEDY, 64, token_lists), ours(SAMPLED, 64, token_lists)
    without_noise = ours(SAMPLED, 64, token_lists, shared_noise=False)
    print(f"\ngreedy {greedy}\nt=0.7 {sampled}\nt=0.7 without shared noise {without_noise}")
    assert greedy.tokens_per_step >= 3.3
    assert sampled.tokens_per_step >= 3.5
    assert sampled.tokens_per_step >= 1.4 * without_noise.tokens_per_step


@pytest.mark.slow
@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "t0.7"])
def test_never_below_specexecs_growth(token_lists: list[list[int]], sampling: Sampling, budget: int):
    mine, theirs = ours(sampling, budget, token_lists), specexec(sampling, budget, token_lists)
    print(f"\nbudget {budget}: {mine.tokens_per_step:.2f} against {theirs.tokens_per_step:.2f}")
    assert mine.tokens_per_step >= theirs.tokens_per_step
