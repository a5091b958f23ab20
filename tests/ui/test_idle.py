"""The watch over the memory at the prompt."""

from __future__ import annotations

from threading import Event, active_count
from typing import Any

import pytest

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
    with idle.watching_memory(engine):
        assert engine.seen.wait(30)
    engine.seen.clear()
    assert not engine.seen.wait(0.02) and active_count() == before


def test_an_error_is_raised_where_the_prompt_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle, "_EVERY_S", 0.001)
    engine: Any = Engine(OSError("no"))
    with pytest.raises(OSError, match="no"), idle.watching_memory(engine):
        assert engine.seen.wait(30)


def test_a_model_that_loads_is_not_asked():
    with idle.watching_memory(None):
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
