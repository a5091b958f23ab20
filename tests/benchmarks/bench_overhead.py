"""What measuring costs: answers through the bench, clocks and all, against the bare engine with its clocks taken out.

    python tests/benchmarks/bench_overhead.py [PAIRS]

The demo pair; each pair of answers is to the same prompt, in turn, the first of the two alternating. Prints the ratio
of their times with its 95% interval. Not a test: run it on a quiet machine.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from threading import Event
from unittest.mock import patch

from specchat.bench.prompts import BUILT_IN
from specchat.bench.records import Request
from specchat.bench.summary import ratio_of
from specchat.bench.systems import EngineSystem
from specchat.config import Message, Sampling, Step
from specchat.engine.engine import Engine
from specchat.models.catalog import demo_source
from specchat.models.hf_compat import load_tokenizer
from specchat.planner.search import PlanRequest, make_plan

NUM_PAIRS = 60
MAX_TOKENS = 24


class NoClock:
    """Takes the place of `StepClock` and looks at no clock."""

    def __init__(self, _streamer: object) -> None:
        self.drafting = self.verifying = self.sampling = nullcontext

    def step(self, tokens, reason, new_rows, cached_rows, tree_nodes, depth, guesses=(), tree=None) -> Step:
        return Step(tokens, reason, new_rows, cached_rows, tree_nodes, 0, depth, 0, 0, 0, 0, 0, 0)


def bare(engine: Engine, request: Request) -> float:
    engine.forget()
    with patch("specchat.engine.stats.StepClock", NoClock):
        begin = time.perf_counter()
        for _ in engine.generate(
            request.prompt_ids, request.sampling, stop_ids=request.stop_ids, max_tokens=request.max_tokens
        ):
            pass
        return time.perf_counter() - begin


def measured(engine: Engine, request: Request) -> float:
    system = EngineSystem("specchat", engine)
    system.begin()
    begin = time.perf_counter()
    system.answer(request, Event())
    return time.perf_counter() - begin


def main() -> None:
    num_pairs = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_PAIRS
    target, draft = demo_source("target"), demo_source("draft")
    tokenizer = load_tokenizer(target.path)
    prompts = [tuple(tokenizer.encode(tokenizer.render([Message("user", question.turns[0])]))) for question in BUILT_IN]
    logs: dict[str, list[float]] = {}
    plan = make_plan(PlanRequest(target, draft, device="cpu", ctx=512, tree_budget=64))  # adaptive trees look at clocks
    with Engine.load(plan, target, draft) as engine:
        for number in range(-4, num_pairs):  # the first four warm up
            request = Request(prompts[number % len(prompts)], Sampling(), frozenset(), MAX_TOKENS)
            order = (bare, measured) if number % 2 else (measured, bare)
            seconds = {each: each(engine, request) for each in order}
            if number >= 0:
                logs[str(number)] = [math.log(seconds[measured] / seconds[bare])]
    found = ratio_of(logs)
    assert found is not None and found.low is not None and found.high is not None
    percent = [f"{100 * (each - 1):+.2f}%" for each in (found.ratio, found.low, found.high)]
    print(f"{percent[0]} [{percent[1]}, {percent[2]}], {found.pairs} pairs")


if __name__ == "__main__":
    main()
