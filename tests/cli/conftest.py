"""The command line in this process, with and without a model."""

import importlib
import io
import signal
import sys
from types import SimpleNamespace

import pytest
from support import fake_cli

from specchat.cli.app import run_command_line
from specchat.cli.exit_status import EXIT_CODES


@pytest.fixture
def specchat(monkeypatch, capfd):
    """Return a function that runs the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = run_command_line(arguments)
        out, err = capfd.readouterr()
        assert code in EXIT_CODES
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fake(specchat, monkeypatch):
    """Return a function that runs the command line with a fake model."""
    importlib.import_module("specchat.models.hf.tokenizer")  # import it now, so that no module keeps the fake
    for module in ("engine.engine", "engine.device", "models.hf.tokenizer", "models.hf.light_imports"):
        name = f"specchat.{module}"
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    for name in ("planning.make_plan", "engine.load_planned"):
        monkeypatch.setattr(f"specchat.loading.{name}", None)  # restores the original after the test
    monkeypatch.setattr("specchat.models.checkpoint.generation_config.load_generation_defaults", None)
    fake_cli.install()
    return specchat
