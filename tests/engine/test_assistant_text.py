"""The text with an assistant is the target's own: placements, budgets, samplings, batches, interrupts and undo."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.assistants import engine_with_assistant, save_assistant
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.targets import SAMPLINGS, Targets, check_batch, check_head, check_interrupt_and_undo
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.records.model import ModelSource

NUM_LAYERS = 6
Case = tuple[str, bool, str, int, str, bool]  # architecture, clusters, streamed layers, budget, sampling, retrieval


@dataclass
class World:
    """Targets, and the assistants that read their keys and values."""

    targets: Targets
    root: Path
    heads: dict[tuple[str, bool], ModelSource] = field(default_factory=dict)

    def head(self, architecture: str, *, clusters: bool = False) -> ModelSource:
        key = architecture, clusters
        if key not in self.heads:
            folder = self.root / f"{architecture}-{clusters}"
            self.heads[key] = save_assistant(folder, architecture, clusters=VOCAB if clusters else 0).source
        return self.heads[key]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("assistants")
    targets = Targets(
        root, lambda architecture: random_model(make_config(architecture)), lambda model, folder, _: save(model, folder)
    )
    return World(targets, root)


def check(world: World, case: Case) -> None:
    architecture, clusters, streaming, budget, sampling, retrieval = case
    expected = world.targets.text(architecture, sampling)
    with engine_with_assistant(
        world.targets.source(architecture),
        world.head(architecture, clusters=clusters),
        NUM_LAYERS,
        budget=budget,
        resident={"all": (), "half": range(0, NUM_LAYERS, 2), "none": None}[streaming],
        chunk_rows=24,
        retrieval=retrieval,
    ) as engine:
        check_head(engine, expected, sampling, "assistant", streams=streaming != "none", retrieval=retrieval)
        assert engine._drafter.models[0].cache.nbytes == 0, "nothing is cached"


FEW: list[Case] = [
    ("gemma4_shared", True, "all", 64, "greedy", False),
    ("gemma4", False, "half", 16, "t0.8", True),
]
CROSS: list[Case] = list(
    itertools.product(
        ("gemma4", "gemma4_shared", "gemma4_moe", "gemma4_k_eq_v"),
        (False, True),
        ("all", "half", "none"),
        (1, 16, 64),
        SAMPLINGS,
        (False, True),
    )
)


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(world: World, case: Case):
    check(world, case)


@pytest.mark.slow
def test_a_batch_of_three_with_a_prompt_that_joins(world: World):
    """Each tree attends to the rows of its own seat."""
    source, head = world.targets.source("gemma4_shared"), world.head("gemma4_shared")
    with engine_with_assistant(source, head, NUM_LAYERS, budget=32, seats=3, resident=(), chunk_rows=24) as engine:
        check_batch(engine, world.targets, "gemma4_shared")


def test_interrupts_and_undo(world: World):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = world.targets.text("gemma4_shared", "greedy")
    source, head = world.targets.source("gemma4_shared"), world.head("gemma4_shared", clusters=True)
    with engine_with_assistant(source, head, NUM_LAYERS, budget=32, resident=()) as engine:
        steps = check_interrupt_and_undo(engine, expected)
        assert any(step.tree_nodes for step in steps[1:])


@pytest.mark.slow
def test_an_assistant_that_guesses_by_chance_is_given_up(world: World):
    """One warning after the first prompt, the target's own text, and retrieval goes on."""
    source, head, prompt = world.targets.source("gemma4"), world.head("gemma4"), random_prompt(60, VOCAB)
    plan = make_plan(source, head, num_layers=NUM_LAYERS, tree_budget=16, retrieval=True)
    with load_engine(plan, source, None) as engine:
        plain = write(engine, prompt, SAMPLINGS["greedy"], 40)[0]
    with load_engine(plan, source, head) as engine:
        ours, steps = write(engine, prompt, SAMPLINGS["greedy"], 40)
    assert ours == plain
    warnings = [step.warning for step in steps]
    assert warnings[1] is not None and head.name in warnings[1] and "by chance" in warnings[1]
    assert not any(warnings[2:])
    sources = {guess.source for step in steps for guess in step.guesses if guess.offered}
    assert "assistant" not in sources and sources
