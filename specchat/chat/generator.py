"""The engine, as far as a chat uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Protocol

from specchat.records.generation import Activity, Sampling, Step
from specchat.records.plan import Plan
from specchat.records.usage import MemoryReport


class Generator(Protocol):
    """The part of `specchat.engine.engine.Engine` that a chat uses."""

    @property
    def plan(self) -> Plan:
        """The plan that the engine runs under."""

    @property
    def load_s(self) -> float:
        """Seconds that loading took."""

    @property
    def activity(self) -> Activity:
        """The current activity; any thread may ask for it."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        max_tokens: int | None = None,
        cancel: Event | None = None,
        restore_at: Sequence[int] = (),
    ) -> Iterator[Step]:
        """Generate tokens after a prompt, one step at a time; see `Engine.generate`."""

    def truncate(self, length: int) -> None:
        """Forget committed tokens beyond `length`."""

    def relieve(self) -> None:
        """Give layers back to the system if memory is short, and notice lost workers; only between answers."""

    def memory(self) -> MemoryReport:
        """Return the memory in use, next to the plan's prediction."""

    def close(self) -> None:
        """Free memory and end threads."""
