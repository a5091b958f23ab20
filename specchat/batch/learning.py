"""What a job teaches the planner: tokens and times of its passes, and no text."""

from __future__ import annotations

from pathlib import Path

from specchat.closing import Closeable
from specchat.planner.statistics import SharedPass, record_passes
from specchat.records.plan import Plan

# Passes that are saved at a time: a killed job loses no more, and memory stays flat.
_NUM_PASSES = 128


class Learning(Closeable):
    """Saves the passes of a job for the next plan of these models.

    Args:
        folder: the state folder.
        plan: plan that the engine runs under.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._passes: list[SharedPass] = []

    def add(self, shared: SharedPass) -> None:
        """Add the steps of a pass."""
        self._passes.append(shared)
        if len(self._passes) == _NUM_PASSES:
            self.close()

    def close(self) -> None:
        """Save the passes that are not saved yet."""
        if self._passes:
            record_passes(self._folder, self._plan, self._passes)
            self._passes = []
