"""When a second Ctrl-C leaves the program."""

from types import SimpleNamespace

import pytest

from specchat.ui.interrupts import Interrupts


def test_a_second_ctrl_c_leaves_within_two_seconds_of_the_first(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("specchat.ui.interrupts.time", SimpleNamespace(monotonic=lambda: clock.now))
    interrupts = Interrupts()
    for clock.now in (100.0, 102.0, 104.5):
        interrupts.note()
    clock.now += 1.9
    with pytest.raises(KeyboardInterrupt):
        interrupts.note()
    interrupts.forget()
    interrupts.note()
