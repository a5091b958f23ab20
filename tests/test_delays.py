"""With TEST_DELAYS=SEED, passes and reads are slow at random, in programs that tests start as well."""

import os
import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import delays
from support.delays import DELAYED, VARIABLE, Delays, python_path

TESTS = Path(__file__).parent


@pytest.mark.parametrize("module", DELAYED)
def test_what_is_delayed_is_there(module):
    for name in DELAYED[module]:
        assert callable(reduce(getattr, name.split("."), import_module(module)))


def test_a_program_is_delayed_if_that_was_asked_for(monkeypatch):
    for seed in ("", "1"):
        monkeypatch.setenv(VARIABLE, seed)
        environment = os.environ | {"PYTHONPATH": python_path(TESTS, TESTS.parent)}
        code = "from support.fake_engine import FakeEngine; print(hasattr(FakeEngine._step, '__wrapped__'))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{bool(seed)}\n"


def test_delays_are_those_of_the_seed_and_the_test(monkeypatch):
    slept = []
    monkeypatch.setattr(delays.time, "sleep", slept.append)

    def some(seed, name):
        slept.clear()
        drawn, module = Delays(seed), SimpleNamespace(double=lambda x: 2 * x)
        drawn.begin(name)
        drawn.slow(module, ["double"])
        assert [module.double(i) for i in range(1000)] == [2 * i for i in range(1000)]
        return [*slept]

    assert some("1", "a") == some("1", "a") != some("2", "a")
    assert some("1", "a") != some("1", "b")
    assert max(some("1", "a")) <= 0.2
