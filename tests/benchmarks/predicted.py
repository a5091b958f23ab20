"""Predicted and measured speed of many plans, and the chosen plan against others, on this machine's disk.

    PYTHONPATH=. python tests/benchmarks/predicted.py [--only N] [--no-grid]

Every configuration is predicted from rates that are measured first, without what earlier chats have shown, and then
answers questions, after one that is not counted: adaptive trees learn from it what their nodes cost. What streams
comes from the disk, past the page cache. Speeds are of steps that read one new token: tokens over seconds. The grid
measures each plan once, and then the three fastest and the chosen one three times more, interleaved. Fails above a
median error of 15%, or where a chosen plan reaches less than 0.90 of the best one.
Takes about a quarter of an hour and 4 GB of disk (SPECCHAT_CACHE_DIR) on two cores; run it on a quiet machine.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace

from support.loading import Quiet, load_engine, model_request, yes

from specchat.bench.prompts import BUILT_IN
from specchat.errors import DoesNotFitError, SpecchatError
from specchat.hardware.disk import evict
from specchat.hardware.probe import probe
from specchat.loading import planning
from specchat.loading.engine import make_packs
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.paths import cache_folder
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.units import MIB

WIDE = "shape:hidden=2048,layers=12,heads=16,kv_heads=4,head_dim=128,mlp=7168"
DEEP = "shape:hidden=1024,layers=24,heads=8,kv_heads=4,head_dim=128,mlp=3584"
MAX_TOKENS, QUESTIONS, GRID_QUESTIONS = 24, 7, 3
MEDIAN_ERROR, LEAST_SHARE = 0.15, 0.90
STREAMED = {
    "ram_bytes": 0,
    "ctx": 512,
    "device": "cpu",
}
CONFIGURATIONS = [
    *(
        model_request(model=model, quant=quant, vram_bytes=vram * MIB, tree_budget=budget, **STREAMED)
        for model, quant, vram, budget in (
            (WIDE, "none", 420, 16),
            (WIDE, "none", 420, 64),
            (WIDE, "none", 420, None),
            (WIDE, "none", 900, 64),
            (WIDE, "int8", 300, 16),
            (WIDE, "int8", 300, 64),
            (WIDE, "int8", 2000, None),
            (WIDE, "int4", 260, 64),
            (DEEP, "none", 250, 64),
            (DEEP, "none", 250, None),
            (DEEP, "int8", 200, 32),
        )
    ),
    model_request(model=WIDE, quant="none", vram_bytes=420 * MIB, draft="none", **STREAMED),
    model_request(model=DEEP, quant="int8", vram_bytes=200 * MIB, draft="none", **STREAMED),
    model_request(model="demo", **{**STREAMED, "ram_bytes": None}),
]
GRID = [
    model_request(model=WIDE, quant="none", vram_bytes=420 * MIB, **STREAMED),
    model_request(model=DEEP, quant="int8", vram_bytes=250 * MIB, **STREAMED),
]
GRID_BUDGETS, GRID_SLOTS = (None, 16, 64), (2, 3)


@dataclass(frozen=True)
class Found:
    """Speed as predicted and as measured, in tokens per second; and tokens per step."""

    planned: planning.Planned
    tok_per_s: float
    tokens_per_step: float

    @property
    def error(self):
        return self.planned.chosen.prediction.tok_per_s / self.tok_per_s - 1


def located(options):
    refs = parse_models(options)
    return locate_models(options, refs, Quiet(), yes)


def planned_for(options, models, *, as_given):
    return planning.make_plan(options, models, Quiet(), as_given=as_given)


def measure(planned, questions=GRID_QUESTIONS):
    """Answers so many questions under a plan."""
    plan, models = planned.plan, planned.models
    packs = make_packs(models.target, models.draft, plan, Quiet())
    if packs[0] is not None and plan.placement.streamed:
        with suppress(SpecchatError):  # where it cannot be, unbuffered reads go past the cache all the same
            evict([packs[0].layers[index].path for index in plan.placement.streamed])
    tokenizer = load_tokenizer(models.target.path)
    tokens, seconds, steps = 0, 0.0, 0
    with load_engine(plan, models.target, models.draft, *packs) as engine:
        for seed, question in enumerate([BUILT_IN[-1], *BUILT_IN[:questions]]):
            prompt = tokenizer.encode(tokenizer.render([Message("user", question.turns[0])]))
            sampling = Sampling(temperature=0.7 * (seed % 2), seed=seed)
            for step in engine.generate(prompt, sampling, stop_ids=frozenset(), max_tokens=MAX_TOKENS):
                if seed > 0 and step.new_rows == 1 and step.finish_reason is None:
                    tokens, seconds, steps = tokens + len(step.token_ids), seconds + step.pass_s, steps + 1
    return Found(planned, tokens / seconds, tokens / steps)


def name_of(planned):
    plan = planned.plan
    budget = f"tree {plan.work.tree_budget}{'' if not plan.adaptive else ' auto'}" if plan.draft else "no draft"
    layers = f"{len(plan.placement.resident)}+{len(plan.placement.streamed)}"
    model = plan.target.partition(",")[0].removeprefix("shape:")
    return f"{model:<12} {plan.quant:<5} {plan.work.dtype} {layers:<6} {plan.placement.slots} slots {budget}"


def show(found):
    prediction = found.planned.chosen.prediction
    print(
        f"{name_of(found.planned):<58} predicted {prediction.tok_per_s:6.2f} tok/s "
        f"({prediction.tokens_per_step:.1f} of {prediction.tree_nodes}, pass {prediction.pass_s:.3f} s, "
        f"{prediction.bound}) measured {found.tok_per_s:6.2f} ({found.tokens_per_step:.1f}, "
        f"{found.tokens_per_step / found.tok_per_s:.3f} s) {found.error:+.0%}",
        flush=True,
    )


def errors(only):
    found = []
    for options in CONFIGURATIONS[: only or None]:
        found.append(measure(planned_for(options, located(options), as_given=True), QUESTIONS))
        show(found[-1])
    median = statistics.median(abs(each.error) for each in found)
    print(f"median error over {len(found)} configurations: {median:.0%} (at most {MEDIAN_ERROR:.0%})")
    return median <= MEDIAN_ERROR


def against_grid(options):
    models = located(options)
    chosen = planned_for(options, models, as_given=False)
    tried = {name_of(chosen): [measure(chosen)]}
    plans = {name_of(chosen): chosen}
    others = [(models, budget, slots) for budget, slots in itertools.product(GRID_BUDGETS, GRID_SLOTS)]
    others += [(replace(models, draft=None), None, slots) for slots in GRID_SLOTS]
    for among, budget, slots in others:
        with suppress(DoesNotFitError):
            other = planned_for(replace(options, tree_budget=budget, slots=slots), among, as_given=True)
            plans.setdefault(name_of(other), other)
            if name_of(other) not in tried:
                tried[name_of(other)] = [measure(other)]
    best = sorted(tried, key=lambda name: -tried[name][0].tok_per_s)[:3]
    for _ in range(3):
        for name in {*best, name_of(chosen)}:
            tried[name].append(measure(plans[name]))
    speeds = {name: statistics.median(each.tok_per_s for each in found) for name, found in tried.items()}
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"  {name:<58} {speed:6.2f} tok/s{' <- chosen' * (name == name_of(chosen))}")
    share = speeds[name_of(chosen)] / max(speeds[name] for name in {*best, name_of(chosen)})
    print(f"chosen: {share:.2f} of the best (at least {LEAST_SHARE})", flush=True)
    return share >= LEAST_SHARE


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, help="the first so many configurations")
    parser.add_argument("--no-grid", action="store_true")
    arguments = parser.parse_args()
    prepare_libraries()
    with tempfile.TemporaryDirectory() as state:
        os.environ["SPECCHAT_STATE_DIR"] = state
        for options in (*CONFIGURATIONS[: arguments.only or None], *([] if arguments.no_grid else GRID)):
            located(options)  # what has to be written is written before rates are measured
        rates = probe(cache_folder(), "cpu", refresh=True).measured
        disk = rates.links.disk_read_bytes_per_s or 0.0
        print(f"disk {disk / 1e9:.1f} GB/s; " + ", ".join(f"{r.rows}: {r.flop_per_s / 1e9:.0f}" for r in rates.matmul))
        good = errors(arguments.only)
        shares = [] if arguments.no_grid else [against_grid(options) for options in GRID]
    return int(not (good and all(shares)))


if __name__ == "__main__":
    sys.exit(main())
