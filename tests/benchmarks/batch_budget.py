"""Compare the program's node budget with every fixed one, for several numbers of answers that share a pass.

    PYTHONPATH=.:tests python tests/benchmarks/batch_budget.py [--batch 1,4,10] [--prompts FILE] [--rounds N] [-v]

A synthetic model of 1 GB in bf16 streams from the disk for every pass, past the page cache. One engine answers all
prompts at every number, and the ways take turns, each of them beginning as often as the others: plain decoding, trees
of fixed sizes, and "job", an `AdaptivePolicy` that only knows the predictions of the plan, as in `run --prompts`. All
write the same text. Speeds are those of all answers together, prompts included: the median of all rounds.

Fails where "job" reaches less than 0.97 of the best fixed budget, or where trees are not as much faster as they should
be: 3 times plain decoding at 4, 1.8 times at 10, and at 10 also 2.8 times as fast as one answer at a time.
A round takes about five minutes; 1 GB under SPECCHAT_CACHE_DIR. Run it on a quiet machine.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median

from specchat.bench.prompts import BUILT_IN, read_questions
from specchat.errors import SpecchatError
from specchat.loading import planning
from specchat.loading.engine import make_packs
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.request import ModelRequest
from specchat.paths import cache_folder
from specchat.records.chat import Message
from specchat.records.generation import Request, Sampling
from specchat.records.plan import PlanChoices
from specchat.units import MIB

LEAST_SHARE, LEAST_OF_PLAIN, LEAST_OF_ONE = 0.97, {4: 3.0, 10: 1.8}, {10: 2.8}
SHAPE = "shape:hidden=2048,layers=9,heads=16,kv_heads=4,head_dim=128,mlp=7168"
VRAM = 430 * MIB  # for slots and ten seats, and one layer at most
FIXED = (16, 32, 48, 64)
PLAIN, JOB = "plain", "job"


@dataclass
class Way:
    """One way to choose the nodes of a pass, and what it took: tok/s of each round, and its passes."""

    name: str
    make: object
    speeds: list[float] = field(default_factory=list)
    passes: list[list[tuple[int, int, int, int, float, float]]] = field(default_factory=list)

    @property
    def tok_per_s(self):
        return median(self.speeds)


def run(engine, way, requests, batch):
    """Answer all prompts; record the passes as (alive, new rows, nodes, tokens, seconds, drafting)."""
    engine.forget()
    engine._policy = way.make()
    begin, waiting, passes, tokens = time.perf_counter(), [], [], 0
    for _, step in engine.generate_many(requests, seats=batch):
        waiting.append(step)
        tokens += len(step.token_ids)
        if len(waiting) == step.num_sharing:
            sums = (sum(each.new_rows for each in waiting), sum(each.tree_nodes for each in waiting))
            emitted = sum(len(each.token_ids) for each in waiting)
            passes.append((len(waiting), *sums, emitted, step.pass_s, step.draft_s))
            waiting = []
    way.speeds.append(tokens / (time.perf_counter() - begin))
    way.passes.append(passes)


def ways_for(engine, plan):
    from specchat.engine.drafting.policy import AdaptivePolicy, FixedPolicy

    budget, rows = engine.plan.work.tree_budget, engine.plan.work.chunk_rows
    plain = [Way(PLAIN, lambda: FixedPolicy(0, rows))] if plan.work.seats > 1 else []  # slow, one at a time
    return [
        *plain,
        *(Way(f"{nodes}", lambda nodes=nodes: FixedPolicy(nodes, rows)) for nodes in FIXED if nodes <= budget),
        Way(JOB, lambda: AdaptivePolicy(budget, plan.expected, plan.work.seats)),
    ]


def planned_for(request, models, batch):
    from support.loading import Quiet

    choices = replace(request.choices, seats=batch)
    return planning.make_plan(replace(request, choices=choices), models, Quiet(), as_given=True)


def load(asked, batches, max_tokens):
    """Import torch only here, after `prepare_libraries`: OpenMP reads how its threads wait when it is loaded."""
    from support.loading import Quiet, load_engine, yes

    from specchat.hardware.disk import evict
    from specchat.hardware.probe import probe
    from specchat.models.hf.tokenizer import load_tokenizer

    request = ModelRequest(SHAPE, choices=PlanChoices("cpu", quant="none", ram_bytes=0))
    models = locate_models(request, parse_models(request), Quiet(), yes)
    tokenizer = load_tokenizer(models.target.path)
    prompts = [tuple(tokenizer.encode(tokenizer.render([Message("user", question.turns[0])]))) for question in asked]
    ctx = -(-(max(map(len, prompts)) + max_tokens) // 64) * 64
    request = replace(request, choices=replace(request.choices, ctx=ctx, vram_bytes=VRAM))
    probe(cache_folder(), "cpu")
    plans = {batch: planned_for(request, models, batch).plan for batch in batches}
    planned = planned_for(request, models, max(batches))
    plan, models = planned.plan, planned.models
    packs = make_packs(models.target, models.draft, plan, Quiet())
    with suppress(SpecchatError):  # where it cannot be, unbuffered reads go past the cache all the same
        evict([packs[0].layers[index].path for index in plan.placement.streamed])
    placed = f"{len(plan.placement.resident)}+{len(plan.placement.streamed)} layers, {plan.placement.slots} slots"
    print(f"{plan.target}: {placed}, ctx {ctx}, {plan.work.seats} seats, trees of up to {plan.work.tree_budget}")
    requests = [Request(ids, Sampling(seed=seed), frozenset(), max_tokens) for seed, ids in enumerate(prompts)]
    return load_engine(plan, models.target, models.draft, *packs), plans, requests


def measured(arguments, asked, batches):
    engine, plans, requests = load(asked, batches, arguments.tokens)
    found = {batch: ways_for(engine, plans[batch]) for batch in batches}
    with engine:
        run(engine, ways_for(engine, plans[batches[-1]])[1], requests[:2], 2)  # warms up
        for turn in range(arguments.rounds):
            for batch, ways in found.items():
                for place in range(len(ways)):
                    run(engine, ways[(turn + place) % len(ways)], requests, batch)
    return found


def show(found, *, verbose):
    """Print every way beside the best fixed one; return the number of goals that were missed."""
    missed = 0
    own = {batch: next(way for way in ways if way.name == JOB).tok_per_s for batch, ways in found.items()}
    for batch, ways in found.items():
        best = max((way for way in ways if way.name not in (PLAIN, JOB)), key=lambda way: way.tok_per_s)
        plain = next((way.tok_per_s for way in ways if way.name == PLAIN), None)
        for way in ways:
            passes = [each for each in way.passes for each in each]
            alive, rows, nodes, tokens, seconds, draft_s = (fmean(column) for column in zip(*passes, strict=True))
            print(
                f"  {batch:2} {way.name:>5} {way.tok_per_s:6.1f} tok/s, {way.tok_per_s / best.tok_per_s:.3f} of best; "
                f"{len(passes) / len(way.passes):5.1f} passes of {alive:.1f} alive, {rows:.0f}+{nodes:.0f} rows, "
                f"{tokens:.1f} tokens, {1e3 * seconds:.0f} ms, drafting {1e3 * draft_s:.0f}; "
                f"rounds {' '.join(f'{speed:.1f}' for speed in way.speeds)}"
            )
            if verbose and way.name in (JOB, best.name):
                for each in way.passes[-1]:
                    print("        alive {} new {} nodes {} tokens {} pass {:.3f} draft {:.3f}".format(*each))
        checks = [("of the best fixed budget", own[batch] / best.tok_per_s, LEAST_SHARE)]
        if plain and batch in LEAST_OF_PLAIN:
            checks.append(("times plain decoding", own[batch] / plain, LEAST_OF_PLAIN[batch]))
        if 1 in own and batch in LEAST_OF_ONE:
            checks.append(("times one answer at a time", own[batch] / own[1], LEAST_OF_ONE[batch]))
        for what, share, least in checks:
            print(f"  {batch:2} {share:.3f} {what} (at least {least})")
            missed += share < least
    return missed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", default="1,4,10")
    parser.add_argument("--prompts", type=Path, help="questions in MT-Bench's format; default: the built-in ones")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-v", "--verbose", action="store_true", help="print the passes of the last round")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules, "its threads would spin while they wait, unlike those of `specchat run`"
    asked = (BUILT_IN if arguments.prompts is None else read_questions(arguments.prompts))[: arguments.limit]
    batches = [int(each) for each in arguments.batch.split(",")]
    prepare_libraries()
    with tempfile.TemporaryDirectory() as state:
        os.environ["SPECCHAT_STATE_DIR"] = state
        missed = show(measured(arguments, asked, batches), verbose=arguments.verbose)
    print(f"load average {os.getloadavg()[0]:.1f}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
