"""The watch over the memory at the prompt."""

from __future__ import annotations

from threading import Event, active_count
from typing import Any

import pytest

from specchat.errors import LostWorkerError
from specchat.serve.worker import AnswerWorker
from specchat.ui import idle


class Engine:
    def __init__(self, error: Exception | None = None) -> None:
        self.seen, self._error = Event(), error

    def relieve(self) -> None:
        self.seen.set()
        if self._error is not None:
            raise self._error


def test_the_engine_is_asked_until_the_prompt_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle, "_EVERY_S", 0.001)
    engine: Any = Engine()
    before = active_count()
    with idle.watching(engine, print):
        assert engine.seen.wait(30)
    engine.seen.clear()
    assert not engine.seen.wait(0.02) and active_count() == before


def test_an_error_is_raised_where_the_prompt_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle, "_EVERY_S", 0.001)
    engine: Any = Engine(OSError("no"))
    with pytest.raises(OSError, match="no"), idle.watching(engine, print):
        assert engine.seen.wait(30)


def test_a_lost_worker_is_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle, "_EVERY_S", 0.001)
    engine: Any = Engine(LostWorkerError("worker 1 is gone"))
    told, came = list[str](), Event()

    def tell(error: LostWorkerError) -> None:
        told.append(error.message)
        came.set()

    with idle.watching(engine, tell):
        assert came.wait(30)
        engine.seen.clear()
        assert not engine.seen.wait(0.02), "a lost worker does not come back"
    assert told == ["worker 1 is gone"]


def test_a_model_that_loads_is_not_asked():
    with idle.watching(None, print):
        pass


def test_a_server_asks_while_nobody_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specchat.serve.worker._IDLE_S", 0.001)
    engine: Any = Engine(OSError("no"))
    warned = Event()
    worker = AnswerWorker(engine, most_waiting=1, warn=lambda text: warned.set())
    worker.start()
    try:
        assert engine.seen.wait(30) and warned.wait(30)
        engine.seen.clear()
        assert engine.seen.wait(30), "the server ended with the error"
    finally:
        worker.close()


def test_a_server_tells_once_that_a_worker_was_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specchat.serve.worker._IDLE_S", 0.001)
    engine: Any = Engine(LostWorkerError("worker 1 is gone"))
    told = list[str]()
    worker = AnswerWorker(engine, most_waiting=1, warn=told.append)
    worker.start()
    try:
        for _ in range(3):
            assert engine.seen.wait(30)
            engine.seen.clear()
    finally:
        worker.close()
    assert told == ["worker 1 is gone: no request can be answered until the server is started again"]
