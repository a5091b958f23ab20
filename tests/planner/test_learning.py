"""What many answers teach: passes, whose steps arrive one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support.fake_engine import PLAN

from specchat.planner.learning import Learning, PassSteps
from specchat.planner.statistics import AnswerStep, load
from specchat.records.generation import Step

STEP = Step((1, 2), None, 1, 100, 9, 1, 3, 0.5, 0.1, 0.4, 0.0, 0.0, 0)


def test_the_steps_of_a_pass_are_collected():
    steps, shared = PassSteps(), replace(STEP, num_sharing=2)
    assert steps.add(shared, samples=True) is None
    assert steps.add(Step.without_pass("interrupt"), samples=True) is None
    assert steps.add(shared, samples=False) == [AnswerStep(shared, samples=True), AnswerStep(shared, samples=False)]
    assert steps.add(STEP, samples=False) == [AnswerStep(STEP, samples=False)]
    assert steps.add(shared, samples=False) is None


def test_passes_are_saved_now_and_then_and_at_the_end(tmp_path: Path):
    def num_saved() -> float:
        return sum(tally.steps for tally in load(tmp_path).plans.values())

    with Learning(tmp_path, PLAN) as learning:
        for _ in range(300):
            learning.add([AnswerStep(STEP, samples=False)])
        assert 0 < num_saved() < 300
    assert num_saved() == 300
