"""Random runs against the target alone: models, drafts, places of layers, budgets, samplings, interrupts and batches.

Every token of a text is compared with the one that transformers' own scores of the text before it draw. All tokens of a
text are compared in one pass of transformers, and comparing goes on after a near-tie.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler
from specchat.models.packs.pack import Pack
from specchat.records.generation import Request, Sampling
from specchat.records.model import Dtype, ModelSource
from specchat.records.plan import Plan
from specchat.units import KIB
from support.engines import NOTHING, make_plan, random_prompt
from support.hybrids import HYBRIDS, random_hybrid
from support.loading import load_engine, prepare
from support.plans import changed
from support.reference import NEAR_TIE
from support.shortages import ShortMachine
from support.tiny_models import ARCHITECTURES, SPECIAL, VOCAB, make_config, perturbed, random_model, save

# A hybrid of the same name stands for both.
NAMES = (*(name for name in (*ARCHITECTURES, *SPECIAL) if name not in HYBRIDS), *HYBRIDS)
_STORED = ("float32", "bfloat16", "float16")
_DTYPES: tuple[Dtype, ...] = ("fp32", "fp32", "bf16", "fp16")
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CTX = 480
# In 16 bits, scores of two orders of additions differ by up to this part of the largest score: measured 2% between
# transformers' passes in bf16 and fp32, and 0.3% in fp16. The best scores of 2,800 tokens were that close 38 times.
_ERRORS: dict[Dtype, float] = {"fp32": 0.0, "bf16": 2**-5, "fp16": 2**-7}
# In 16 bits, an expert may be chosen by a near-tie, and a recurrent state adds up errors: these are compared in fp32.
_DENSE = tuple(
    name
    for name in (*ARCHITECTURES, "cwm", "gemma4", "gemma4_shared", "gpt2", "gpt_neox", "opt")
    if name not in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
)


@dataclass
class Tally:
    """What was compared.

    Attributes:
        tokens: compared tokens by architecture.
        streamed: compared tokens while layers were streamed.
        given_back: number of layers that engines gave back while memory was short.
        in_16_bits: compared tokens of passes in bf16 or fp16.
        excused: differences at near-ties, in fp32.
        excused_16: number of differences at near-ties in 16 bits.
    """

    tokens: Counter[str] = field(default_factory=Counter)
    streamed: int = 0
    given_back: int = 0
    in_16_bits: int = 0
    excused: list[str] = field(default_factory=list)
    excused_16: int = 0

    @property
    def total(self) -> int:
        return sum(self.tokens.values())

    @property
    def is_good(self) -> bool:
        """Whether near-ties are as rare as scores of random models make them."""
        return len(self.excused) <= 1 + self.total // 10_000 and self.excused_16 <= 3 + self.in_16_bits // 20

    def __str__(self) -> str:
        names = ", ".join(f"{name} {count:,}" for name, count in sorted(self.tokens.items()))
        return (
            f"{self.total:,} tokens over {len(self.tokens)} architectures, {self.streamed:,} with streamed layers, "
            f"{self.given_back:,} layers given back, {self.in_16_bits:,} in 16 bits with {self.excused_16} near-ties, "
            f"{len(self.excused)} near-ties in 32 bits {self.excused}: {names}"
        )


class Target:
    """The model as transformers computes it."""

    def __init__(self, model: Any) -> None:
        self._models = {"fp32": model}

    @torch.inference_mode()
    def scores(self, tokens: Sequence[int], dtype: Dtype) -> torch.Tensor:
        """Scores behind each token, float32 [S, V]."""
        if dtype not in self._models:
            twin = copy.deepcopy(self._models["fp32"])
            self._models[dtype] = _with_parameters(twin, _TORCH[dtype], _TORCH[dtype])
        out = self._models[dtype](torch.tensor([list(tokens)]), use_cache=False)
        return out.logits[0].float()

    def differences(self, request: Request, text: Sequence[int], dtype: Dtype) -> list[tuple[int, bool]]:
        """Positions of a text with another token than the target's, and whether near scores draw that token.

        In 16 bits, scores are near those in 16 or in 32 bits. Other orders of additions differ from both by as much as
        the two differ.
        """
        tokens = [*request.prompt_ids, *text]
        begin = len(request.prompt_ids)
        scores = [self.scores(tokens, each) for each in dict.fromkeys((dtype, "fp32"))]
        spreads = (scores[0] - scores[-1]).abs().amax(dim=-1).tolist()
        sampler = Sampler(request.sampling, VOCAB, torch.device("cpu"))
        found = []
        for position in range(begin, len(tokens)):
            before, ours = tokens[:position], tokens[position]
            if sampler.draw(scores[0][position - 1], before) != ours:
                spread = spreads[position - 1]
                near = any(is_near(sampler, each[position - 1], before, ours, dtype, spread) for each in scores)
                found.append((position - begin, near))
        return found


def is_near(
    sampler: Sampler, scores: torch.Tensor, before: Sequence[int], token: int, dtype: Dtype, spread: float = 0.0
) -> bool:
    """Whether scores [V] within the error of others draw a token.

    Better tokens are lowered one after the other: top-k, top-p or min-p may then leave them out. The token itself may
    have been left out, at the border of the kept ones: then all tokens above it are lowered first.
    """
    error = max(NEAR_TIE, _ERRORS[dtype] * float(scores.abs().max()), spread) / 2
    above = set((scores > scores[token]).nonzero()[:, 0].tolist())
    return any(_wins(sampler, scores, before, token, error, lowered) for lowered in (set[int](), above))


def _wins(
    sampler: Sampler, scores: torch.Tensor, before: Sequence[int], token: int, error: float, lowered: set[int]
) -> bool:
    """Whether a token is drawn while some others, and then each that is drawn before it, are lowered."""
    while True:
        near = scores + error
        for each in lowered:
            near[each] = scores[each] - error
        drawn = sampler.draw(near, before)
        if drawn in (token, *lowered):
            return drawn == token
        lowered.add(drawn)


@dataclass(frozen=True)
class _Models:
    name: str
    num_layers: int
    target: ModelSource
    drafts: dict[str, ModelSource]
    pack: Pack | None


def run_round(
    seed: int, folder: Path, tally: Tally, *, engines: int = 2, requests: int = 2, most_tokens: int = 30
) -> str:
    """Make a model, and compare the texts of random engines with the model's own scores.

    Args:
        seed: decides everything except the moments of interrupts.
        folder: empty folder for the models.
        tally: receives what was compared.
        engines: number of engines.
        requests: number of texts of each seat of an engine.
        most_tokens: most tokens of a text.

    Returns:
        The architecture.
    """
    rng = random.Random(seed)
    name = NAMES[seed % len(NAMES)]
    model = _random_model(rng, name)
    models, target = _save(rng, name, model, folder), Target(model)
    for _ in range(engines):
        plan, draft = _plan(rng, models)
        asked = [_request(rng, most_tokens) for _ in range(requests * plan.work.seats)]
        pack = models.pack if plan.placement.in_ram or rng.random() < 0.5 else None
        if plan.work.dtype != "fp32":
            pack = None
        machine = ShortMachine(folder / "machine")
        watch = machine.watch() if rng.random() < 0.3 else None
        with load_engine(plan, models.target, draft, pack, watch=watch) as engine:
            write = _together if plan.work.seats > 1 else _in_turn
            texts = write(rng, engine, asked, machine)
            tally.given_back += engine.memory().given_back_layers
        for request, text in zip(asked, texts, strict=True):
            _compare(f"seed {seed} {name} {plan}", target, request, text, plan, tally)
            tally.tokens[name] += len(text)
    return name


def _random_model(rng: random.Random, name: str) -> Any:
    """A float32 model whose weights a 16-bit file may hold."""
    seed, stored = rng.randrange(1000), getattr(torch, rng.choice(_STORED))
    model = random_hybrid(name, seed) if name in HYBRIDS else random_model(make_config(name), seed)
    return _with_parameters(model, stored, torch.float32)


def _with_parameters(model: Any, rounded: torch.dtype, dtype: torch.dtype) -> Any:
    """The model with parameters rounded to one dtype and kept in another; frequencies of rotary tables stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(rounded).to(dtype)
    return model


def _save(rng: random.Random, name: str, model: Any, folder: Path) -> _Models:
    drafts = {"identical": save(model, folder / "target")}
    target = drafts["identical"]
    drafts["perturbed"] = save(perturbed(model, 0.03), folder / "perturbed")
    drafts["random"] = save(random_model(make_config("llama"), 77), folder / "random")
    pack = prepare(target, "fp32", progress=lambda *_: None, warn=lambda _: None)
    return _Models(name, model.config.num_hidden_layers, target, drafts, pack)


def _request(rng: random.Random, most_tokens: int) -> Request:
    sampling = Sampling(
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0, 1.3)),
        top_k=rng.choice((0, 0, 5, 40)),
        top_p=rng.choice((1.0, 1.0, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        seed=rng.randrange(1 << 30),
    )
    prompt = random_prompt(rng.randint(1, 60), VOCAB, seed=rng.randrange(1 << 30))
    return Request(tuple(prompt), sampling, max_tokens=rng.randint(most_tokens // 4, most_tokens))


def _plan(rng: random.Random, models: _Models) -> tuple[Plan, ModelSource | None]:
    """A random plan; most drafts are often right, since a wrong one costs much time and writes one token a pass."""
    (kind,) = rng.choices(("identical", "perturbed", "random", "none"), (5, 4, 1, 2))
    draft = models.drafts.get(kind)
    retrieval = draft is None or rng.random() < 0.3
    is_streamed = rng.random() < 0.85
    num_layers = models.num_layers
    resident = [index for index in range(num_layers) if not is_streamed or rng.random() < 0.3]
    if is_streamed and len(resident) == num_layers:
        resident.pop()
    plan = make_plan(
        models.target,
        draft,
        num_layers=num_layers,
        resident=resident,
        ctx=_CTX,
        tree_budget=rng.choice((1, 3, 16, 16, 64, 200)),
        slots=rng.randint(1, 3),
        chunk_rows=rng.choice((7, 24, 512)),
        seats=rng.choice((1, 3, 4, 8)),
        retrieval=retrieval,
    )
    dtype: Dtype = rng.choice(_DTYPES) if models.name in _DENSE else "fp32"
    streamed = plan.placement.streamed
    is_packed = models.pack is not None and dtype == "fp32" and rng.random() < 0.5
    in_ram = tuple(index for index in streamed if is_packed and rng.random() < 0.5)
    return changed(plan, in_ram=in_ram, dtype=dtype), draft


def _change(rng: random.Random, machine: ShortMachine) -> None:
    """Let memory be short now and then."""
    machine.calm()
    match rng.randrange(12):
        case 0:
            machine.lacks(rng.randint(1, 1000) * KIB)
        case 1:
            machine.stalls(50.0)


def _together(rng: random.Random, engine: Engine, asked: Sequence[Request], machine: ShortMachine) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in asked]
    for index, step in engine.generate_many(asked):
        texts[index] += step.token_ids
        if rng.random() < 0.1:
            _change(rng, machine)
    return texts


def _in_turn(rng: random.Random, engine: Engine, asked: Sequence[Request], machine: ShortMachine) -> list[list[int]]:
    """Write the texts one after another; some are interrupted, between steps or in mid-pass, and continued."""
    texts = []
    for each in asked:
        text: list[int] = []
        assert each.max_tokens is not None
        while len(text) < each.max_tokens:
            _change(rng, machine)
            cancel = threading.Event()
            timer = threading.Timer(rng.uniform(0.0, 0.05), cancel.set) if rng.random() < 0.2 else None
            if timer is not None:
                timer.start()
            most = rng.choice((1, 3, 1000, 1000))
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


def _compare(name: str, target: Target, request: Request, text: list[int], plan: Plan, tally: Tally) -> None:
    assert len(text) == request.max_tokens, name
    dtype = plan.work.dtype
    for index, is_near_tie in target.differences(request, text, dtype):
        assert is_near_tie, f"{name}: {request} {text}, at token {index}"
        if dtype == "fp32":
            tally.excused.append(f"{name} token {index}")
        else:
            tally.excused_16 += 1
    tally.streamed += len(text) if plan.placement.streamed else 0
    tally.in_16_bits += len(text) if dtype != "fp32" else 0
