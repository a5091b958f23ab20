"""The text with an assistant is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.assistants import engine_with_assistant, save_assistant
from support.head_texts import Case, HeadWorld, check_given_up, cross, make_world
from support.targets import check_batch, check_interrupt_and_undo
from support.tiny_models import VOCAB

from specchat.engine.engine import Engine
from specchat.records.model import ModelSource

NUM_LAYERS = 6
KINDS = ("whole", "clusters")  # of the output: all scores, or those of some clusters of tokens


def save_head(folder: Path, kind: str, architecture: str) -> ModelSource:
    return save_assistant(folder, architecture, clusters=VOCAB if kind == "clusters" else 0).source


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> HeadWorld:
    return make_world(tmp_path_factory, "assistant", NUM_LAYERS, save_head, engine_with_assistant)


def has_no_cache(engine: Engine) -> None:
    assert engine._drafter.models[0].cache.nbytes == 0, "nothing is cached"


FEW = [
    Case("gemma4_shared", "clusters", "all", 64, "greedy", retrieval=False),
    Case("gemma4", "whole", "half", 16, "t0.8", retrieval=True),
]
CROSS = cross(("gemma4", "gemma4_shared", "gemma4_moe", "gemma4_k_eq_v"), KINDS)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_text_is_the_targets_own(world: HeadWorld, case: Case):
    world.check(case, has_no_cache)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=str)
def test_text_is_the_targets_own_full_cross(world: HeadWorld, case: Case):
    world.check(case, has_no_cache)


@pytest.mark.slow
def test_a_batch_of_three_with_a_prompt_that_joins(world: HeadWorld):
    """Each tree attends to the rows of its own seat."""
    with world.engine("gemma4_shared", "whole", budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "gemma4_shared")


def test_interrupts_and_undo(world: HeadWorld):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("gemma4_shared", "greedy")
    with world.engine("gemma4_shared", "clusters", budget=32, resident=()) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_an_assistant_that_guesses_by_chance_is_given_up(world: HeadWorld):
    """The warning comes after the first prompt, before the assistant has drafted."""
    source, head = world.targets.source("gemma4"), world.head("gemma4", "whole")
    _, given_up = check_given_up(source, head, NUM_LAYERS, num_tokens=40)
    assert given_up == 1
