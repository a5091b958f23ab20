"""Layers on several processes: the text of one process, whoever owns which layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.crews import Worker, crew, load_with, with_owners
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import load_engine
from support.plans import changed
from support.tiny_models import ARCHITECTURES, SPECIAL, VOCAB, make_config, perturbed, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.workers.models import CrewModel
from specchat.errors import UnsupportedModelError
from specchat.records.generation import Request, Sampling
from specchat.records.microbatches import Microbatches
from specchat.records.model import ModelSource

GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, seed=3)
PROCESSED = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5)
# Layers that read the keys of other layers, or further weights for every layer, stay on one machine.
REFUSED = {"gemma3n", "gemma4", "gemma4_shared", "gemma4_moe", "gpt2", "gpt_bigcode", "bert", "opt"}
Pair = tuple[ModelSource, ModelSource, int]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    with crew(3, tmp_path_factory.mktemp("workers")) as found:
        yield found


def pair_of(architecture: str, folder: Path) -> Pair:
    config = make_config(architecture)
    if architecture == "granite":
        config.embedding_multiplier = 3.0
    model = random_model(config)
    return save(model, folder / "target"), save(perturbed(model, 0.1), folder / "draft"), config.num_hidden_layers


def requests(num_tokens: int) -> list[Request]:
    made = ((5, GREEDY), (33, SAMPLED), (17, PROCESSED), (9, GREEDY))
    return [Request(tuple(random_prompt(n, VOCAB, seed=n)), sampling, max_tokens=num_tokens) for n, sampling in made]


def texts_of(engine: Engine, asked: Sequence[Request]) -> list[list[int]]:
    """The texts of requests that share passes."""
    texts: list[list[int]] = [[] for _ in asked]
    for index, step in engine.generate_many(asked):
        texts[index] += step.token_ids
    return texts


def cancel_within(engine: Engine) -> None:
    """Cancel a pass that has begun on all ranks, when rank 0 is at its second layer."""
    target = engine.target

    class OnTheWay(threading.Event):
        def is_set(self) -> bool:
            return target.layers_done >= 1

    prompt = random_prompt(30, VOCAB)
    steps = list(engine.generate(prompt, GREEDY, stop_ids=NOTHING, max_tokens=4, cancel=OnTheWay()))
    assert steps[-1].finish_reason == "interrupt"


def check(pair: Pair, workers: Sequence[Worker], owner: Sequence[int], num_tokens: int = 8, **more: Any) -> None:
    """Compare a batch, and chats after a cancelled pass, with the texts of one process."""
    target, draft, num_layers = pair
    plan = changed(make_plan(target, draft, num_layers=num_layers, seats=3, retrieval=True), **more)
    asked = requests(num_tokens)
    with load_engine(plan, target, draft) as engine:
        expected = texts_of(engine, asked)
    crew_of = workers[: max(owner)]
    with load_with(crew_of, with_owners(plan, owner), target, draft) as engine:
        assert isinstance(engine.target, CrewModel)
        assert texts_of(engine, asked) == expected
        for request, text in zip(asked[:3], expected, strict=False):
            cancel_within(engine)
            assert write(engine, list(request.prompt_ids), request.sampling, num_tokens)[0] == text
    for worker in crew_of:
        assert worker.poll() is None, worker.errors.read_text()


# Passes of one row, two or more have 1, 2 or 3 microbatches.
CUT = Microbatches(((2, 2), (5, 3)))


def test_two_processes_write_the_text_of_one(workers: list[Worker], tmp_path: Path):
    check(pair_of("granite", tmp_path), workers, [0, 1, 0, 1], 5, chunk_rows=7)


def test_four_processes_write_the_text_of_one(workers: list[Worker], tmp_path: Path):
    more = {"resident": (1, 2), "slots": 2, "microbatches": CUT, "chunk_rows": 16}
    check(pair_of("gemma3", tmp_path), workers, [3, 1, 2, 2], 8, **more)


OWNERS = {
    "ranges of two": lambda n: [2 * i // n for i in range(n)],
    "two in turn": lambda n: [i % 2 for i in range(n)],
    "four in turn": lambda n: [i % 4 for i in range(n)],
    "four, far": lambda n: [(i + 1) % 4 for i in range(n)],
}


@pytest.mark.slow
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("architecture", [name for name in (*ARCHITECTURES, *SPECIAL) if name not in REFUSED])
def test_every_architecture_writes_the_same_text(architecture: str, owners: str, workers: list[Worker], tmp_path: Path):
    pair = pair_of(architecture, tmp_path)
    owner = OWNERS[owners](pair[2])
    more: dict[str, Any] = {"resident": (1,), "slots": 2} if "turn" in owners else {"chunk_rows": 7}
    if "two" in owners:
        more |= {"microbatches": CUT}
    check(pair, workers, owner, **more)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(REFUSED & SPECIAL.keys()))
def test_architectures_with_more_than_rows_are_refused(architecture: str, workers: list[Worker], tmp_path: Path):
    target, _, num_layers = pair_of(architecture, tmp_path)
    plan = make_plan(target, None, num_layers=num_layers)
    with pytest.raises(UnsupportedModelError, match="cannot be split over workers"):
        load_with(workers[:1], with_owners(plan, [i % 2 for i in range(num_layers)]), target, None)


def peak_bytes(worker: Worker) -> int:
    """The most memory that a worker has held."""
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_a_worker_holds_only_its_layers(tmp_path: Path):
    config = make_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 2816, 8
    model = random_model(config)
    layer_bytes = sum(4 * each.numel() for each in model.model.layers[0].parameters())
    target = save(model, tmp_path / "target")
    del model
    plan = with_owners(make_plan(target, None, num_layers=8), [0, 1, 0, 0, 0, 0, 0, 1])
    with crew(1, tmp_path) as (worker,):
        before = peak_bytes(worker)
        with load_with([worker], plan, target, None) as engine:
            write(engine, random_prompt(9, VOCAB), GREEDY, 4)
            grown = peak_bytes(worker) - before
    # It has two of eight layers. A layer is held twice while it is packed, and libraries take 45 MiB of pages.
    assert 2 * layer_bytes < grown < 3 * layer_bytes + (64 << 20), f"{grown >> 20} MiB, a layer has {layer_bytes >> 20}"
