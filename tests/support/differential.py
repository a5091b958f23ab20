"""Random runs against plain decoding: models, drafts, places of layers, budgets, samplings, interrupts and batches.

Plain decoding is our own engine without drafts and with all layers resident, which other tests compare with
transformers. A difference is then held against transformers' own scores: only a near-tie excuses it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specchat.engine.drafting.drafter import NoDrafter
from specchat.engine.engine import Engine
from specchat.models.packs.pack import Pack
from specchat.records.generation import Request, Sampling
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from support import reference
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import changed, load_engine, prepare
from support.tiny_models import ARCHITECTURES, SPECIAL, VOCAB, make_config, perturbed, random_model, save

NAMES = (*ARCHITECTURES, *SPECIAL)
_STORED = ("float32", "bfloat16", "float16")
_CTX = 256


@dataclass
class Tally:
    """What was compared.

    Attributes:
        tokens: compared tokens by architecture.
        streamed: compared tokens while layers were streamed.
        excused: differences at near-ties.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    streamed: int = 0
    excused: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.tokens.values())

    def __str__(self) -> str:
        names = ", ".join(f"{name} {count:,}" for name, count in sorted(self.tokens.items()))
        return (
            f"{self.total:,} tokens over {len(self.tokens)} architectures, {self.streamed:,} with streamed layers, "
            f"{len(self.excused)} near-ties {self.excused}: {names}"
        )


@dataclass(frozen=True)
class _Models:
    model: Any
    target: ModelSource
    drafts: dict[str, ModelSource]
    pack: Pack | None


def run_round(seed: int, folder: Path, tally: Tally, *, engines: int = 2, requests: int = 3) -> None:
    """Make a model and its plain texts, and compare them with those of random engines.

    Args:
        seed: decides everything except the moments of interrupts.
        folder: empty folder for the models.
        tally: receives what was compared.
        engines: number of engines.
        requests: number of texts.
    """
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    models = _make(rng, name, folder)
    asked = [_request(rng) for _ in range(requests)]
    num_layers = models.model.config.num_hidden_layers
    plain = make_plan(models.target, None, num_layers=num_layers, ctx=_CTX, tree_budget=0)
    with load_engine(plain, models.target, None) as engine, engine.drafting_with(NoDrafter()):
        expected = []
        for each in asked:
            engine.forget()
            expected.append(write(engine, list(each.prompt_ids), each.sampling, each.max_tokens or 0)[0])
    for _ in range(engines):
        plan, draft = _plan(rng, models, num_layers)
        pack = models.pack if plan.placement.in_ram or rng.random() < 0.5 else None
        with load_engine(plan, models.target, draft, pack) as engine:
            texts = _together(engine, asked) if plan.work.seats > 1 else _in_turn(rng, engine, asked)
        for request, ours, theirs in zip(asked, texts, expected, strict=True):
            _compare(f"seed {seed} {name} {plan}", models.model, request, ours, theirs, tally)
            tally.tokens[name] = tally.tokens.get(name, 0) + len(ours)
            tally.streamed += len(ours) if plan.placement.streamed else 0


def _make(rng: random.Random, name: str, folder: Path) -> _Models:
    import torch

    model = random_model(make_config(name), rng.randrange(1000)).to(getattr(torch, rng.choice(_STORED))).float()
    drafts = {"identical": save(model, folder / "target")}
    target = drafts["identical"]
    drafts["perturbed"] = save(perturbed(model, 0.03), folder / "perturbed")
    drafts["random"] = save(random_model(make_config("llama"), 77), folder / "random")
    pack = prepare(target, "fp32", progress=lambda *_: None, warn=lambda _: None)
    return _Models(model, target, drafts, pack)


def _request(rng: random.Random) -> Request:
    sampling = Sampling(
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0, 1.3)),
        top_k=rng.choice((0, 0, 5, 40)),
        top_p=rng.choice((1.0, 1.0, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        seed=rng.randrange(1 << 30),
    )
    prompt = random_prompt(rng.randint(1, 60), VOCAB, seed=rng.randrange(1 << 30))
    return Request(tuple(prompt), sampling, max_tokens=rng.randint(1, 60))


def _plan(rng: random.Random, models: _Models, num_layers: int) -> tuple[Plan, ModelSource | None]:
    draft = models.drafts.get(rng.choice((*models.drafts, "none")))
    retrieval = draft is None or rng.random() < 0.3
    is_streamed = rng.random() < 0.8
    resident = [index for index in range(num_layers) if not is_streamed or rng.random() < 0.3]
    if is_streamed and len(resident) == num_layers:
        resident.pop()
    plan = make_plan(
        models.target,
        draft,
        num_layers=num_layers,
        resident=resident,
        ctx=_CTX,
        tree_budget=rng.choice((1, 3, 16, 64, 200)),
        slots=rng.randint(1, 3),
        chunk_rows=rng.choice((7, 24, 512)),
        seats=rng.choice((1, 1, 3)),
        retrieval=retrieval,
    )
    streamed = plan.placement.streamed
    in_ram = tuple(index for index in streamed if rng.random() < 0.5) if models.pack and rng.random() < 0.5 else ()
    return changed(plan, in_ram=in_ram), draft


def _together(engine: Engine, asked: Sequence[Request]) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in asked]
    for index, step in engine.generate_many(asked):
        texts[index] += step.token_ids
    return texts


def _in_turn(rng: random.Random, engine: Engine, asked: Sequence[Request]) -> list[list[int]]:
    """Write the texts one after another; some are interrupted, between steps or in mid-pass, and continued."""
    texts = []
    for each in asked:
        text: list[int] = []
        assert each.max_tokens is not None
        while len(text) < each.max_tokens:
            cancel = threading.Event()
            timer = threading.Timer(rng.uniform(0.0, 0.05), cancel.set) if rng.random() < 0.3 else None
            if timer is not None:
                timer.start()
            most = rng.choice((1, 3, 1000))
            steps = engine.generate(
                [*each.prompt_ids, *text],
                each.sampling,
                stop_ids=NOTHING,
                max_tokens=each.max_tokens - len(text),
                cancel=cancel,
            )
            with suppress(StopIteration):
                for _ in range(most):
                    text += next(steps).token_ids
            steps.close()  # type: ignore[attr-defined]  # a generator
            if timer is not None:
                timer.cancel()
        texts.append(text)
        if rng.random() < 0.3:
            engine.truncate(rng.randint(0, len(each.prompt_ids)))
    return texts


def _compare(name: str, model: Any, request: Request, ours: list[int], theirs: list[int], tally: Tally) -> None:
    if ours == theirs:
        return
    expected = reference.generate(model, list(request.prompt_ids), request.sampling, len(theirs))
    for text in (ours, theirs):
        difference = expected.first_difference(text)
        if difference is not None:
            assert expected.is_near_tie(difference), f"{name}: {ours} is not {theirs}, at token {difference}"
            tally.excused.append(f"{name} token {difference}")
