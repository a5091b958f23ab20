"""A signal that arrives where Python drops exceptions still ends the program."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.delays import python_path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys, time, types, weakref
from specchat.__main__ import main
from specchat.cli.exit_status import guarded, leave

class Thing:
    pass

class Last:
    def __del__(self):
        os.kill(os.getpid(), {number})
        for _ in range(1000):
            pass

def callback(_):
    os.kill(os.getpid(), {number})
    for _ in range(1000):
        pass

def work():
    if {by_callback}:
        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
    else:
        Last()
    time.sleep(20)
    return 0

sys.modules["specchat.cli.app"] = types.SimpleNamespace(main=lambda: leave(guarded(work)))
main()
"""


def run(program: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"PYTHONPATH": python_path(ROOT), "PATH": ""}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("by_callback", [True, False], ids=["callback", "destructor"])
def test_a_signal_within_a_callback_is_not_lost(number: signal.Signals, by_callback: bool):
    program = PROGRAM.format(number=int(number), by_callback=by_callback)
    ended = run(program)
    assert ended.returncode == 128 + number
    assert ended.stderr == b""


def test_other_exceptions_there_are_still_shown():
    program = """
import sys, types
from specchat.__main__ import main

class Last:
    def __del__(self):
        raise ValueError("in a destructor")

sys.modules["specchat.cli.app"] = types.SimpleNamespace(main=Last)
main()
"""
    ended = run(program)
    assert ended.returncode == 0 and b"in a destructor" in ended.stderr
