"""A chat that outgrows its stages writes the text of one that had its whole memory from the beginning."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import NOTHING, make_plan, random_prompt, write
from support.hybrids import HYBRIDS, random_hybrid
from support.loading import load_engine, prepare
from support.plans import changed
from support.pretended_gpu import PretendedGpu
from support.streamed import silent, tiny_packs
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.kv_cache import TreeCache
from specchat.models.packs.pack import Pack
from specchat.models.weights.layout import LayerLayout
from specchat.records.generation import Sampling
from specchat.records.model import KvShape, ModelSource
from specchat.records.plan import Plan, Stage

SAMPLED = Sampling(temperature=0.8, seed=5)
NUM_LAYERS = 4
PROMPT = random_prompt(30, VOCAB)
NUM_TOKENS = 40
# All but one layer at first; the text outgrows both stages.
STAGES = (Stage(32, (0, 1, 3)), Stage(48, (1,)))
Models = tuple[ModelSource, ModelSource, Pack | None]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Models]:
    made: dict[tuple[str, bool], Models] = {}

    def get(architecture: str, packed: bool) -> Models:
        if (architecture, packed) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            is_hybrid = architecture in HYBRIDS
            model = random_hybrid(architecture) if is_hybrid else random_model(make_config(architecture))
            target, draft = save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft")
            with tiny_packs(folder):
                pack = prepare(target, "fp32", "int8", progress=silent, warn=silent) if packed else None
            made[architecture, packed] = target, draft, pack
        return made[architecture, packed]

    return get


def plan_of(models: Models, **changes: Any) -> Plan:
    target, draft, pack = models
    plan = make_plan(target, draft, num_layers=NUM_LAYERS, resident=(), slots=1, ctx=128)
    return changed(plan, quant="none" if pack is None else "int8", **changes)


def loaded(models: Models, **changes: Any) -> Engine:
    target, draft, pack = models
    return load_engine(plan_of(models, **changes), target, draft, pack)


def check(models: Models, **changes: Any) -> None:
    with loaded(models, **changes) as engine:
        expected, _ = write(engine, PROMPT, SAMPLED, NUM_TOKENS)
        without_stages = engine.target.nbytes
    with loaded(models, stages=STAGES, **changes) as engine:
        assert engine.memory().resident_layers == 3
        assert engine.target.cache.capacity == 48  # 32 tokens and 16 nodes
        text, steps = write(engine, PROMPT, SAMPLED, NUM_TOKENS)
        assert engine.memory().resident_layers == 0
        again, _ = write(engine, [*PROMPT, *text[:5]], SAMPLED, NUM_TOKENS - 5)
        assert engine.target.nbytes == without_stages  # nothing of the earlier stages is left
        sizes = [LayerLayout.of(layer).nbytes for layer in engine.target.skeleton.layers]
    assert text == expected and again == expected[5:]
    streamed = [step.streamed_bytes for step in steps]
    resident = [*(stage.resident for stage in STAGES), ()]
    assert streamed == sorted(streamed)
    assert set(streamed) == {sum(sizes) - sum(sizes[index] for index in each) for each in resident}


def test_layers_read_from_a_checkpoint(make: Callable[[str, bool], Models]):
    check(make("llama", False))


@pytest.mark.parametrize("in_ram", [(), (0, 2), (0, 1, 2, 3)], ids=["disk", "mixed", "mapped"])
def test_layers_of_a_pack(in_ram: tuple[int, ...], make: Callable[[str, bool], Models]):
    check(make("llama", True), in_ram=in_ram)


@pytest.mark.parametrize(
    "in_ram",
    [
        pytest.param((), id="disk", marks=pytest.mark.slow),
        pytest.param((0, 2), id="mixed"),
        pytest.param((0, 1, 2, 3), id="ram", marks=pytest.mark.slow),
    ],
)
def test_layers_on_a_gpu(in_ram: tuple[int, ...], make: Callable[[str, bool], Models]):
    with PretendedGpu() as gpu:
        models = make("llama", False)
        with loaded(models, stages=STAGES, device="cuda:0", in_ram=in_ram) as engine:
            text, steps = write(engine, PROMPT, SAMPLED, NUM_TOKENS)
            pageable = [e for e in gpu.events if e.name == "copy_" and e.kind == "h2d" and e.stream != "compute"]
            assert not pageable
        assert not gpu.runtime.pinned
    with loaded(models) as engine:
        assert text == write(engine, PROMPT, SAMPLED, NUM_TOKENS)[0]
    assert steps[-1].streamed_bytes == NUM_LAYERS * steps[0].streamed_bytes


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_moe", "deepseek_v3", "gpt_oss", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_layer(architecture: str, packed: bool, make: Callable[[str, bool], Models]):
    check(make(architecture, packed))


def test_an_interrupted_chat_goes_on_in_its_stage(make: Callable[[str, bool], Models]):
    models, cancel = make("llama", False), threading.Event()
    with loaded(models) as engine:
        expected, _ = write(engine, PROMPT, SAMPLED, NUM_TOKENS)
    with loaded(models, stages=STAGES) as engine:
        steps = engine.generate(PROMPT, SAMPLED, stop_ids=NOTHING, max_tokens=NUM_TOKENS, cancel=cancel)
        begin = [token for _ in range(2) for token in next(steps).token_ids]
        cancel.set()
        assert next(steps).finish_reason == "interrupt"
        rest, _ = write(engine, [*PROMPT, *begin], SAMPLED, NUM_TOKENS - len(begin))
        engine.forget()
        assert write(engine, PROMPT, SAMPLED, NUM_TOKENS)[0] == expected == [*begin, *rest]


def test_a_long_prompt_begins_a_late_stage(make: Callable[[str, bool], Models], tmp_path: Path):
    models, prompt = make("llama", False), random_prompt(45, VOCAB)
    with loaded(models) as engine:
        expected, _ = write(engine, prompt, SAMPLED, 3)
    with loaded(models, stages=STAGES) as engine:
        assert write(engine, prompt, SAMPLED, 3)[0] == expected
        assert engine.memory().resident_layers == 1 and engine.target.cache.capacity == 64


def check_return(models: Models, **changes: Any) -> None:
    """A short text after a long one has the speed, the memory and the text of one that comes first.

    Its first step still has the place of the long text: until then, the draft holds that text's rows.
    """
    short = PROMPT[:8]
    with loaded(models, stages=STAGES, **changes) as engine:
        expected, steps = write(engine, short, SAMPLED, 8)
        before = engine.target.nbytes, engine.target.cache.capacity
        first = steps[-1].streamed_bytes
        long = write(engine, PROMPT, SAMPLED, NUM_TOKENS)[0]
        assert engine.memory().resident_layers == 0
        text, steps = write(engine, short, SAMPLED, 8)
        assert text == expected and steps[-1].streamed_bytes == first
        assert engine.memory().resident_layers == 3
        assert (engine.target.nbytes, engine.target.cache.capacity) == before
        assert write(engine, PROMPT, SAMPLED, NUM_TOKENS)[0] == long
        assert engine.memory().resident_layers == 0


def test_layers_come_back_for_a_short_text(make: Callable[[str, bool], Models]):
    check_return(make("llama", False))


@pytest.mark.parametrize("in_ram", [(), (0, 2), (0, 1, 2, 3)], ids=["disk", "mixed", "mapped"])
def test_layers_of_a_pack_come_back(in_ram: tuple[int, ...], make: Callable[[str, bool], Models]):
    check_return(make("llama", True), in_ram=in_ram)


def test_layers_given_back_to_the_system_stay_away(make: Callable[[str, bool], Models]):
    with loaded(make("llama", False), stages=STAGES) as engine:
        write(engine, PROMPT, SAMPLED, NUM_TOKENS)
        engine.forget()
        engine.stages.fit(4, {0})
        assert engine.memory().resident_layers == 2 and 0 in engine.target.streamed


@pytest.mark.parametrize("in_ram", [pytest.param((), marks=pytest.mark.slow), (0, 2)], ids=["disk", "mixed"])
def test_layers_come_back_to_a_gpu(in_ram: tuple[int, ...], make: Callable[[str, bool], Models]):
    with PretendedGpu() as gpu:
        check_return(make("llama", False), device="cuda:0", in_ram=in_ram)
        assert not gpu.runtime.pinned


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_moe", "deepseek_v3", "gpt_oss", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_layer_comes_back(architecture: str, packed: bool, make: Callable[[str, bool], Models]):
    check_return(make(architecture, packed))


def test_rows_of_every_seat_survive_growth():
    shapes = (KvShape(2, 3, 5), KvShape(1, 4, 4))
    cache = TreeCache(shapes, 16, torch.float32, torch.device("cpu"), seats=3)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.resize(40)
    assert cache.capacity == 48 and cache.max_tree_rows == 48
    for layer, olds in zip(cache.layers, before, strict=True):
        for new, old in zip((layer.keys, layer.values), olds, strict=True):
            for seat in range(3):
                assert torch.equal(new[:, :, seat * 48 : seat * 48 + 16], old[:, :, seat * 16 : seat * 16 + 16])
                assert not new[:, :, seat * 48 + 16 : seat * 48 + 48].any()
