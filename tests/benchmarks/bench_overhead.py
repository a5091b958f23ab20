"""What measuring costs: every clock, counter and record of the bench, timed where it happens and summed over answers.

    python tests/benchmarks/bench_overhead.py [ANSWERS]

Comparing answers with and without measuring cannot settle it: they differ by 3% from chance alone, and by less than
0.1% from measuring. So here each measuring call is itself between two looks at the clock, of which one counts as its
own: what is printed is too much rather than too little. With the demo pair, whose passes take milliseconds; a pass that
streams takes longer, and its measuring does not. Prints the share of the answers' time with its 95% interval, calls and
time per step. Not a test.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event
from types import TracebackType
from unittest.mock import patch

from support.loading import load_engine, plan_here, plan_request

from specchat.bench.prompts import BUILT_IN
from specchat.bench.records import Request
from specchat.bench.summary import ratio_of
from specchat.bench.systems import EngineSystem
from specchat.engine.engine import Engine
from specchat.engine.stats import StepClock
from specchat.models.catalog.ref import demo_source
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling, Step

NUM_ANSWERS = 48
NUM_WARM_UP = 4
MAX_TOKENS = 24


class Meter:
    """Time spent in measuring, and how often."""

    calls = 0
    seconds = 0.0

    @classmethod
    @contextmanager
    def counts(cls) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        cls.seconds += time.perf_counter() - begin
        cls.calls += 1


class Metered:
    """A part of a step that is being timed: entering and leaving are measuring, what is between is not."""

    def __init__(self, timed: AbstractContextManager[None]) -> None:
        self._timed = timed

    def __enter__(self) -> None:
        with Meter.counts():
            self._timed.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with Meter.counts():
            return self._timed.__exit__(kind, error, trace)


class MeteredClock(StepClock):
    """The engine's clock, and what it costs."""

    def __init__(self, *arguments) -> None:
        with Meter.counts():
            super().__init__(*arguments)

    def drafting(self) -> Metered:
        return Metered(super().drafting())

    def verifying(self) -> Metered:
        return Metered(super().verifying())

    def sampling(self) -> Metered:
        return Metered(super().sampling())

    def step(self, *arguments, **named) -> Step:
        with Meter.counts():
            return super().step(*arguments, **named)


class Watched:
    """An engine that knows how long it was at work: the rest of an answer's time is the bench's own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.forget = engine.forget
        self.work_s = 0.0
        self.num_steps = 0

    def generate(self, *arguments, **named) -> Iterator[Step]:
        steps = self._engine.generate(*arguments, **named)
        while True:
            begin = time.perf_counter()
            step = next(steps, None)
            self.work_s += time.perf_counter() - begin
            if step is None:
                return
            self.num_steps += 1
            yield step


def answer(engine: Watched, request: Request) -> tuple[float, float]:
    """Seconds that an answer took, and of them those that went into measuring."""
    system = EngineSystem("specchat", engine)
    system.begin()
    work_s, measuring_s = engine.work_s, Meter.seconds
    begin = time.perf_counter()
    system.answer(request, Event())
    total_s = time.perf_counter() - begin
    return total_s, total_s - (engine.work_s - work_s) + Meter.seconds - measuring_s


def main() -> None:
    num_answers = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_ANSWERS
    target, draft = demo_source("target"), demo_source("draft")
    tokenizer = load_tokenizer(target.path)
    prompts = [tuple(tokenizer.encode(tokenizer.render([Message("user", question.turns[0])]))) for question in BUILT_IN]
    plan = plan_here(
        plan_request(target, draft, device="cpu", ctx=512, tree_budget=64)
    )  # adaptive trees look at clocks
    logs: dict[str, list[float]] = {}
    with load_engine(plan, target, draft) as loaded, patch("specchat.engine.stats.StepClock", MeteredClock):
        engine = Watched(loaded)
        for number in range(NUM_WARM_UP + num_answers):
            if number == NUM_WARM_UP:
                Meter.calls, Meter.seconds, engine.num_steps, engine.work_s = 0, 0.0, 0, 0.0
            request = Request(prompts[number % len(prompts)], Sampling(), frozenset(), MAX_TOKENS)
            total_s, measuring_s = answer(engine, request)
            if number >= NUM_WARM_UP:
                logs[str(number)] = [math.log(measuring_s / total_s)]
    found = ratio_of(logs)
    assert found is not None and found.low is not None and found.high is not None
    print(
        f"{found.ratio:.3%} of the time goes into measuring [{found.low:.3%}, {found.high:.3%}], {found.pairs} answers"
    )
    steps = engine.num_steps
    print(
        f"the engine: {Meter.calls / steps:.1f} calls and {Meter.seconds / steps * 1e6:.0f} us of "
        f"{engine.work_s / steps * 1e3:.1f} ms a step, {steps} steps"
    )


if __name__ == "__main__":
    main()
