"""The measured systems behind one interface: specchat and its baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Event
from typing import TYPE_CHECKING, Protocol

from specchat.bench.records import AnswerRecord, Request
from specchat.chat.generator import Generator
from specchat.records.generation import Step

if TYPE_CHECKING:
    from specchat.bench.baselines import OffloadedModel

Clock = Callable[[], float]


def _nothing() -> None:
    """Do nothing between passes."""


class System(Protocol):
    """A system that answers prompts.

    Attributes:
        name: name in the report.
        is_keyed: whether samples depend only on seed and position, so that sampled texts can be compared too.
    """

    name: str
    is_keyed: bool

    def begin(self) -> None:
        """Begin a new conversation and drop all caches of the last one."""

    def answer(self, request: Request, cancel: Event) -> AnswerRecord | None:
        """Return the answer, or None if `cancel` interrupted it."""


class MeasuredEngine(Generator, Protocol):
    """The part of `specchat.engine.engine.Engine` that the bench uses."""

    def forget(self) -> None: ...  # noqa: D102


class EngineSystem:
    """The engine, with or without its draft.

    Args:
        name: name in the report.
        engine: measured engine.
        scope: makes a context that is entered for each answer, for example one without the draft.
        between_passes: function called before every pass; its time is not counted.
        clock: clock in seconds.
    """

    is_keyed = True

    def __init__(
        self,
        name: str,
        engine: MeasuredEngine,
        *,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
        between_passes: Callable[[], None] = _nothing,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.name = name
        self._engine = engine
        self._scope = scope
        self._between_passes = between_passes
        self._clock = clock

    def begin(self) -> None:
        """Empty the KV caches."""
        self._engine.forget()

    def answer(self, request: Request, cancel: Event) -> AnswerRecord | None:
        """Run the engine to the end of the answer."""
        with self._scope():
            steps = self._engine.generate(
                request.prompt_ids,
                request.sampling,
                stop_ids=request.stop_ids,
                max_tokens=request.max_tokens,
                cancel=cancel,
            )
            timed = list(self._timed(steps))
        reason = timed[-1][0].finish_reason
        if reason is None or reason == "interrupt":
            return None
        ends = [end for step, end in timed if step.token_ids]
        return AnswerRecord(
            token_ids=tuple(token for step, _ in timed for token in step.token_ids),
            finish_reason=reason,
            ttft_s=ends[0],
            decode_s=ends[-1] - ends[0],
            num_passes=len(ends),
            first_tokens=next(len(step.token_ids) for step, _ in timed if step.token_ids),
            cached_tokens=timed[0][0].cached_rows,
            steps=tuple(step for step, _ in timed),
        )

    def _timed(self, steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
        """Yield steps with their end times, in seconds since the request."""
        spent_s = 0.0
        while True:
            self._between_passes()
            begin = self._clock()
            step = next(steps, None)
            spent_s += self._clock() - begin
            if step is None:
                return
            yield step, spent_s
            if step.finish_reason is not None:
                return


class OffloadedSystem:
    """The system of transformers' `generate` with accelerate's offloading.

    Args:
        name: name in the report.
        model: loaded model.
        between_passes: function called before every pass, or None; its time is not counted.
    """

    is_keyed = False

    def __init__(self, name: str, model: OffloadedModel, between_passes: Callable[[], None] | None = None) -> None:
        self.name = name
        self._model = model
        self._between_passes = between_passes

    def begin(self) -> None:
        """Do nothing: `generate` keeps no cache between answers."""

    def answer(self, request: Request, cancel: Event) -> AnswerRecord | None:
        """Run `generate` to the end of the answer."""
        out = self._model.generate(
            request.prompt_ids,
            request.sampling,
            stop_ids=request.stop_ids,
            max_tokens=request.max_tokens,
            before_pass=self._between_passes,
            should_stop=cancel.is_set,
        )
        if cancel.is_set():
            return None
        return AnswerRecord(
            token_ids=out.token_ids,
            finish_reason="stop" if out.token_ids[-1] in request.stop_ids else "length",
            ttft_s=out.pass_ends_s[0],
            decode_s=out.pass_ends_s[-1] - out.pass_ends_s[0],
            num_passes=len(out.pass_tokens),
            first_tokens=out.pass_tokens[0],
        )
