"""Streaming on a GPU gives the bits and the text of resident layers, near the rate of the link. Needs a GPU.

    python -m pytest -m gpu -s tests/engine/streaming/test_cuda.py
    specchat bench shape:llama-70b,layers=20 --vram 24GiB --passes --tree-budget 64 --baseline accelerate --json

test_cuda_order.py checks the order of queued work against CUDA's rules without a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import load_engine, load_model
from support.plans import changed
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.model import TreeModel
from specchat.engine.streaming.host_layers import Pinner, pinner
from specchat.engine.streaming.slots import page_aligned
from specchat.models.catalog.shape import parse_shape
from specchat.models.synthetic.layers import materialise
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Quant

pytestmark = pytest.mark.gpu

NUM_PASSES = 30
CHUNK_ROWS = 512


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


EVERY_LAYER = tuple(range(99))


def load(
    source: ModelSource,
    dtype: torch.dtype,
    resident: tuple[int, ...] | None,
    num_slots: int,
    in_ram: tuple[int, ...] = EVERY_LAYER,
    *,
    host_embeddings: bool = False,
) -> TreeModel:
    return load_model(
        source,
        dtype=dtype,
        device=torch.device("cuda:0"),
        resident=resident,
        num_slots=num_slots,
        in_ram=in_ram,
        host_embeddings=host_embeddings,
        cache_rows=1024,
        chunk_rows=CHUNK_ROWS,
    )


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
@pytest.mark.parametrize("resident", [(), (0, 2)], ids=["all", "half"])
@pytest.mark.parametrize("in_ram", [EVERY_LAYER, (1, 3), ()], ids=["ram", "mixed", "disk"])
def test_streamed_states_are_resident_states_bit_for_bit(
    num_slots: int, resident: tuple[int, ...], in_ram: tuple[int, ...], tmp_path: Path
):
    source, prompt = save(random_model(make_config("llama_tied")), tmp_path / "m"), random_prompt(40, VOCAB)
    everything = load(source, torch.bfloat16, None, 0)
    expected = everything.append(prompt)
    model = load(source, torch.bfloat16, resident, num_slots, in_ram)
    for _ in range(NUM_PASSES):
        model.cache.truncate(0, 0)
        assert torch.equal(model.append(prompt), expected)
    model.close()


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
def test_text_does_not_depend_on_draft_or_streaming(sampling: Sampling, quant: Quant, tmp_path: Path):
    if quant == "int4":
        pytest.importorskip("bitsandbytes")
    target = random_model(make_config("llama_tied"))
    sources = save(target, tmp_path / "target"), save(perturbed(target, 0.03), tmp_path / "draft")
    prompt, texts = random_prompt(30, VOCAB), []
    for draft, resident in ((None, None), (sources[1], (1,)), (sources[1], ())):
        plan = make_plan(sources[0], draft, num_layers=5, resident=resident)
        plan = changed(plan, device="cuda:0", in_ram=plan.placement.streamed, quant=quant)
        with load_engine(plan, sources[0], draft) as engine:
            texts.append(write(engine, prompt, sampling, 40)[0])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("num_rows", [1, 40, CHUNK_ROWS + 100])
def test_embeddings_in_host_memory_give_the_same_bits(num_rows: int, tmp_path: Path):
    """The bits are equal while slots are being filled, too."""
    config = make_config("llama")
    config.max_position_embeddings = 1024
    source, prompt = save(random_model(config), tmp_path / "m"), random_prompt(num_rows, VOCAB)
    expected = load(source, torch.bfloat16, None, 0).append(prompt)
    for resident in (None, (), (1,)):
        model = load(source, torch.bfloat16, resident, 2, host_embeddings=True)
        embeddings = model.skeleton.model.get_input_embeddings()
        assert embeddings.weight.device.type == "cpu"
        assert {p.device.type for p in model.skeleton.model.parameters() if p is not embeddings.weight} == {"cuda"}
        for _ in range(NUM_PASSES):
            model.cache.truncate(0, 0)
            assert torch.equal(model.append(prompt), expected)
        model.close()


def test_cancelled_answers_continue_as_if_never_cancelled(tmp_path: Path):
    source, prompt = save(random_model(make_config("llama_tied")), tmp_path / "m"), random_prompt(30, VOCAB)
    plan = changed(make_plan(source, None, num_layers=5, resident=()), device="cuda:0", in_ram=(0, 2, 4))
    with load_engine(plan, source, None) as engine:
        expected, _ = write(engine, prompt, Sampling(), 30)
        cancel = threading.Event()
        steps = engine.generate(prompt, Sampling(), stop_ids=NOTHING, max_tokens=30, cancel=cancel)
        tokens = [t for _ in range(5) for t in next(steps).token_ids]
        cancel.set()
        assert next(steps).finish_reason == "interrupt"
        rest, _ = write(engine, [*prompt, *tokens], Sampling(), 30 - len(tokens))
        assert tokens + rest == expected


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_restart_after_a_cancelled_pass_gives_the_same_bits(cut: int, tmp_path: Path):
    """Cancel many passes in a row, with copies and computation still queued at each restart."""
    source, prompt = save(random_model(make_config("llama_tied")), tmp_path / "m"), random_prompt(40, VOCAB)
    expected = load(source, torch.bfloat16, None, 0).append(prompt)
    for num_slots in (1, 2, 3):
        model = load(source, torch.bfloat16, (), num_slots, (0, 1, 3))
        for _ in range(NUM_PASSES):
            for index in range(cut):
                model.streamer.acquire(index)
                model.streamer.release(index)
            model.streamer.restart()
            model.cache.truncate(0, 0)
            assert torch.equal(model.append(prompt), expected)
        model.close()


def test_a_refusal_to_pin_leaves_no_error_behind():
    said = list[str]()
    pin, blob = pinner(torch.device("cuda:0"), said.append), page_aligned(1 << 20)
    pin([blob])
    assert not said
    pin([blob])  # CUDA refuses what is pinned already
    assert len(said) == 1
    assert torch.ones(4, device="cuda:0").sum().item() == 4
    pin.close()
    pin([blob])
    assert len(said) == 1  # it was unpinned
    pin.close()


def test_memory_that_cannot_be_pinned_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, prompt = save(random_model(make_config("llama_tied")), tmp_path / "m"), random_prompt(40, VOCAB)
    expected = load(source, torch.bfloat16, None, 0).append(prompt)
    monkeypatch.setattr(Pinner, "_register", lambda *_: False)
    model = load(source, torch.bfloat16, (), 2, (0, 1, 3))
    for _ in range(NUM_PASSES):
        model.cache.truncate(0, 0)
        assert torch.equal(model.append(prompt), expected)
    model.close()


def pinned_rate(num_bytes: int = 512 << 20) -> float:
    """Measure pinned host-to-device bytes per second: 4 warm-ups, then 16 copies between events, median of 3."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda:0")
    rates = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            device.copy_(host, non_blocking=True)
        begin.record()
        for _ in range(16):
            device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(16 * num_bytes / (begin.elapsed_time(end) / 1e3))
    return sorted(rates)[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSource]:
    """Four layers of a 70B model's shape, 7 GB, written once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path_factory.mktemp("large")))
        yield materialise(parse_shape("llama-70b,layers=4"))


@pytest.mark.parametrize("num_rows", [1, 64, 512])
def test_link_utilization(num_rows: int, large: ModelSource):
    """Stream a few layers of a 70B model's shape; print the utilization and check it against its threshold."""
    model = load(large, torch.bfloat16, (), 2)
    prompt = random_prompt(num_rows, 4096)
    rates = []
    for _ in range(6):
        model.cache.truncate(0, 0)
        before, begin = model.streamer.counters().num_bytes, time.perf_counter()
        model.append(prompt)
        torch.cuda.current_stream().synchronize()
        rates.append((model.streamer.counters().num_bytes - before) / (time.perf_counter() - begin))
    model.close()
    achieved, link = sorted(rates[1:])[2], pinned_rate()
    print(f"\n{num_rows} rows: {achieved / 1e9:.1f} of {link / 1e9:.1f} GB/s")
    assert achieved >= 0.95 * link
