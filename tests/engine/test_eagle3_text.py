"""The text with an EAGLE-3 head is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.eagle3 import KINDS, engine_with_eagle3, save_eagle3
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.targets import (
    NUM_TOKENS,
    SAMPLINGS,
    Targets,
    check_batch,
    check_head,
    check_interrupt_and_undo,
)
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.records.model import ModelSource

NUM_LAYERS, WIDTH = 4, 64
Case = tuple[str, str, str, int, str, bool]  # architecture, head, streamed layers, budget, sampling, retrieval


@dataclass
class World:
    """Targets, and the heads that read their states."""

    targets: Targets
    root: Path
    heads: dict[str, ModelSource] = field(default_factory=dict)

    def head(self, kind: str) -> ModelSource:
        if kind not in self.heads:
            self.heads[kind] = save_eagle3(WIDTH, self.root / kind, KINDS[kind]).source
        return self.heads[kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("eagle3")
    targets = Targets(
        root, lambda architecture: random_model(make_config(architecture)), lambda model, folder, _: save(model, folder)
    )
    return World(targets, root)


def check(world: World, case: Case) -> None:
    architecture, kind, streaming, budget, sampling, retrieval = case
    expected = world.targets.text(architecture, sampling)
    resident = {"all": (), "half": range(0, NUM_LAYERS, 2), "none": None}[streaming]
    with engine_with_eagle3(
        world.targets.source(architecture),
        world.head(kind),
        NUM_LAYERS,
        budget=budget,
        resident=resident,
        chunk_rows=24,
        retrieval=retrieval,
    ) as engine:
        check_head(engine, expected, sampling, "eagle3", streams=streaming != "none", retrieval=retrieval)


FEW: list[Case] = [
    ("qwen3", "specforge", "all", 16, "greedy", False),
    ("gemma3", "3.1", "half", 64, "t0.8", True),
]
CROSS: list[Case] = list(
    itertools.product(
        ("qwen3", "deepseek_v3", "gpt_oss"), KINDS, ("all", "half", "none"), (1, 16, 64), SAMPLINGS, (False, True)
    )
)


@pytest.mark.parametrize(
    "case", [FEW[0], pytest.param(FEW[1], marks=pytest.mark.slow)], ids=lambda case: "-".join(map(str, case))
)
def test_text_is_the_targets_own(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
def test_a_batch_of_three_with_a_prompt_that_joins(world: World):
    source, head = world.targets.source("qwen3"), world.head("3.1")
    with engine_with_eagle3(source, head, NUM_LAYERS, budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "qwen3")


def test_interrupts_and_undo(world: World):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("qwen3", "greedy")
    with engine_with_eagle3(
        world.targets.source("qwen3"), world.head("3.1"), NUM_LAYERS, budget=32, resident=()
    ) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_a_head_that_guesses_by_chance_is_given_up(world: World):
    """One warning, the target's own text, and retrieval goes on."""
    source, head, prompt = world.targets.source("qwen3"), world.head("specforge"), random_prompt(60, VOCAB)
    plan = make_plan(source, head, num_layers=NUM_LAYERS, tree_budget=16, retrieval=True)
    with load_engine(plan, source, None) as engine:
        plain = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)[0]
    with load_engine(plan, source, head) as engine:
        ours, steps = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)
        again, later = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)
    assert ours == again == plain
    warnings = [step.warning for step in (*steps, *later) if step.warning is not None]
    assert len(warnings) == 1 and head.name in warnings[0] and "by chance" in warnings[0]
    guesses = [guess for step in (*steps, *later) for guess in step.guesses]
    assert {guess.source for guess in guesses if guess.offered} <= {"retrieval", "recycling"}
    assert sum(guess.offered for guess in guesses) > 0
