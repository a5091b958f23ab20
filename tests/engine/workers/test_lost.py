"""Workers that fail, end, freeze or do not fit: all processes end soon, and one line names the worker."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from support.crews import (
    be_another_version,
    choice_of,
    compute_slowly,
    crew,
    fail_soon,
    load_with,
    start_worker,
    take_a_second_and_be_impatient,
    with_owners,
)
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import Quiet
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.workers import connection
from specchat.errors import (
    DifferentWeightsError,
    LostWorkerError,
    VersionMismatchError,
    WorkerUnreachableError,
    WrongTokenError,
)
from specchat.loading.engine import load_planned
from specchat.loading.workers import worker_inputs
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

# Everything must have ended by then, in seconds.
SOON_S = 6.0
OWNER = [0, 1, 2, 1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(random_model(make_config("llama")), tmp_path_factory.mktemp("llama"))


def write_on(engine: Engine) -> None:
    for _ in engine.generate(random_prompt(20, VOCAB), Sampling(), stop_ids=NOTHING, max_tokens=200):
        pass


@pytest.mark.parametrize(
    ("strike", "words"),
    [
        (None, "failed: out of memory"),
        (signal.SIGKILL, "is gone: the connection was closed"),
        pytest.param(signal.SIGSTOP, "has not answered for 4 s", marks=pytest.mark.slow),
    ],
    ids=["raised", "killed", "frozen"],
)
def test_a_lost_worker_ends_all_and_is_named(strike: int | None, words: str, llama: ModelSource, tmp_path: Path):
    plan = with_owners(make_plan(llama, None, num_layers=4), OWNER)
    with crew(2, tmp_path, [compute_slowly, fail_soon if strike is None else compute_slowly]) as workers:
        other, lost = workers
        engine = load_with(workers, plan, llama, None)
        struck = [time.monotonic()]

        def hit() -> None:
            struck[0] = time.monotonic()
            lost.kill(strike or 0)

        if strike is not None:
            threading.Timer(0.3, hit).start()
        with pytest.raises(LostWorkerError) as raised:
            write_on(engine)
        name = f"worker 2 (127.0.0.1:{lost.address[1]}) {words}"
        assert raised.value.message == name and raised.value.hint is not None
        assert other.wait(SOON_S) == 1
        assert time.monotonic() - struck[0] < SOON_S
        assert f"error: {name}" in other.errors.read_text().splitlines()
        with pytest.raises(LostWorkerError):
            write_on(engine)
        engine.close()
        if strike is None:
            assert lost.wait(SOON_S) == 1
            assert "error: MemoryError: " in lost.errors.read_text()


def test_a_worker_lost_between_answers_is_named_before_the_next(llama: ModelSource, tmp_path: Path):
    plan = with_owners(make_plan(llama, None, num_layers=4), OWNER)
    with crew(2, tmp_path) as (other, lost), load_with([other, lost], plan, llama, None) as engine:
        engine.relieve()
        lost.kill()
        end = time.monotonic() + SOON_S
        with pytest.raises(LostWorkerError, match=rf"worker 2 \(127.0.0.1:{lost.address[1]}\) is gone"):
            while time.monotonic() < end:
                engine.relieve()
                time.sleep(0.01)
        assert other.wait(SOON_S) == 1


@pytest.mark.slow
def test_workers_end_with_the_machine_that_has_the_terminal(llama: ModelSource, tmp_path: Path):
    plan = with_owners(make_plan(llama, None, num_layers=4), OWNER)
    with crew(2, tmp_path) as workers:
        engine = load_with(workers, plan, llama, None)
        for each in engine.target._crew._connections:  # type: ignore[attr-defined]
            each.channel.close()
        assert [worker.wait(SOON_S) for worker in workers] == [1, 1]
        assert "the machine 127.0.0.1 is gone: the connection was closed" in workers[0].errors.read_text()
        engine.close()


@pytest.mark.slow
def test_a_slow_pass_is_no_loss(llama: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "PATIENCE_S", 0.5)
    monkeypatch.setattr(connection, "BEAT_S", 0.05)
    plan = with_owners(make_plan(llama, None, num_layers=4), [0, 0, 0, 1])
    patient = crew(1, tmp_path, [take_a_second_and_be_impatient])
    with patient as workers, load_with(workers, plan, llama, None) as engine:
        assert len(write(engine, random_prompt(5, VOCAB), Sampling(), 1)[0]) == 1


def test_what_does_not_fit_is_refused_before_loading(llama: ModelSource, tmp_path: Path):
    """A refused worker goes on waiting; only the first words of each error are its own."""
    config = make_config("llama")
    other = save(random_model(config, seed=1), tmp_path / "other")
    plan = with_owners(make_plan(llama, None, num_layers=4), [0, 1, 0, 1])

    with crew(2, tmp_path, [None, be_another_version]) as (worker, newer):
        with pytest.raises(WrongTokenError, match="has another token"):
            load_planned(llama, None, plan, Quiet(), choice_of([worker], b"another token, as long"))
        with pytest.raises(VersionMismatchError, match=r"worker 1 .* has specchat 0, torch 0, transformers 0"):
            load_with([newer], plan, llama, None)
        assert worker.poll() is None and newer.poll() is None
        assert "it has another token" in worker.errors.read_text()
        assert worker_inputs(choice_of([worker]))[0].machine.device == "cpu"
        worker.end()
        with pytest.raises(WorkerUnreachableError, match="cannot be reached: connection refused"):
            load_with([worker], plan, llama, None)
    changed = start_worker(tmp_path / "changed.txt", model=str(other.path))
    with pytest.raises(DifferentWeightsError, match=r"worker 1 .* has other weights of"):
        load_with([changed], plan, llama, None)
    assert changed.poll() is None
    changed.end()
