"""Engines whose experts pass through a pool write the target's own text, within the memory that the plan counts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.engines import make_plan, random_prompt, write
from support.interrupts import CancelAt
from support.loading import load_engine, load_model, prepare
from support.moe import ARCHITECTURES, NUM_EXPERTS, make_moe_config, passes
from support.streamed import silent, tiny_packs
from support.threads import watched_threads
from support.tiny_models import VOCAB, perturbed, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.experts import reader
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.errors import ModelError
from specchat.models.sizes.describe import describe
from specchat.planner.memory import build_ledger
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from specchat.records.plan import ExpertSlots, Plan

NUM_TOKENS = 20
SLOTS = ExpertSlots(quota=3, shared=NUM_EXPERTS)
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_p=0.9, seed=5)}


@dataclass
class Pair:
    """A model with experts, and a draft that is often right."""

    target: ModelSource
    draft: ModelSource
    texts: dict[str, reference.Reference]


class Pairs:
    """Pairs and the texts that transformers writes; made on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Pair] = {}

    def get(self, architecture: str) -> Pair:
        if architecture not in self._made:
            model, folder = random_model(make_moe_config(architecture)), self._root / architecture
            prompt = random_prompt(30, VOCAB)
            texts = {
                name: reference.generate(model, prompt, sampling, NUM_TOKENS) for name, sampling in SAMPLINGS.items()
            }
            draft = save(perturbed(model, 0.03), folder / "draft")
            self._made[architecture] = Pair(save(model, folder / "target"), draft, texts)
        return self._made[architecture]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    yield Pairs(tmp_path_factory.mktemp("moe"))


def planned(pair: Pair, tree_budget: int, slots: ExpertSlots = SLOTS) -> Plan:
    spec, draft_spec = describe(pair.target), describe(pair.draft)
    plan = make_plan(pair.target, pair.draft, num_layers=spec.num_layers, tree_budget=tree_budget, chunk_rows=24)
    plan = replace(plan, placement=replace(plan.placement, experts=slots))
    return replace(plan, ledger=build_ledger(spec, draft_spec, plan.work, plan.placement))


def check_text(engine: Engine, pair: Pair, sampling: str) -> None:
    expected = pair.texts[sampling]
    ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    difference = expected.first_difference(ours)
    assert difference is None or expected.is_near_tie(difference)
    assert sum(step.expert_misses for step in steps) > 0
    assert sum(step.expert_hits for step in steps) > 0


@pytest.mark.parametrize("architecture", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_text_and_memory_are_as_planned(pairs: Pairs, architecture: str):
    pair = pairs.get(architecture)
    plan = planned(pair, 16)
    with load_engine(plan, pair.target, pair.draft) as engine:
        check_text(engine, pair, "sampled")
        report = engine.memory()
    counted = sum(item.bytes for item in plan.ledger if item.item in _EXACT)
    measured = sum(model.nbytes for model in engine._meter._models)
    assert measured == counted
    assert report.device_peak_bytes <= plan.device_bytes


_EXACT = {
    *("resident layers", "expert pool", "expert slots", "small tensors of experts", "embeddings and head"),
    *("KV cache", "draft", "draft KV cache"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree_budget", [1, 16, 64])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "qwen3_5_moe_text"])
def test_text_is_the_targets_own(pairs: Pairs, architecture: str, tree_budget: int, sampling: str):
    pair = pairs.get(architecture)
    with load_engine(planned(pair, tree_budget), pair.target, pair.draft) as engine:
        check_text(engine, pair, sampling)


def test_experts_are_read_from_packs(pairs: Pairs, tmp_path: Path):
    source = save(random_model(make_moe_config("qwen3_moe")).to(torch.bfloat16), tmp_path / "model")
    with tiny_packs(tmp_path):
        pack = prepare(source, "fp32", progress=silent, warn=silent, by_experts=True)
        assert pack is not None, "tensors of another dtype must be converted"
        settings = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64, "pack": pack}
        with closing(load_model(source, **settings)) as model:
            expected = list(passes(model, (8, 33)))
        with closing(load_model(source, **settings, experts=SLOTS)) as model:
            found = list(passes(model, (8, 33)))
        assert all(map(torch.equal, expected, found))
        damage(pack.layers[2].path)
        with pytest.raises(ModelError, match="damaged"):
            load_model(source, **settings, experts=SLOTS)


@pytest.mark.parametrize(
    ("architecture", "quant"),
    [
        ("gpt_oss", "int8"),
        *(
            pytest.param(architecture, quant, marks=pytest.mark.slow)
            for architecture in ARCHITECTURES
            for quant in ("int8", "int4")
            if (architecture, quant) != ("gpt_oss", "int8")
        ),
    ],
)
def test_quantized_experts_have_the_same_bits(architecture: str, quant: str, tmp_path: Path):
    source = save(random_model(make_moe_config(architecture)), tmp_path / "model")
    with tiny_packs(tmp_path):
        pack = prepare(source, "fp32", quant, progress=silent, warn=silent, by_experts=True)
        settings = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64, "pack": pack, "quant": quant}
        with closing(load_model(source, **settings)) as model:
            expected = list(passes(model, (8, 33)))
        with closing(load_model(source, **settings, experts=SLOTS)) as model:
            found = list(passes(model, (8, 33)))
            assert model.streamer.counters().expert_misses
    assert all(map(torch.equal, expected, found))


def damage(path: Path) -> None:
    """Change a byte in the middle of a file, where experts are."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def check_cancelled(pairs: Pairs, architecture: str, times: int) -> None:
    """Cancel passes at random layers; the passes that follow must compute the same bits."""
    pair, rng = pairs.get(architecture), random.Random(7)
    given = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64}
    tokens = [random_prompt(rng.choice((1, 3, 20)), VOCAB, seed) for seed in range(times)]
    with closing(load_model(pair.target, **given)) as model:
        expected = run(model, tokens)
    with watched_threads(), closing(load_model(pair.target, **given, experts=SLOTS)) as model:
        for text, want in zip(tokens, expected, strict=True):
            model.cache.truncate(0, 0)
            with pytest.raises(PassCancelledError):
                model.append(text, CancelAt(rng.randint(1, 4)))
            assert torch.equal(model.append(text), want)


def run(model: TreeModel, texts: list[list[int]]) -> list[torch.Tensor]:
    found = []
    for text in texts:
        model.cache.truncate(0, 0)
        found.append(model.append(text))
    return found


def test_cancelled_passes_leave_no_trace(pairs: Pairs):
    check_cancelled(pairs, "qwen3_moe", 6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_cancelled_passes_leave_no_trace(pairs: Pairs, architecture: str):
    check_cancelled(pairs, architecture, 200)


def test_failed_reads_leave_no_trace(pairs: Pairs):
    """Reads of one layer fail, and others end after the failure; the pass is repeated."""
    pair = pairs.get("qwen3_moe")
    given = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64}
    texts = [random_prompt(12, VOCAB, seed) for seed in range(4)]
    with closing(load_model(pair.target, **given)) as model:
        expected = run(model, texts)
    with closing(load_model(pair.target, **given, experts=SLOTS)) as model:
        for text, want in zip(texts, expected, strict=True):
            model.cache.truncate(0, 0)
            with failing_reads(), pytest.raises(ModelError, match="no disk"):
                model.append(text)
            assert torch.equal(model.append(text), want)


@contextmanager
def failing_reads() -> Iterator[None]:
    """Let every third read fail."""
    numbers, real = itertools.count(), reader.read_fully

    def read(*args: Any) -> None:
        if next(numbers) % 3 == 2:
            raise ModelError("no disk", "")
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_fully", read)
        yield
