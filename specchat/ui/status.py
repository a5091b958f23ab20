"""The status line: the engine's phase, tokens, rates and memory during an answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from specchat.records.generation import Activity, Step
from specchat.records.plan import Plan
from specchat.records.usage import MemoryReport
from specchat.units import GIB, format_bytes, format_rate

_MEMORY_EVERY_S = 1.0
_SEPARATOR = " · "


@dataclass(frozen=True)
class Watched:
    """The facts about an engine that the status line reads from the main thread.

    Attributes:
        plan: plan of the engine.
        activity: function that returns the current activity.
        memory: function that returns the memory in use.
    """

    plan: Plan
    activity: Callable[[], Activity]
    memory: Callable[[], MemoryReport]


class AnswerStatus:
    """The token and time counts of an answer during generation.

    Args:
        engine: facts about the engine that generates the answer.
        cancel: event that is set once the user has asked to stop.
        clock: function that returns the time in seconds.
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
        """Seconds since the message was sent."""
        return self._clock() - self._begin

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return self._num_tokens

    def saw(self, num_tokens: int, step: Step | None) -> None:
        """Count the tokens and the step of a record."""
        self._num_tokens += num_tokens
        if step is not None:
            self._num_steps += bool(step.token_ids)
            self._rate_bytes_per_s = step.streamed_bytes / step.verify_s if step.verify_s else 0.0

    def line(self, width: int) -> str:
        """Return the parts of the status that fit into `width` columns, most important first."""
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
    """Return the phase of the engine; during a pass also the number of layers that are done."""
    if activity.phase in ("prefill", "verifying"):
        return f"{activity.phase} {activity.layers_done} of {activity.num_layers}"
    return {"idle": "waiting", "drafting": "drafting"}[activity.phase]


def memory_text(memory: MemoryReport, device: str) -> str:
    """Return the memory in use, as on the stats line."""
    if device == "cpu":
        return f"RAM {_gib(memory.device_peak_bytes)}"
    return f"VRAM {_gib(memory.device_peak_bytes)} · RAM {_gib(memory.host_peak_bytes)}"


def given_back_lines(memory: MemoryReport) -> list[str]:
    """Return a line about layers that left the memory while it was short."""
    if not memory.given_back_layers:
        return []
    layers = "1 layer" if memory.given_back_layers == 1 else f"{memory.given_back_layers} layers"
    size = format_bytes(memory.given_back_bytes)
    return [f"memory was short: {layers} ({size}) given back to the system, and read from the disk since"]


def _gib(num_bytes: int) -> str:
    """Return a size in GiB; sizes below 1 GiB have a smaller unit."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else format_bytes(num_bytes)
