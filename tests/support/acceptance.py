"""How many tokens a pass yields on the demo pair, over prompts that neither model was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specchat.engine.attention import tree_attention
from specchat.engine.drafting.drafter import Drafter, ModelDrafter, TreeDrafter
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.mtp import MtpHead
from specchat.engine.drafting.own_copy import CopyModel, OwnCopy
from specchat.engine.drafting.sources import ProposingSource
from specchat.engine.engine import Engine
from specchat.engine.loading import load_layers
from specchat.engine.model import TreeModel
from specchat.models.catalog.ref import demo_source
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.weights.layout import share_buffers
from specchat.models.weights.open import open_weights
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Quant
from support.engines import make_plan
from support.heads import load_head
from support.loading import load_model

CTX = 1024
STOP_IDS = frozenset({3})
PROMPTS = Path(__file__).parents[1] / "data" / "acceptance_prompts.jsonl"


@dataclass(frozen=True)
class Acceptance:
    num_tokens: int
    num_steps: int
    num_skipped: int
    num_later_tokens: int = 0  # without the first step of each answer, in which heads cannot draft
    num_later_steps: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.num_steps

    @property
    def after_first(self) -> float:
        """Tokens per step without the first step of each answer."""
        return self.num_later_tokens / self.num_later_steps


def load_demo(role: str, rows: int) -> TreeModel:
    source: ModelSource = demo_source(role)  # type: ignore[arg-type]
    return load_model(
        source,
        dtype=torch.float32,
        device=torch.device("cpu"),
        resident=None,
        num_slots=0,
        cache_rows=rows,
        chunk_rows=512,
    )


def model_drafter(budget: int, **kwargs: object) -> ModelDrafter:
    rows = int(kwargs.pop("rows", 2 * budget))  # type: ignore[call-overload]
    model = load_demo("draft", CTX + rows)
    return ModelDrafter(model, max_rows=rows, max_context=CTX, **kwargs)  # type: ignore[arg-type]


def mtp_source(target: TreeModel, rows: int) -> MtpHead:
    """The demo's own head, under its check."""
    return MtpHead(load_head(demo_source("target"), cache_rows=CTX + rows), target, max_rows=rows, check=HeadCheck())


def mtp_drafter(target: TreeModel, budget: int, proposers: Sequence[ProposingSource] = ()) -> TreeDrafter:
    return TreeDrafter(mtp_source(target, 2 * budget), proposers)


def copy_source(target: TreeModel, rows: int, quant: Quant) -> OwnCopy:
    """The demo's own copy in low precision, of all layers."""
    weights = open_weights(demo_source("target"), "fp32", quant, tree_attention)
    layers = load_layers(weights, range(8), target.device, None)
    for layer, own in zip(layers, target.skeleton.layers, strict=True):
        share_buffers(layer, own)
    return OwnCopy(CopyModel(target, dict(enumerate(layers))), max_rows=rows)


def copy_drafter(
    target: TreeModel, budget: int, quant: Quant, proposers: Sequence[ProposingSource] = ()
) -> TreeDrafter:
    return TreeDrafter(copy_source(target, 2 * budget, quant), proposers)


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(demo_source("target").path)
    lines = map(json.loads, PROMPTS.read_text().splitlines())
    return [tokenizer.encode(tokenizer.render([Message(**m) for m in line["messages"]])) for line in lines]


def measure(
    drafter: Drafter | Callable[[TreeModel], Drafter],
    budget: int,
    sampling: Sampling,
    token_lists: list[list[int]],
    max_tokens: int = 64,
    rows: int | None = None,
) -> Acceptance:
    """Total tokens and steps of answers of at most `max_tokens`; prompts beyond the context are skipped.

    A drafter that reads the target's states is given as a function of the target. A copy may take `rows` of its cache.
    """
    target, draft = demo_source("target"), demo_source("draft")
    plan = make_plan(target, draft, num_layers=8, ctx=CTX, tree_budget=budget)
    model = load_demo("target", CTX + (2 * budget if rows is None else rows))  # a copy drafts in the target's cache
    engine = Engine(plan, model, drafter(model) if callable(drafter) else drafter)
    tokens = steps = skipped = later_tokens = later_steps = 0
    for ids in token_lists:
        if len(ids) + max_tokens > CTX:
            skipped += 1
            continue
        for number, step in enumerate(engine.generate(ids, sampling, stop_ids=STOP_IDS, max_tokens=max_tokens)):
            assert step.warning is None
            tokens += len(step.token_ids)
            steps += 1
            later_tokens += len(step.token_ids) * (number > 0)
            later_steps += number > 0
    return Acceptance(tokens, steps, skipped, later_tokens, later_steps)
