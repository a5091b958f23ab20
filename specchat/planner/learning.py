"""What many answers teach the planner: tokens and times of their passes, and no text."""

from __future__ import annotations

from pathlib import Path

from specchat.closing import Closeable
from specchat.planner.statistics import AnswerStep, SharedPass, record_passes
from specchat.records.generation import Step
from specchat.records.plan import Plan

# Passes that are saved at a time: a killed process loses no more, and memory stays flat.
_NUM_PASSES = 128


class PassSteps:
    """Collects the steps of a pass, which arrive one after the other."""

    def __init__(self) -> None:
        self._steps: list[AnswerStep] = []

    def add(self, step: Step, *, samples: bool) -> SharedPass | None:
        """Add a step, and return the steps of its pass once all have arrived, else None.

        Args:
            step: next step of any answer.
            samples: whether the answer is sampled.
        """
        if not step.pass_s:  # no pass served the answer
            return None
        self._steps.append(AnswerStep(step, samples=samples))
        if len(self._steps) < step.num_sharing:
            return None
        whole, self._steps = self._steps, []
        return whole


class Learning(Closeable):
    """Saves passes for the next plan of these models.

    Args:
        folder: the state folder.
        plan: plan that the engine runs under.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self.plan = plan
        self._passes: list[SharedPass] = []

    def add(self, shared: SharedPass) -> None:
        """Add the steps of a pass."""
        self._passes.append(shared)
        if len(self._passes) == _NUM_PASSES:
            self.close()

    def close(self) -> None:
        """Save the passes that are not saved yet."""
        if self._passes:
            record_passes(self._folder, self.plan, self._passes)
            self._passes = []
