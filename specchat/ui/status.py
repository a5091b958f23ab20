"""The line that says what is going on while an answer is awaited and written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from specchat.records.generation import Activity, Step
from specchat.records.plan import MemoryReport, Plan
from specchat.units import GIB, format_bytes, format_rate

_MEMORY_EVERY_S = 1.0
_SEPARATOR = " · "


@dataclass(frozen=True)
class Watched:
    """What of an engine the status line asks, from the main thread.

    Attributes:
        plan: what it runs under.
        activity: what it is at.
        memory: what it holds.
    """

    plan: Plan
    activity: Callable[[], Activity]
    memory: Callable[[], MemoryReport]


class AnswerStatus:
    """Counts an answer's tokens and time as they come.

    Args:
        engine: what writes the answer.
        cancel: whether it was asked to stop.
        clock: seconds.
    """

    def __init__(self, engine: Watched, cancel: Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._cancel = cancel
        self._clock = clock
        self._begin = clock()
        self._num_tokens = 0
        self._num_steps = 0
        self._rate_bytes_per_s = 0.0
        self._memory: MemoryReport | None = None
        self._memory_at = float("-inf")

    @property
    def elapsed_s(self) -> float:
        """Since the question was sent."""
        return self._clock() - self._begin

    @property
    def num_tokens(self) -> int:
        """Written so far."""
        return self._num_tokens

    def saw(self, num_tokens: int, step: Step | None) -> None:
        """Counts what a record brought."""
        self._num_tokens += num_tokens
        if step is not None:
            self._num_steps += bool(step.token_ids)
            self._rate_bytes_per_s = step.streamed_bytes / step.verify_s if step.verify_s else 0.0

    def line(self, width: int) -> str:
        """As much of it as fits, most important first."""
        line = ""
        for part in self._parts():
            longer = f"{line}{_SEPARATOR}{part}" if line else part
            if len(longer) >= width:
                break
            line = longer
        return line

    def _parts(self) -> list[str]:
        activity, elapsed_s = self._engine.activity(), self.elapsed_s
        parts = ["stopping" if self._cancel.is_set() else phase_text(activity)]
        if self._num_tokens:
            parts += [f"{self._num_tokens:,} tok", f"{self._num_tokens / max(elapsed_s, 1e-3):.1f} tok/s"]
            parts.append(f"{self._num_tokens / max(self._num_steps, 1):.1f} tok/pass")
        parts.append(f"{elapsed_s:.0f} s")
        if self._rate_bytes_per_s:
            parts.append(format_rate(self._rate_bytes_per_s))
        return [*parts, memory_text(self._memory_now(), self._engine.plan.work.device)]

    def _memory_now(self) -> MemoryReport:
        if self._memory is None or self._clock() - self._memory_at >= _MEMORY_EVERY_S:
            self._memory, self._memory_at = self._engine.memory(), self._clock()
        return self._memory


def phase_text(activity: Activity) -> str:
    """What the engine is at, with the layers that a pass has behind it."""
    if activity.phase in ("prefill", "verifying"):
        return f"{activity.phase} {activity.layers_done} of {activity.num_layers}"
    return {"idle": "waiting", "drafting": "drafting"}[activity.phase]


def memory_text(memory: MemoryReport, device: str) -> str:
    """GiB in use, as on the stats line."""
    if device == "cpu":
        return f"RAM {_gib(memory.device_peak_bytes)}"
    return f"VRAM {_gib(memory.device_peak_bytes)} · RAM {_gib(memory.host_peak_bytes)}"


def _gib(num_bytes: int) -> str:
    """GiB without the unit; less than one says its unit."""
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB else format_bytes(num_bytes)
