"""The text with a DFlash head is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.dflash import engine_with_dflash, save_dflash
from support.dflash2 import save_dflash2
from support.head_texts import Case, HeadWorld, check_given_up, cross, make_world, offering
from support.targets import check_batch, check_interrupt_and_undo

from specchat.records.model import ModelSource

NUM_LAYERS = 4


def save_head(folder: Path, kind: str, architecture: str) -> ModelSource:
    make = save_dflash2 if kind == "second" else save_dflash
    return make(folder, sliding=kind == "sliding").source


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> HeadWorld:
    return make_world(tmp_path_factory, "dflash", NUM_LAYERS, save_head, engine_with_dflash)


def check(world: HeadWorld, case: Case) -> None:
    steps = world.check(case)
    drafted = [guess for step in steps[1:] for guess in step.guesses if guess.source == "dflash"]
    assert all(guess.draft_passes <= 1 for guess in drafted), "one pass a tree"


FEW = [
    Case("qwen3", "full", "all", 16, "greedy", retrieval=False),
    Case("gemma3", "sliding", "half", 64, "t0.8", retrieval=True),
    Case("qwen3", "second", "half", 16, "t0.8", retrieval=True),
]
CROSS = cross(("qwen3", "deepseek_v3", "gpt_oss"), ("full", "sliding", "second"))


@pytest.mark.parametrize("case", [*FEW[1:], pytest.param(FEW[0], marks=pytest.mark.slow)], ids=str)
def test_text_is_the_targets_own(world: HeadWorld, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=str)
def test_text_is_the_targets_own_full_cross(world: HeadWorld, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "second"])
def test_a_batch_of_three_with_a_prompt_that_joins(world: HeadWorld, kind: str):
    with world.engine("qwen3", kind, budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "qwen3")


@pytest.mark.slow
def test_interrupts_and_undo(world: HeadWorld):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("qwen3", "greedy")
    with world.engine("qwen3", "full", budget=32, resident=()) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_a_head_that_guesses_by_chance_is_given_up(world: HeadWorld):
    """The head drafts until the check has seen enough of its guesses."""
    source, head = world.targets.source("qwen3"), world.head("qwen3", "full")
    steps, given_up = check_given_up(source, head, NUM_LAYERS, num_tokens=90)
    assert "dflash" in offering(steps[:given_up])
