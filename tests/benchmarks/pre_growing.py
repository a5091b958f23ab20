"""What growing the next trees during a pass would gain: how much drafting is exposed, and how often a guess would hit.

    PYTHONPATH=.:tests python tests/benchmarks/pre_growing.py exposed [--rounds N] [--tokens N] [--delays MS,..]
    PYTHONPATH=.:tests python tests/benchmarks/pre_growing.py outcomes [--nodes N,..] [--prompts N]

`exposed`: a model whose layers all stream from the disk answers with trees that are drafted as usual, and with the same
trees at no cost: the most that pre-growing could gain, as every outcome is hit and nothing is computed during the pass.
Other ways wait for some milliseconds before the same trees, like a slower draft. The ways take turns, answer by answer.
Prints the time of a step, the drafting that the step itself calls exposed, and by how much the step is really longer
than with free trees. Needs 3.3 GB of disk under SPECCHAT_CACHE_DIR and a quiet machine; 32 s a round.

`outcomes`: the demo in memory. A pass ends with an outcome: a node of the tree, and a token after it that is not in the
tree. Ranks all outcomes by the draft's weights, the target's noise included, and prints how often the real one was
among the K likeliest, for which a tree would have to be grown each. Half a minute for each number of nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from specchat.loading.libraries import prepare_libraries

SHAPE = "shape:hidden=2048,layers=15,heads=16,kv_heads=4,head_dim=128,mlp=7168,dtype=fp32"
QUESTIONS = (
    "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences.",
    "Draft a professional email seeking your supervisor's feedback on the quarterly financial report.",
)
PROMPTS = Path(__file__).parents[1] / "data" / "acceptance_prompts.jsonl"
COUNTS = (1, 4, 16, 64, 256)


def load(model: str, **choices: Any) -> Any:
    """Import torch only here, after `prepare_libraries`: OpenMP reads how its threads wait when it is loaded."""
    prepare_libraries()
    import specchat

    return specchat.load(model, dtype="fp32", device="cpu", learn=False, **choices)


def token_ids(model: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    from specchat.records.chat import Message

    tokenizer = model._tokenizer
    return tokenizer.encode(tokenizer.render([Message(each["role"], each["content"]) for each in messages]))


class Recorder:
    """A drafter that remembers the trees of another one, by the length of the text before them."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter
        self.trees: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def grow(self, sequences: Sequence[Any], policy: Any, cancel: Any) -> list[Any]:
        (sequence,) = sequences
        self.sequence = sequence
        (self.tree,) = trees = self.drafter.grow(sequences, policy, cancel)
        self.before = list(sequence.tokens)
        self.trees[len(sequence.tokens)] = self.tree
        return trees


def player(trees: dict[int, Any], delay_s: float) -> Any:
    """A drafter that waits, and then has the recorded trees."""
    from specchat.engine.drafting.drafter import NoDrafter

    class Player(NoDrafter):
        def grow(self, sequences: Sequence[Any], policy: Any, cancel: Any) -> list[Any]:
            time.sleep(delay_s)
            return [trees[len(sequence.tokens)] for sequence in sequences]

    return Player()


def answer(engine: Any, drafter: Any, prompt: list[int], seed: int, max_tokens: int) -> list[Any]:
    """As a new chat: nothing of the prompt is cached. Returns the steps."""
    from specchat.records.generation import Sampling

    engine.forget()
    engine._drafter = drafter
    sampling = Sampling(temperature=0.7 * (seed % 2), seed=seed)
    return list(engine.generate(prompt, sampling, stop_ids=frozenset(), max_tokens=max_tokens))


def exposed(rounds: int, max_tokens: int, delays_s: Sequence[float]) -> None:
    model = load(SHAPE, vram="640MiB", ram="1MiB", ctx=768, tree_budget=64)
    engine, own = model._engine, model._engine._drafter
    delays = {"free": 0.0, **{f"after {1e3 * delay:.0f} ms": delay for delay in delays_s}}
    ways = ["drafted", *delays]
    found: dict[str, list[list[Any]]] = {way: [] for way in ways}
    texts = []
    for seed, question in enumerate(QUESTIONS):  # one greedy answer, one sampled one
        prompt, recorder = token_ids(model, [{"role": "user", "content": question}]), Recorder(own)
        steps = answer(engine, recorder, prompt, seed, max_tokens)
        texts.append((prompt, seed, recorder.trees, emitted(steps)))
    for number in range(rounds):
        prompt, seed, trees, tokens = texts[number % len(texts)]
        first = number % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            drafter = own if way == "drafted" else player(trees, delays[way])
            own.reset()
            steps = answer(engine, drafter, prompt, seed, max_tokens)
            assert emitted(steps) == tokens
            found[way].append(steps[1:])  # the first step of an answer reads its prompt
        print(number, *(f"{way} {sum(step.pass_s for step in found[way][-1]):.3f} s" for way in ways), flush=True)
    engine._drafter = own
    model.close()
    print(f"{rounds} answers, {sum(map(len, found['free']))} steps")
    for way, answers in found.items():
        report(way, answers, found["free"])


def emitted(steps: Sequence[Any]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def report(way: str, answers: Sequence[Sequence[Any]], free: Sequence[Sequence[Any]]) -> None:
    """Print the mean step of a way, and how much longer it is than with free trees, by step and by answer."""
    pairs = list(zip(chain.from_iterable(answers), chain.from_iterable(free), strict=True))
    pass_ms, wait_ms, draft_ms, exposed_ms = (
        1e3 * statistics.fmean(getattr(step, name) for step, _ in pairs)
        for name in ("pass_s", "stream_wait_s", "draft_s", "exposed_draft_s")
    )
    longer_ms = 1e3 * statistics.median(step.pass_s - other.pass_s for step, other in pairs)
    ratios = sorted(
        sum(step.pass_s for step in mine) / sum(step.pass_s for step in others)
        for mine, others in zip(answers, free, strict=True)
    )
    print(
        f"{way:12} step {pass_ms:6.1f} ms, waiting for layers {wait_ms:5.1f}, drafting {draft_ms:5.1f}, of it exposed "
        f"{exposed_ms:5.1f} ({exposed_ms / pass_ms:.1%}); longer than free by {longer_ms:5.1f} (median), answers "
        f"x{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )


def outcomes(nodes: Sequence[int], num_prompts: int) -> None:
    model_of = {number: load("demo", ctx=768, tree_budget=number) for number in nodes}
    from support.loading import load_model

    from specchat.models.catalog.ref import demo_source

    draft = load_model(demo_source("draft"), cache_rows=1024)
    chats = [json.loads(line)["messages"] for line in PROMPTS.read_text().splitlines()[:num_prompts]]
    for number, model in model_of.items():
        for temperature in (0.0, 0.7):
            ranks, passes, least = zip(*_ranks(model, draft, chats, temperature), strict=True)
            shares = ", ".join(f"{count}: {sum(rank < count for rank in ranks) / len(ranks):.1%}" for count in COUNTS)
            print(
                f"{number} nodes, t={temperature}: {len(ranks)} steps, {statistics.fmean(passes):.1f} draft passes, "
                f"least node {math.exp(statistics.median(least)):.2%}; among the likeliest {shares}",
                flush=True,
            )
        model.close()


def _ranks(model: Any, draft: Any, chats: Sequence[Any], temperature: float) -> Iterator[tuple[int, float, float]]:
    """Yield the rank of each step's outcome, the passes of its tree, and the weight of the tree's last node."""
    import torch

    from specchat.engine.drafting.growth import path_weights
    from specchat.engine.drafting.sources import SMALL_DRAFT
    from specchat.engine.layout import PassLayout, RowLayout
    from specchat.engine.tree import ROOT
    from specchat.records.generation import Sampling

    engine = model._engine
    recorder = engine._drafter = Recorder(engine._drafter)
    for seed, messages in enumerate(chats):
        prompt = token_ids(model, messages)
        engine.forget()
        sampling = Sampling(temperature=temperature, seed=seed)
        for step in engine.generate(prompt, sampling, stop_ids=model._stop_ids, max_tokens=128):
            tree, text, sampler = recorder.tree, recorder.before, recorder.sequence.sampler
            if step.finish_reason is not None or not len(tree):
                continue
            root = len(text) - 1
            positions = torch.tensor([*range(len(text)), *(root + depth for depth in tree.depths)])
            layout = RowLayout(0, len(text), tree.ancestors, positions)
            draft.cache.truncate(0, 0)
            scores = draft.logits(draft.forward([*text, *tree.tokens], PassLayout.single(layout))[root:])
            places = [len(text) + depth for depth in (0, *tree.depths)]
            noise = None if sampler.noise is None else torch.stack([sampler.noise.row(place) for place in places])
            weights = path_weights(scores, sampler, SMALL_DRAFT, noise).double()
            weights += torch.tensor([0.0, *tree.weights], dtype=torch.float64)[:, None]
            for parent, token in tree.children:
                weights[parent + 1, token] = -torch.inf
            node = ROOT
            for token in step.token_ids[:-1]:
                node = tree.children[node, token]
            rank = int((weights > weights[node + 1, step.token_ids[-1]]).sum())
            yield rank, sum(each.draft_passes for each in recorder.work), tree.weights[-1]
    engine._drafter = recorder.drafter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("exposed", "outcomes"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--delays", default="100,250")
    parser.add_argument("--nodes", default="64,16,8")
    parser.add_argument("--prompts", type=int, default=49)
    options = parser.parse_args()
    if options.what == "exposed":
        exposed(options.rounds, options.tokens, [float(each) / 1e3 for each in options.delays.split(",")])
    else:
        outcomes([int(each) for each in options.nodes.split(",")], options.prompts)


if __name__ == "__main__":
    main()
