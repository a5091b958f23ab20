"""The text with an EAGLE-3 head is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.eagle3 import KINDS, engine_with_eagle3, save_eagle3
from support.head_texts import Case, HeadWorld, check_given_up, cross, make_world, offering
from support.targets import check_batch, check_interrupt_and_undo

from specchat.records.model import ModelSource

NUM_LAYERS, WIDTH = 4, 64


def save_head(folder: Path, kind: str, architecture: str) -> ModelSource:
    return save_eagle3(WIDTH, folder, KINDS[kind]).source


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> HeadWorld:
    return make_world(tmp_path_factory, "eagle3", NUM_LAYERS, save_head, engine_with_eagle3)


FEW = [
    Case("qwen3", "specforge", "all", 16, "greedy", retrieval=False),
    Case("gemma3", "3.1", "half", 64, "t0.8", retrieval=True),
]
CROSS = cross(("qwen3", "deepseek_v3", "gpt_oss"), KINDS)


@pytest.mark.parametrize("case", [FEW[0], pytest.param(FEW[1], marks=pytest.mark.slow)], ids=str)
def test_text_is_the_targets_own(world: HeadWorld, case: Case):
    world.check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=str)
def test_text_is_the_targets_own_full_cross(world: HeadWorld, case: Case):
    world.check(case)


@pytest.mark.slow
def test_a_batch_of_three_with_a_prompt_that_joins(world: HeadWorld):
    with world.engine("qwen3", "3.1", budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "qwen3")


def test_interrupts_and_undo(world: HeadWorld):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("qwen3", "greedy")
    with world.engine("qwen3", "3.1", budget=32, resident=()) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_a_head_that_guesses_by_chance_is_given_up(world: HeadWorld):
    """The check sees enough rows in the prompt: the head never drafts."""
    steps, _ = check_given_up(world.targets.source("qwen3"), world.head("qwen3", "specforge"), NUM_LAYERS)
    assert offering(steps) <= {"retrieval", "recycling"}
