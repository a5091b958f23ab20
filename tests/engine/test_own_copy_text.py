"""The text with the target's own low-bit copy is the target's own: placements, budgets, batches, interrupts, undo."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import Quiet, load_engine, load_model
from support.plans import changed
from support.shortages import ShortMachine
from support.streamed import tiny_packs
from support.targets import NUM_TOKENS, SAMPLINGS, Targets, check_batch, check_interrupt_and_undo, check_text
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting.own_copy import CopyModel
from specchat.engine.drafting.policy import FixedPolicy
from specchat.engine.engine import Engine
from specchat.engine.model import PassCancelledError
from specchat.hardware.pressure import MemoryWatch
from specchat.loading.engine import make_packs
from specchat.records.generation import Request
from specchat.records.model import ModelSource
from specchat.units import MIB

RESIDENT: dict[str, tuple[int, ...] | None] = {"all": (), "half": (0, 2), "none": None}  # by streamed layers
NUM_LAYERS = 4
Case = tuple[str, str, int, str, bool]  # architecture, streamed layers, budget, sampling, retrieval


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    root = tmp_path_factory.mktemp("copies")
    return Targets(
        root, lambda architecture: random_model(make_config(architecture)), lambda model, folder, _: save(model, folder)
    )


@contextmanager
def engine_with_copy(
    target: ModelSource,
    *,
    budget: int,
    streamed: str = "all",
    quant: str = "int8",
    watch: MemoryWatch | None = None,
    **options: Any,
) -> Iterator[Engine]:
    copy = replace(target, name="self", part="self")
    plan = make_plan(
        target, copy, num_layers=NUM_LAYERS, resident=RESIDENT[streamed], tree_budget=budget, chunk_rows=24, **options
    )
    with load_engine(changed(plan, draft_quant=quant, shares_cache=True), target, copy, watch=watch) as engine:
        yield engine


def check(targets: Targets, case: Case) -> None:
    architecture, streamed, budget, sampling, retrieval = case
    expected = targets.text(architecture, sampling)
    with engine_with_copy(
        targets.source(architecture), budget=budget, streamed=streamed, retrieval=retrieval
    ) as engine:
        ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    check_text(expected, ours)
    by_copy = [guess for step in steps for guess in step.guesses if guess.source == "self"]
    assert sum(guess.offered for guess in by_copy) > 0
    assert retrieval or sum(guess.accepted for guess in by_copy) >= len(steps) - 3  # 8 bits: hardly a wrong guess
    assert (steps[0].streamed_bytes > 0) == (streamed != "none")


FEW: list[Case] = [("llama", "all", 16, "greedy", False), ("gemma2", "half", 16, "t0.8", True)]
CROSS: list[Case] = list(
    itertools.product(("llama", "gemma2", "qwen3_moe", "deepseek_v3"), RESIDENT, (1, 16, 64), SAMPLINGS, (False, True))
)


@pytest.mark.parametrize("case", FEW, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own(targets: Targets, case: Case):
    check(targets, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(targets: Targets, case: Case):
    check(targets, case)


def test_a_batch_of_three_with_a_prompt_that_joins(targets: Targets):
    with engine_with_copy(targets.source("llama"), budget=32, seats=3) as engine:
        check_batch(engine, targets, "llama")


def test_interrupts_and_undo(targets: Targets):
    """After an interrupt, an undo and another question, texts are the target's own, and drafts go on."""
    expected = targets.text("llama", "greedy")
    with engine_with_copy(targets.source("llama"), budget=16, streamed="half", quant="int4") as engine:
        check_interrupt_and_undo(engine, expected)
        other = targets.text("llama", "greedy", 12)
        ours, steps = write(engine, other.prompt, SAMPLINGS["greedy"], NUM_TOKENS)
        check_text(other, ours)
        assert sum(guess.accepted for step in steps for guess in step.guesses if guess.source == "self") > 0
        for length, reads in ((60, True), (80, False)):  # the copy reads short turns for a first tree
            turn = [*other.prompt, *other.tokens, *random_prompt(length, VOCAB, length)]
            ours, steps = write(engine, turn, SAMPLINGS["greedy"], 8)
            assert (steps[0].tree_nodes > 0) == reads and steps[1].tree_nodes > 0
            engine.forget()
            assert write(engine, turn, SAMPLINGS["greedy"], 8)[0] == ours


# --- the shared cache ------------------------------------------------------------------------------------------------


def rows_of(engine: Engine, length: int) -> list[torch.Tensor]:
    return [layer.keys[:, :, :length].clone() for layer in engine.target.cache.layers]


@pytest.mark.parametrize("fault", ["none", "cancelled", "nan"])
def test_the_target_never_finds_rows_of_the_copy(targets: Targets, fault: str):
    """Growth leaves the committed rows and their number, whether it ends, is cancelled, or computes NaN."""
    expected = targets.text("llama", "greedy")
    with engine_with_copy(targets.source("llama"), budget=16) as engine:
        write(engine, expected.prompt, SAMPLINGS["greedy"], 6)
        length = engine.target.cache.lengths[0]
        before = rows_of(engine, length)
        sequence = engine._seated(0, Request((*expected.prompt, *expected.tokens[:6]), SAMPLINGS["greedy"], NOTHING), 0)
        copy, cancel = engine._drafter.models[0], threading.Event()
        if fault == "cancelled":
            cancel.set()
            with pytest.raises(PassCancelledError):
                engine._drafter.grow([sequence], FixedPolicy(16, 16), cancel)
        elif fault == "nan":
            own = next(iter(copy.skeleton.layers))
            for parameter in own.parameters():
                if parameter.is_floating_point():
                    parameter.data.fill_(torch.nan)
            assert len(engine._grow([sequence], None)[0]) == 0
            assert engine.draft_lost is not None
        else:
            (tree,) = engine._drafter.grow([sequence], FixedPolicy(16, 16), cancel)
            assert len(tree) == 16 and len(set(tree.depths)) > 1
        assert engine.target.cache.lengths == [length]
        for layer, rows in zip(engine.target.cache.layers, before, strict=True):
            assert torch.equal(layer.keys[:, :, :length], rows)
            assert layer.keys.isfinite().all() and layer.values.isfinite().all()
        check_text(expected, write(engine, expected.prompt, SAMPLINGS["greedy"], NUM_TOKENS)[0])


@pytest.mark.parametrize("streamed", ["half", "none"])
def test_a_warning_says_that_layers_given_back_end_the_copy(targets: Targets, tmp_path: Path, streamed: str):
    """The copy computes with the resident layers, so it ends with them, and the text goes on."""
    expected, machine = targets.text("llama", "greedy"), ShortMachine(tmp_path)
    with engine_with_copy(targets.source("llama"), budget=16, streamed=streamed, watch=machine.watch()) as engine:
        machine.lacks(MIB)
        ours, steps = write(engine, expected.prompt, SAMPLINGS["greedy"], NUM_TOKENS)
        resident = engine.plan.placement.resident
    check_text(expected, ours)
    assert not resident and not any(step.tree_nodes for step in steps)
    told = [number for number, step in enumerate(steps) if step.warning is not None]
    assert told == [0] and steps[0].warning is not None
    assert steps[0].warning.startswith("memory is short (")
    assert steps[0].warning.endswith("; the draft self needs layers that were given back: going on without it")


@pytest.mark.parametrize("streamed", ["half", "none"])
def test_nothing_is_quantized_for_a_copy_without_layers(targets: Targets, tmp_path: Path, streamed: str):
    target = targets.source("llama")
    copy = replace(target, name="self", part="self")
    plan = make_plan(target, copy, num_layers=NUM_LAYERS, resident=RESIDENT[streamed], tree_budget=16, chunk_rows=24)
    plan = changed(plan, draft_quant="int8", shares_cache=True)
    with tiny_packs(tmp_path):
        _, pack = make_packs(target, copy, plan, Quiet())
    assert (pack is None) == (streamed == "none")


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_a_copy_without_layers_of_its_own_is_the_target(targets: Targets, on_host: bool):
    target = load_model(targets.source("llama"), cache_rows=64, chunk_rows=8, host_embeddings=on_host)
    copy, tokens = CopyModel(target, {}), random_prompt(20, VOCAB)
    hidden = copy.append(tokens)
    assert target.cache.lengths == [20] and copy.nbytes == 0
    target.cache.truncate(0, 0)
    assert torch.equal(hidden, target.append(tokens))
    assert torch.equal(copy.logits(hidden), target.logits(hidden))


def test_a_copy_shares_all_but_the_streamed_layers(targets: Targets):
    with engine_with_copy(targets.source("llama"), budget=16, streamed="half", quant="int8") as engine:
        (copy,) = engine._drafter.models
        theirs = {id(p) for p in engine.target.skeleton.model.parameters()}
        own = {name for name, p in copy.skeleton.model.named_parameters() if id(p) not in theirs}
        assert own and {name.split(".")[2] for name in own} == {"1", "3"}
        assert copy.cache is engine.target.cache and copy.generation_bytes < copy.nbytes
