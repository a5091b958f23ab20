"""Layers dealt to several devices of one process: the same text, no tensors of two devices together, links that add up.

Two GPUs are pretended. Where links count, each device is the CPU with a reader of its own that sleeps as long as its
link would take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_pretended_gpu import PROCESSED, SAMPLED, model_of, pair_of, with_head
from support.eagle3 import KINDS as EAGLE3_KINDS
from support.eagle3 import save_eagle3
from support.engines import NOTHING, make_plan, random_prompt, write
from support.hybrids import HYBRIDS
from support.loading import load_engine
from support.plans import changed
from support.pretended_gpu import PretendedGpu
from support.threads import watched_threads
from support.tiny_models import ARCHITECTURES, SPECIAL, VOCAB, make_config, random_model
from torch import Tensor

from specchat.engine.attention import RowMask
from specchat.engine.engine import Engine
from specchat.engine.layout import RowLayout
from specchat.engine.streaming import slots
from specchat.engine.streaming.readers import LayerReader, SharedReader
from specchat.models.quant.modules import quant_linears
from specchat.models.sizes.describe import describe
from specchat.planner.dealing import Deal, deal
from specchat.planner.devices import device_ledger
from specchat.planner.placement import Share
from specchat.records.generation import Request, Sampling
from specchat.records.microbatches import Microbatches
from specchat.records.model import ModelSource
from specchat.records.plan import DevicePlan, Plan

GREEDY = Sampling()
TWO = ("cuda:0", "cuda:1")
# A block that all layers share is on one device only, so the planner does not deal such models.
CUT = ("mixtral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "granite")
DEALT = [name for name in (*ARCHITECTURES, *SPECIAL, *HYBRIDS) if name != "zamba2"]


def dealt(plan: Plan, devices: Sequence[str], owner: Sequence[int], resident: Sequence[int] = (), **more: Any) -> Plan:
    """The plan with layers dealt to devices; streamed layers of GPUs are in host memory."""
    in_ram = tuple(i for i in range(len(owner)) if i not in resident) if devices[0] != "cpu" else ()
    places = {"resident": tuple(resident), "in_ram": in_ram, "slots": 2}
    return changed(plan, device=devices[0], devices=tuple(devices), owner=tuple(owner), **places, **more)


def text_of(engine: Engine, sampling: Sampling, num_tokens: int = 8) -> list[int]:
    return write(engine, random_prompt(20, VOCAB), sampling, num_tokens)[0]


def texts_of(engine: Engine) -> list[list[int]]:
    """Texts of requests that share passes."""
    asked = ((5, GREEDY), (33, SAMPLED), (17, PROCESSED), (9, SAMPLED))
    requests = [
        Request(tuple(random_prompt(length, VOCAB, seed=length)), sampling, max_tokens=10) for length, sampling in asked
    ]
    texts: list[list[int]] = [[] for _ in requests]
    for index, step in engine.generate_many(requests):
        texts[index] += step.token_ids
    return texts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource, int]:
    return pair_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


# --- the same text -----------------------------------------------------------------------------------------------


def check(architecture: str, folder: Path, sampling: Sampling, **more: Any) -> PretendedGpu:
    """Compare the text on two pretended GPUs with that of a CPU."""
    target, draft, num_layers = pair_of(model_of(architecture), folder)
    plan = make_plan(target, draft, num_layers=num_layers, chunk_rows=8)
    with load_engine(plan, target, draft) as engine:
        expected = text_of(engine, sampling)
    owner = [index % 2 for index in range(num_layers)]
    with PretendedGpu(num_devices=2) as gpu:
        with load_engine(dealt(plan, TWO, owner, **more), target, draft) as engine:
            places = [{p.device.index for p in layer.parameters()} for layer in engine.target.skeleton.layers]
            assert places == [{each} for each in owner]
            assert text_of(engine, sampling) == expected
        assert not gpu.runtime.pinned
    return gpu


@pytest.mark.parametrize(("architecture", "sampling"), [("gemma4", PROCESSED), ("lfm2", SAMPLED)])
def test_two_gpus_write_the_text_of_a_cpu(architecture: str, sampling: Sampling, tmp_path: Path):
    gpu = check(architecture, tmp_path, sampling, resident=(1,))
    assert set(gpu.runtime.timed) == {torch.device(each) for each in TWO}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", DEALT)
@pytest.mark.parametrize("sampling", [GREEDY, PROCESSED], ids=["greedy", "drawn"])
def test_two_gpus_write_the_text_of_a_cpu_for_every_architecture(architecture: str, sampling: Sampling, tmp_path: Path):
    check(architecture, tmp_path, sampling, resident=(1,))


@pytest.mark.parametrize(
    "options", [{"quant": "int4"}, pytest.param({"in_ram": ()}, marks=pytest.mark.slow)], ids=["int4", "disk"]
)
def test_two_gpus_stream_quantized_layers_and_from_disk(options: dict[str, Any], llama: Any):
    target, draft, num_layers = llama
    plan = changed(make_plan(target, draft, num_layers=num_layers), quant=options.get("quant", "none"))
    with load_engine(plan, target, draft) as engine:
        expected = text_of(engine, SAMPLED)
    plan = changed(dealt(plan, TWO, [0, 1, 1, 0]), **options)
    with PretendedGpu(num_devices=2), load_engine(plan, target, draft) as engine:
        assert text_of(engine, SAMPLED) == expected
        linears = [linear for _, linear in quant_linears(engine.target.skeleton.layers)]
        assert len({id(linear.scratch) for linear in linears}) == 2 * bool(linears), "scratch memory for each device"


@pytest.mark.parametrize("architecture", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in CUT)])
def test_microbatches_write_the_text_of_a_cpu(architecture: str, tmp_path: Path):
    """Two layers of a stretch are resident, so a microbatch passes both before the next one follows."""
    target, draft, num_layers = pair_of(model_of(architecture), tmp_path)
    plan = make_plan(target, draft, num_layers=num_layers, seats=3, chunk_rows=16)
    with load_engine(plan, target, draft) as engine:
        expected = texts_of(engine)
    owner = [index // 2 % 2 for index in range(num_layers)]
    cut = Microbatches(((2, 2), (5, 3)))
    plan = dealt(plan, TWO, owner, resident=(0, 1), microbatches=cut)
    with PretendedGpu(num_devices=2), load_engine(plan, target, draft) as engine:
        assert texts_of(engine) == expected


def test_masks_on_another_device_follow_the_chunk():
    mask = RowMask(RowLayout(0, 6, torch.zeros(0, 0, dtype=torch.bool), torch.arange(6), (0, 3)), causal)
    with PretendedGpu(num_devices=2):
        there = torch.device("cuda:1")
        first = mask.additive(16, torch.float32, there)
        assert first.device == there and mask.additive(16, torch.float32, there) is first
        mask._layout.chunk = (3, 6)
        second = mask.additive(16, torch.float32, there)
        assert second.cpu().isfinite().sum(-1).flatten().tolist() == [4, 5, 6]


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def test_a_gpu_and_a_cpu_write_the_text_of_a_cpu(llama: Any):
    target, draft, num_layers = llama
    plan = make_plan(target, draft, num_layers=num_layers)
    with load_engine(plan, target, draft) as engine:
        expected = text_of(engine, PROCESSED)
    plan = dealt(plan, ("cuda:0", "cpu"), [0, 1, 0, 1], resident=(1, 2))
    with PretendedGpu(), load_engine(changed(plan, in_ram=(0,)), target, draft) as engine:
        places = [next(layer.parameters()).device.type for layer in engine.target.skeleton.layers]
        assert places == ["cuda", "cpu", "cuda", "cpu"]
        assert text_of(engine, PROCESSED) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-mtp", "qwen3_next-mtp", "eagle3"])
def test_heads_read_the_states_of_layers_on_other_devices(name: str, tmp_path: Path):
    if name == "eagle3":
        target, _, num_layers = pair_of(model_of("llama"), tmp_path)
        head = save_eagle3(64, tmp_path / "head", EAGLE3_KINDS["3.1"]).source
    else:
        target, head, num_layers = with_head(name.removesuffix("-mtp"))(tmp_path)
    plan = make_plan(target, head, num_layers=num_layers)
    with load_engine(plan, target, head) as engine:
        expected = text_of(engine, SAMPLED)
    owner = [index % 2 for index in range(num_layers)]
    with PretendedGpu(num_devices=2), load_engine(dealt(plan, TWO, owner, resident=(1,)), target, head) as engine:
        text, steps = write(engine, random_prompt(20, VOCAB), SAMPLED, 8)
        assert any(step.tree_nodes for step in steps)
    assert text == expected


def test_ledgers_of_devices_count_what_they_hold(llama: Any):
    """Weights, slots and caches are exact, and together they are all that the engine holds."""
    target, _, num_layers = llama
    plan = dealt(make_plan(target, None, num_layers=num_layers), ["cpu", "cpu"], [0, 1, 1, 0], resident=(1,))
    spec, found = describe(target), Deal(plan.owner, plan.placement.resident)
    items = [
        item
        for number in range(2)
        for item in device_ledger(spec, None, plan.work, found, number, "cpu", slots=2)
        if item.item in ("resident layers", "slots", "embeddings and head", "KV cache")
    ]
    with load_engine(plan, target, None) as engine:
        assert engine.target.cache.nbytes == sum(item.bytes for item in items if item.item == "KV cache")
        assert engine.target.nbytes == sum(item.bytes for item in items)


def test_answers_that_share_passes_are_those_of_one_device(llama: Any):
    target, draft, num_layers = llama
    one = make_plan(target, draft, num_layers=num_layers, seats=3, retrieval=True)
    texts = []
    for plan in (one, dealt(one, ["cpu", "cpu", "cpu"], [0, 2, 1, 0], resident=(2,))):
        with load_engine(plan, target, draft) as engine:
            texts.append(texts_of(engine))
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_cancelled_pass_leaves_nothing_on_any_device(llama: Any):
    target, draft, num_layers = llama
    plan, prompt = make_plan(target, draft, num_layers=num_layers), random_prompt(20, VOCAB)
    with load_engine(plan, target, draft) as engine:
        expected, _ = write(engine, prompt, SAMPLED, 8)
    with PretendedGpu(num_devices=2), load_engine(dealt(plan, TWO, [0, 1, 0, 1]), target, draft) as engine:
        cancel = threading.Event()
        steps = engine.generate(prompt, SAMPLED, stop_ids=NOTHING, max_tokens=8, cancel=cancel)
        begin = list(next(steps).token_ids)
        cancel.set()
        assert next(steps).finish_reason == "interrupt"
        rest, _ = write(engine, [*prompt, *begin], SAMPLED, 8 - len(begin))
    assert [*begin, *rest] == expected


def test_closing_ends_the_threads_of_all_devices(llama: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slots, "SMALL_LAYER_BYTES", 0)
    target, _, num_layers = llama
    plan = dealt(make_plan(target, None, num_layers=num_layers), ["cpu", "cpu"], [0, 1, 0, 1])
    with watched_threads() as threads, load_engine(plan, target, None) as engine:
        text_of(engine, GREEDY, 2)
        assert threads.num_running >= 2, "reader threads for each device"
    assert threads.num_running == 0


# --- what moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "num_rows_moved"), [([0, 0, 1, 1], 2), ([0, 1, 0, 1], 4), ([0, 0, 0, 0], 0)])
def test_rows_hop_only_where_the_device_changes(owner: list[int], num_rows_moved: int, llama: Any):
    """Besides rows, the second device gets positions, the rotary table (two tensors) and the mask once in a pass."""
    target, _, num_layers = llama
    plan = dealt(make_plan(target, None, num_layers=num_layers), TWO, owner, resident=range(4))
    with PretendedGpu(num_devices=2) as gpu, load_engine(plan, target, None) as engine:
        for num_rows in (5, 1):
            gpu.events.clear()
            engine.target.append(random_prompt(num_rows, VOCAB))
            hops = [event for event in gpu.events if event.kind == "hop"]
            assert len(hops) == num_rows_moved + 4 * (1 in owner)
            row_bytes = 4 * engine.target.skeleton.config.hidden_size
            assert sum(event.nbytes == num_rows * row_bytes for event in hops) >= num_rows_moved


# --- links that add up -------------------------------------------------------------------------------------------

NUM_LAYERS, LOAD_S = 20, 0.02


class ThrottledReader:
    """A device's part of a reader, over a link that takes some seconds for a layer."""

    num_workers = 1

    def __init__(self, reader: LayerReader, seconds: float) -> None:
        self._reader = reader
        self._seconds = seconds

    def chunks(self, index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
        return [partial(self._read, self._reader.chunks(index, slot))]

    def _read(self, tasks: Sequence[Callable[[], None]]) -> None:
        begin = time.perf_counter()
        for task in tasks:
            task()
        time.sleep(max(self._seconds - (time.perf_counter() - begin), 0))

    def close(self) -> None:
        self._reader.close()


@contextmanager
def links(seconds: Sequence[float]) -> Iterator[None]:
    """Each device reads over a link of its own, which takes some seconds for a layer."""
    part = SharedReader.part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "SMALL_LAYER_BYTES", 0)
        patch.setattr(SharedReader, "part", lambda self, i, _=(): ThrottledReader(part(self, i), seconds[i]))
        yield


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource, int]:
    config = make_config("llama")
    config.num_hidden_layers = NUM_LAYERS
    return pair_of(random_model(config), tmp_path_factory.mktemp("deep"))


def pass_s(models: Any, rates: Sequence[float], owner: Sequence[int], load_s: float = LOAD_S) -> float:
    """Least seconds of a pass that streams all layers, over links of some rates."""
    target, _, num_layers = models
    plan = dealt(make_plan(target, None, num_layers=num_layers), ["cpu"] * max(len(rates), 2), owner)
    taken = []
    with links([load_s / rate for rate in (*rates, 1.0)]), load_engine(plan, target, None) as engine:
        for _ in range(3):
            begin = time.perf_counter()
            engine.target.append([5])
            taken.append(time.perf_counter() - begin)
        counters = engine.target.streamer.counters()
        sizes = [each.num_bytes for each in counters.by_device]
        assert sum(sizes) == counters.num_bytes and all(sizes[number] for number in set(owner))
    return min(taken[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "most"), [(2, 0.55), (4, 0.30)])
def test_woven_layers_take_the_time_of_all_links_together(count: int, most: float, deep: Any):
    one = NUM_LAYERS * LOAD_S
    woven = deal([Share(0, NUM_LAYERS // count)] * count)
    found = pass_s(deep, [1.0] * count, woven.owner)
    assert found <= most * one, f"{found / one:.2f} of one link"
    assert found >= one / count * 0.95, "faster than the links"


@pytest.mark.slow
def test_ranges_do_not(deep: Any):
    """What the deal is for: two ranges of ten layers each wait for all but the four that the slots hold."""
    owner = [0] * (NUM_LAYERS // 2) + [1] * (NUM_LAYERS // 2)
    assert pass_s(deep, [1.0, 1.0], owner) > 0.7 * NUM_LAYERS * LOAD_S


@pytest.mark.slow
def test_unequal_links_end_together(deep: Any):
    """Links of 4 and 1 are as fast as one of 5."""
    load_s = 2.5 * LOAD_S
    found = pass_s(deep, [4.0, 1.0], deal([Share(0, 16), Share(0, 4)]).owner, load_s)
    assert found == pytest.approx(NUM_LAYERS * load_s / 5, rel=0.1)


@pytest.mark.slow
def test_one_link_takes_the_time_of_its_layers(deep: Any):
    assert pass_s(deep, [1.0], [0] * NUM_LAYERS) == pytest.approx(NUM_LAYERS * LOAD_S, rel=0.1)


@pytest.mark.slow
def test_busy_links_and_devices_are_measured(deep: Any):
    """A link that loads without a pause is busy nearly all the time; the devices compute for a small part of it."""
    target, _, num_layers = deep
    plan = dealt(make_plan(target, None, num_layers=num_layers), ["cpu", "cpu"], [0, 0, 0, 1] * 5)
    devices = tuple(DevicePlan("cpu", 0, 10, (), 5, 0, 1.0, 0.0, 0.0) for _ in range(2))
    with links([LOAD_S / 2] * 2), load_engine(replace(plan, devices=devices), target, None) as engine:
        write(engine, random_prompt(5, VOCAB), GREEDY, 3)
        first, second = engine.memory().devices
    assert first.link_busy > 0.8 and 0.2 < second.link_busy < 0.6
    assert 0 < second.compute_busy < first.compute_busy < 0.5
    assert first.streamed_bytes == 3 * second.streamed_bytes > 0
    assert first.wait_s > second.wait_s >= 0
