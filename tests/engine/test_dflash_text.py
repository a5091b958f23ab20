"""The text with a DFlash head is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.dflash import engine_with_dflash, save_dflash
from support.dflash2 import save_dflash2
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.targets import (
    SAMPLINGS,
    Targets,
    check_batch,
    check_head,
    check_interrupt_and_undo,
)
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.records.model import ModelSource

NUM_LAYERS = 4
Case = tuple[str, str, str, int, str, bool]  # architecture, head, streamed layers, budget, sampling, retrieval


@dataclass
class World:
    """Targets, and the heads that read their states."""

    targets: Targets
    root: Path
    heads: dict[str, ModelSource] = field(default_factory=dict)

    def head(self, kind: str) -> ModelSource:
        if kind not in self.heads:
            make = save_dflash2 if kind == "second" else save_dflash
            self.heads[kind] = make(self.root / kind, sliding=kind == "sliding").source
        return self.heads[kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("dflash")
    targets = Targets(
        root, lambda architecture: random_model(make_config(architecture)), lambda model, folder, _: save(model, folder)
    )
    return World(targets, root)


def check(world: World, case: Case) -> None:
    architecture, kind, streaming, budget, sampling, retrieval = case
    expected = world.targets.text(architecture, sampling)
    resident = {"all": (), "half": range(0, NUM_LAYERS, 2), "none": None}[streaming]
    with engine_with_dflash(
        world.targets.source(architecture),
        world.head(kind),
        NUM_LAYERS,
        budget=budget,
        resident=resident,
        chunk_rows=24,
        retrieval=retrieval,
    ) as engine:
        steps = check_head(engine, expected, sampling, "dflash", streams=streaming != "none", retrieval=retrieval)
    drafted = [guess for step in steps[1:] for guess in step.guesses if guess.source == "dflash"]
    assert all(guess.draft_passes <= 1 for guess in drafted), "one pass a tree"


FEW: list[Case] = [
    ("qwen3", "full", "all", 16, "greedy", False),
    ("gemma3", "sliding", "half", 64, "t0.8", True),
    ("qwen3", "second", "half", 16, "t0.8", True),
]
CROSS: list[Case] = list(
    itertools.product(
        ("qwen3", "deepseek_v3", "gpt_oss"),
        ("full", "sliding", "second"),
        ("all", "half", "none"),
        (1, 16, 64),
        SAMPLINGS,
        (False, True),
    )
)


@pytest.mark.parametrize(
    "case", [*FEW[1:], pytest.param(FEW[0], marks=pytest.mark.slow)], ids=lambda case: "-".join(map(str, case))
)
def test_text_is_the_targets_own(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "second"])
def test_a_batch_of_three_with_a_prompt_that_joins(world: World, kind: str):
    source, head = world.targets.source("qwen3"), world.head(kind)
    with engine_with_dflash(source, head, NUM_LAYERS, budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "qwen3")


@pytest.mark.slow
def test_interrupts_and_undo(world: World):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("qwen3", "greedy")
    with engine_with_dflash(
        world.targets.source("qwen3"), world.head("full"), NUM_LAYERS, budget=32, resident=()
    ) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_a_head_that_guesses_by_chance_is_given_up(world: World):
    """One warning, the target's own text, and retrieval goes on."""
    source, head, prompt = world.targets.source("qwen3"), world.head("full"), random_prompt(60, VOCAB)
    plan = make_plan(source, head, num_layers=NUM_LAYERS, tree_budget=16, retrieval=True)
    with load_engine(plan, source, None) as engine:
        plain = write(engine, prompt, SAMPLINGS["greedy"], 90)[0]
    with load_engine(plan, source, head) as engine:
        ours, steps = write(engine, prompt, SAMPLINGS["greedy"], 90)
    assert ours == plain
    (given_up,) = [place for place, step in enumerate(steps) if step.warning is not None]
    warning = steps[given_up].warning
    assert warning is not None and head.name in warning and "by chance" in warning
    before, after = (
        {guess.source for step in part for guess in step.guesses if guess.offered}
        for part in (steps[:given_up], steps[given_up:])
    )
    assert "dflash" in before and "dflash" not in after and after
