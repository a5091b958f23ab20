"""The systems that answer: specchat itself, and what it is compared with, all asked in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Event
from typing import TYPE_CHECKING, Protocol

from specchat.bench.records import Answer, Request
from specchat.chat.generator import Generator
from specchat.records.generation import Step

if TYPE_CHECKING:
    from specchat.bench.baselines import OffloadedModel

Clock = Callable[[], float]


def _nothing() -> None:
    """Does nothing, between passes that nothing is to be done between."""


class System(Protocol):
    """Something that answers prompts.

    Attributes:
        name: as in the report.
        is_keyed: its draws depend on seed and position alone, so that sampled texts can be compared, too.
    """

    name: str
    is_keyed: bool

    def begin(self) -> None:
        """A new conversation: nothing of the last one may help."""

    def answer(self, request: Request, cancel: Event) -> Answer | None:
        """The answer; None when `cancel` cut it off."""


class Measured(Generator, Protocol):
    """The part of `specchat.engine.engine.Engine` that is measured."""

    def forget(self) -> None: ...  # noqa: D102


class EngineSystem:
    """The engine, with its draft or without.

    Args:
        name: as in the report.
        engine: is measured.
        scope: holds while it answers (used to leave the draft out).
        between_passes: done before every pass, and not part of its time.
        clock: seconds.
    """

    is_keyed = True

    def __init__(
        self,
        name: str,
        engine: Measured,
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
        """Empties the caches."""
        self._engine.forget()

    def answer(self, request: Request, cancel: Event) -> Answer | None:
        """Runs the engine to the end of the answer."""
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
        return Answer(
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
        """Steps and when they ended, in seconds since the request."""
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
    """transformers' `generate` over accelerate's offloading.

    Args:
        name: as in the report.
        model: loaded.
        between_passes: done before every pass, and not part of its time; None for nothing.
    """

    is_keyed = False

    def __init__(self, name: str, model: OffloadedModel, between_passes: Callable[[], None] | None = None) -> None:
        self.name = name
        self._model = model
        self._between_passes = between_passes

    def begin(self) -> None:
        """It keeps nothing from one answer to the next."""

    def answer(self, request: Request, cancel: Event) -> Answer | None:
        """Runs `generate`."""
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
        return Answer(
            token_ids=out.token_ids,
            finish_reason="stop" if out.token_ids[-1] in request.stop_ids else "length",
            ttft_s=out.pass_ends_s[0],
            decode_s=out.pass_ends_s[-1] - out.pass_ends_s[0],
            num_passes=len(out.pass_tokens),
            first_tokens=out.pass_tokens[0],
        )
