"""Loading the engine of a plan, one step smaller where memory has gone meanwhile."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from specchat.errors import AllocationError
from specchat.loading.locate import Models
from specchat.loading.planning import make_smaller_plan
from specchat.loading.request import ModelRequest, Reporter
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.model import LOWER_QUANTS, ModelSource
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.engine.engine import Engine
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.models.packs.pack import Pack
    from specchat.models.weights.open import ModelWeights


def load_engine(
    request: ModelRequest, models: Models, plan: Plan, reporter: Reporter, temperature: float | None = None
) -> "Engine":
    """Load the engine as planned; where free memory has gone meanwhile, load a smaller plan and say so.

    Args:
        request: choices that are made already.
        models: models of the plan.
        plan: sizes and places.
        reporter: receives progress and warnings.
        temperature: chosen sampling temperature; None leaves it to the model.

    Raises:
        DoesNotFitError: nothing smaller is left to try.
    """
    while True:
        try:
            return load_planned(models.target, models.draft, plan, reporter)
        except AllocationError as error:
            plan = make_smaller_plan(request, models, reporter, plan, temperature)
            reporter.warn(f"{error.message}; trying again with {_size_of(plan)}")
        gc.collect()  # modules and what is bound to them refer to each other: they would stay in memory until then


def load_planned(target: ModelSource, draft: ModelSource | None, plan: Plan, reporter: Reporter) -> "Engine":
    """Open the weights of both models, write the packs that they need and load the engine.

    Raises:
        AllocationError: memory that the plan counts on cannot be allocated.
        ModelError: the files cannot be read.
    """
    from specchat.engine.engine import Engine

    with _opened(target, draft, plan) as (weights, draft_weights):
        packs = _packs(weights, draft_weights, plan, reporter)
        return Engine.load(plan, weights, draft_weights, *packs, warn=reporter.warn)


def make_packs(
    target: ModelSource, draft: ModelSource | None, plan: Plan, reporter: Reporter
) -> "tuple[Pack | None, Pack | None]":
    """Return the packs of target and draft, written first if necessary; None where a model's own files are read."""
    with _opened(target, draft, plan) as (weights, draft_weights):
        packs = _packs(weights, draft_weights, plan, reporter)
        for each in (weights, draft_weights):
            if each is not None:
                each.close()
        return packs


def open_engine(
    target: ModelSource,
    draft: ModelSource | None,
    plan: Plan,
    packs: "tuple[Pack | None, Pack | None]",
    warn: Callable[[str], None] = lambda _: None,
) -> "Engine":
    """Load an engine whose packs are there already.

    Args:
        target: model that writes the text.
        draft: model that guesses, or None.
        plan: sizes and places.
        packs: packs of target and draft, as `make_packs` returns them.
        warn: receives one line about what the system refused.
    """
    from specchat.engine.engine import Engine

    with _opened(target, draft, plan) as (weights, draft_weights):
        return Engine.load(plan, weights, draft_weights, *packs, warn=warn)


@contextmanager
def _opened(
    target: ModelSource, draft: ModelSource | None, plan: Plan
) -> "Iterator[tuple[ModelWeights, ModelWeights | None]]":
    """Open the weights of both models; after an error they are closed again."""
    from specchat.engine.attention import tree_attention
    from specchat.models.weights.open import open_weights

    with ExitStack() as undo:
        weights = undo.enter_context(open_weights(target, plan.work.dtype, plan.quant, tree_attention))
        draft_weights = None
        if draft is not None:
            draft_weights = undo.enter_context(open_weights(draft, plan.work.dtype, plan.draft_quant, tree_attention))
        yield weights, draft_weights
        undo.pop_all()


def _packs(
    weights: "ModelWeights", draft_weights: "ModelWeights | None", plan: Plan, reporter: Reporter
) -> "tuple[Pack | None, Pack | None]":
    is_packed = plan.placement.streamed or plan.quant in LOWER_QUANTS
    pack = _packed(weights, plan.quant, reporter) if is_packed else None
    if draft_weights is None or plan.draft_quant not in LOWER_QUANTS:
        return pack, None
    return pack, _packed(draft_weights, plan.draft_quant, reporter)


def stop_ids(defaults: GenerationDefaults, tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the tokens that end an answer.

    Chat models often end their turns with the tokenizer's end token where their config only has the base model's.
    """
    eos = tokenizer.eos_token_id
    return defaults.stop_ids if eos is None else defaults.stop_ids | {eos}


def _packed(weights: "ModelWeights", quant: str, reporter: Reporter) -> "Pack | None":
    from specchat.models.packs.prepare import prepare

    what = f"{'quantizing' if quant in LOWER_QUANTS else 'repacking'} {weights.source.name}"
    with reporter.moving(what) as update:
        return prepare(weights, progress=lambda at: update(at.bytes_done, at.bytes_total), warn=reporter.warn)


def _size_of(plan: Plan) -> str:
    layers = f"{len(plan.placement.resident)} of {plan.placement.num_layers} layers resident"
    return f"{layers} and a tree of {plan.work.tree_budget}" if plan.work.tree_budget else layers
