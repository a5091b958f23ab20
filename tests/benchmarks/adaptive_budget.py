"""Compare the adaptive draft policy with trees of every fixed size, on two very different machines.

    PYTHONPATH=. python tests/benchmarks/adaptive_budget.py resident|disk [--busy] [--questions N] [--tokens N]

`resident` is the demo in memory, whose passes take milliseconds; `disk` is a synthetic model whose layers come from the
disk for every pass. One model is loaded, and the ways take turns on it, answer by answer, each of them beginning as
often as the others: plain decoding (`resident` only: from the disk it is slow), fixed budgets, "chat" (one
`AdaptivePolicy` for all answers, as in a chat) and "once" (one that only knows the plan's predictions for every answer,
as in `specchat run MODEL PROMPT`). All write the same text. Speeds are all tokens over all time, the prompts' passes
and every first step included; in square brackets is a 90% interval, by resampling questions. The plain column is the
median over questions of the speed beside plain decoding's. `--busy` keeps a computing process on every core meanwhile.

Fails where "chat" reaches less than 0.97 of the best fixed budget, or on a busy machine less than 0.95 of plain
decoding. Takes about four minutes (disk: 1.3 GB under SPECCHAT_CACHE_DIR, and seven), busy several times as long.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

from specchat.bench.prompts import BUILT_IN
from specchat.errors import SpecchatError
from specchat.loading import planning
from specchat.loading.engine import make_packs
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.request import ModelRequest
from specchat.paths import cache_folder
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.plan import PlanChoices
from specchat.units import MIB

LEAST_SHARE, LEAST_OF_PLAIN = 0.97, 0.95
PLAIN = "plain"
FIXED = {"resident": (0, 8, 16, 32, 64, 128), "disk": (8, 16, 32, 64, 128)}  # plain decoding is slow from the disk
DISK = "shape:hidden=2048,layers=12,heads=16,kv_heads=4,head_dim=128,mlp=7168"
CASES = {
    "resident": (ModelRequest("demo", choices=PlanChoices("cpu", ctx=512)), 24, 64),
    "disk": (
        ModelRequest(DISK, choices=PlanChoices("cpu", ctx=512, quant="none", vram_bytes=420 * MIB, ram_bytes=0)),
        6,
        48,
    ),
}


@dataclass
class Way:
    """One way to choose the size of trees, and what it took, by question: (tokens, seconds)."""

    name: str
    make: object
    keeps: bool = True
    spent: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    made: object = None

    def policy(self):
        if self.made is None or not self.keeps:
            self.made = self.make()
        return self.made

    def tok_per_s(self, chosen=None):
        spent = self.spent if chosen is None else [self.spent[i] for i in chosen]
        return sum(tokens for tokens, _ in spent) / sum(seconds for _, seconds in spent)


def answer(engine, way, prompt, seed, max_tokens):
    """As a new chat: nothing of the prompt is cached."""
    engine.forget()
    engine._policy = way.policy()
    sampling = Sampling(temperature=0.7 * (seed % 2), seed=seed)
    begin = time.perf_counter()
    steps = list(engine.generate(prompt, sampling, stop_ids=frozenset(), max_tokens=max_tokens))
    seconds = time.perf_counter() - begin
    way.spent.append((sum(len(step.token_ids) for step in steps), seconds))
    way.sizes.append(round(sum(step.tree_nodes for step in steps) / len(steps)))


def ways_for(plan, fixed):
    from specchat.engine.drafting.policy import AdaptivePolicy, FixedPolicy

    budget = plan.work.tree_budget
    return [
        *(
            Way(f"fixed {nodes}" if nodes else PLAIN, lambda nodes=nodes: FixedPolicy(nodes))
            for nodes in fixed
            if nodes <= budget
        ),
        Way("chat", lambda: AdaptivePolicy(budget, plan.expected)),
        Way("once", lambda: AdaptivePolicy(budget, plan.expected), keeps=False),
    ]


def load(options):
    """Import torch only here, after `prepare_libraries`: OpenMP reads how its threads wait when it is loaded."""
    from support.loading import Quiet, load_engine, yes

    from specchat.hardware.disk import evict
    from specchat.hardware.probe import probe
    from specchat.models.hf.tokenizer import load_tokenizer

    refs = parse_models(options)
    models = locate_models(options, refs, Quiet(), yes)
    probe(cache_folder(), "cpu")
    planned = planning.make_plan(options, models, Quiet(), as_given=True)
    plan, models = planned.plan, planned.models
    packs = make_packs(models.target, models.draft, plan, Quiet())
    if packs[0] is not None and plan.placement.streamed:
        with suppress(SpecchatError):  # where it cannot be, unbuffered reads go past the cache all the same
            evict([packs[0].layers[index].path for index in plan.placement.streamed])
    print(
        f"{plan.target}: {len(plan.placement.resident)}+{len(plan.placement.streamed)} layers, "
        f"trees of up to {plan.work.tree_budget}"
    )
    print(f"expected: {planned.chosen.prediction.tok_per_s:.1f} tok/s, {plan.expected}", flush=True)
    return load_engine(plan, models.target, models.draft, *packs), load_tokenizer(models.target.path)


@contextmanager
def computing(num_processes):
    """Keep so many processes computing meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(case, num_questions, max_tokens, num_processes):
    options, usual_questions, usual_tokens = CASES[case]
    engine, tokenizer = load(options)
    with engine, computing(num_processes):
        ways = ways_for(engine.plan, FIXED[case])
        warm_up = ways_for(engine.plan, (16,))[0]
        for seed in range(num_questions or usual_questions):
            question = BUILT_IN[seed % len(BUILT_IN)].turns[0]
            prompt = tokenizer.encode(tokenizer.render([Message("user", question)]))
            if seed == 0:
                answer(engine, warm_up, prompt, seed, 16)
            for turn in range(len(ways)):
                answer(engine, ways[(seed + turn) % len(ways)], prompt, seed, max_tokens or usual_tokens)
    return ways


def of_plain(way, plain):
    """The median over questions of a way's speed beside plain decoding's."""
    return median(
        (tokens / seconds) / (plain_tokens / plain_s)
        for (tokens, seconds), (plain_tokens, plain_s) in zip(way.spent, plain.spent, strict=True)
    )


def show(ways):
    """Print every way beside the best fixed one and plain decoding; return the two shares that "chat" reaches."""
    by_name = {way.name: way for way in ways}
    plain, chat = by_name.get(PLAIN), by_name["chat"]
    best = max((way for way in ways if way.name not in ("chat", "once")), key=Way.tok_per_s)
    rng, count = random.Random(0), len(best.spent)
    draws = [[rng.randrange(count) for _ in range(count)] for _ in range(2000)]
    for way in ways:
        shares = sorted(way.tok_per_s(chosen) / best.tok_per_s(chosen) for chosen in draws)
        low, high = shares[len(shares) // 20], shares[-len(shares) // 20]
        beside_plain = f"{of_plain(way, plain):.3f} of plain, " if plain else ""
        first = way.spent[0][0] / way.spent[0][1]
        print(
            f"  {way.name:<10} {way.tok_per_s():7.2f} tok/s, {beside_plain}"
            f"{way.tok_per_s() / best.tok_per_s():.3f} of {best.name} [{low:.3f}, {high:.3f}]; "
            f"first answer {first:.2f} tok/s; mean sizes {way.sizes[:8]}"
        )
    return chat.tok_per_s() / best.tok_per_s(), of_plain(chat, plain) if plain else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--busy", action="store_true", help="keep a computing process on every core")
    parser.add_argument("--questions", type=int)
    parser.add_argument("--tokens", type=int)
    arguments = parser.parse_args()
    assert "torch" not in sys.modules, "its threads would spin while they wait, unlike those of `specchat run`"
    prepare_libraries()
    num_processes = len(os.sched_getaffinity(0)) if arguments.busy else 0
    with tempfile.TemporaryDirectory() as state:
        os.environ["SPECCHAT_STATE_DIR"] = state
        share, share_of_plain = show(measured(arguments.case, arguments.questions, arguments.tokens, num_processes))
    print(f"load average {os.getloadavg()[0]:.1f}, {num_processes} of it computing for this benchmark")
    if arguments.busy and share_of_plain is not None:
        print(f"adaptive: {share_of_plain:.3f} of plain decoding (at least {LEAST_OF_PLAIN})")
        return int(share_of_plain < LEAST_OF_PLAIN)
    print(f"adaptive: {share:.3f} of the best fixed budget (at least {LEAST_SHARE})")
    return int(share < LEAST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
