"""The text with an MTP head is the target's own: every placement, budget and sampling, batches, interrupts and undo."""

from __future__ import annotations

import itertools

import pytest
from support.engines import make_plan, random_prompt, write
from support.heads import LAYOUTS, engine_with_head, head_of, random_target, save_with_mtp
from support.loading import load_engine
from support.targets import (
    NUM_TOKENS,
    SAMPLINGS,
    Targets,
    check_batch,
    check_head,
    check_interrupt_and_undo,
    check_text,
)
from support.tiny_models import VOCAB

STREAMING = ("all", "half", "none")
NUM_LAYERS = 4
Case = tuple[str, str, int, str, bool]  # architecture, streamed layers, budget, sampling, retrieval


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    root = tmp_path_factory.mktemp("mtp")
    return Targets(
        root, random_target, lambda model, folder, architecture: save_with_mtp(model, folder, LAYOUTS[architecture])
    )


def check(targets: Targets, case: Case) -> None:
    architecture, streaming, budget, sampling, retrieval = case
    expected = targets.text(architecture, sampling)
    resident = {"all": (), "half": range(0, NUM_LAYERS, 2), "none": None}[streaming]
    with engine_with_head(
        targets.source(architecture),
        NUM_LAYERS,
        budget=budget,
        resident=resident,
        chunk_rows=24,
        retrieval=retrieval,
    ) as engine:
        check_head(engine, expected, sampling, "mtp", streams=streaming != "none", retrieval=retrieval)


FEW: list[Case] = [
    ("qwen3", "all", 16, "greedy", False),
    ("qwen3_5_text", "half", 64, "t0.8", True),
]
CROSS: list[Case] = list(
    itertools.product(
        ("deepseek_v3", "glm4_moe", "qwen3", "qwen3_5_text", "qwen3_next"),
        STREAMING,
        (1, 16, 64),
        SAMPLINGS,
        (False, True),
    )
)


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own(targets: Targets, case: Case):
    check(targets, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(targets: Targets, case: Case):
    check(targets, case)


def test_a_batch_of_three_with_a_prompt_that_joins(targets: Targets):
    source = targets.source("qwen3_5_text")
    with engine_with_head(source, NUM_LAYERS, budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, targets, "qwen3_5_text")


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("qwen3_5_text", marks=pytest.mark.slow)])
def test_interrupts_and_undo(targets: Targets, architecture: str):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = targets.text(architecture, "greedy")
    with engine_with_head(targets.source(architecture), NUM_LAYERS, budget=32) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert sum(guess.accepted for step in steps for guess in step.guesses) > 0  # by luck: the head is random
        other = targets.text(architecture, "greedy", 12)
        check_text(other, write(engine, other.prompt, SAMPLINGS["greedy"], NUM_TOKENS)[0])
        # a turn that goes on from the end of the last answer drafts at once, and writes what it writes anew
        longer = [*other.prompt, *other.tokens, *random_prompt(5, VOCAB, 3)]
        ours, steps = write(engine, longer, SAMPLINGS["greedy"], 8)
        engine.forget()
        assert write(engine, longer, SAMPLINGS["greedy"], 8)[0] == ours
        assert steps[0].cached_rows >= len(other.prompt) and any(step.tree_nodes for step in steps[1:])


def test_a_head_that_guesses_by_chance_is_given_up(targets: Targets):
    """One warning, the target's own text, and retrieval goes on."""
    source, prompt = targets.source("qwen3"), random_prompt(60, VOCAB)
    plan = make_plan(source, head_of(source), num_layers=NUM_LAYERS, tree_budget=16, retrieval=True)
    with load_engine(plan, source, None) as engine:
        plain = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)[0]
    with load_engine(plan, source, head_of(source)) as engine:
        ours, steps = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)
        again, later = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)
    assert ours == again == plain
    warnings = [step.warning for step in (*steps, *later) if step.warning is not None]
    assert len(warnings) == 1 and "mtp" in warnings[0] and "by chance" in warnings[0]
    guesses = [guess for step in (*steps, *later) for guess in step.guesses]
    assert {guess.source for guess in guesses if guess.offered} <= {"retrieval", "recycling"}
    assert sum(guess.offered for guess in guesses) > 0
