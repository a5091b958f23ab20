"""Load the engine of a plan; if memory is no longer free, load a smaller plan."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from specchat.errors import AllocationError
from specchat.loading.checking import check_model
from specchat.loading.models import Models
from specchat.loading.planning import make_smaller_plan
from specchat.loading.request import ModelRequest, Reporter, WorkersChoice
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.model import LOWER_QUANTS, Dtype, ModelSource
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.engine.engine import Engine
    from specchat.hardware.pressure import MemoryWatch
    from specchat.models.hf.attention import AttentionFunction
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.models.packs.pack import Pack
    from specchat.models.weights.open import ModelWeights


def load_engine(
    request: ModelRequest, models: Models, plan: Plan, reporter: Reporter, temperature: float | None = None
) -> "Engine":
    """Load the engine as planned; if memory is no longer free, warn and load a smaller plan.

    Args:
        request: models and choices of the user.
        models: models of the plan.
        plan: plan to load.
        reporter: receives progress and warnings.
        temperature: sampling temperature of the user; None leaves it to the model.

    Raises:
        DoesNotFitError: nothing smaller is left to try.
    """
    from specchat.engine.device import release_memory

    while True:
        try:
            return load_planned(models.target, models.draft, plan, reporter, request.workers)
        except AllocationError as error:
            refused = error.message
        release_memory()  # the next plan depends on free memory; the error has held the objects of the last one
        plan = make_smaller_plan(request, models, reporter, plan, temperature)
        reporter.warn(f"{refused}; trying again with {_size_of(plan)}")


def load_planned(
    target: ModelSource,
    draft: ModelSource | None,
    plan: Plan,
    reporter: Reporter,
    workers: WorkersChoice | None = None,
) -> "Engine":
    """Open the weights of both models, write missing packs and load the engine.

    Args:
        target: model that writes the text.
        draft: model that drafts trees, or None.
        plan: plan to load.
        reporter: receives progress and warnings.
        workers: machines that a plan deals layers to.

    Raises:
        AllocationError: memory of the plan cannot be allocated.
        ModelError: the files cannot be read.
    """
    from specchat.hardware.pressure import MemoryWatch

    with _opened(target, draft, plan) as (weights, draft_weights):
        packs = _packs(weights, draft_weights, plan, reporter)
        return _load(plan, weights, draft_weights, packs, reporter.warn, MemoryWatch(), workers)


def make_packs(
    target: ModelSource, draft: ModelSource | None, plan: Plan, reporter: Reporter
) -> "tuple[Pack | None, Pack | None]":
    """Return the packs of target and draft, and write missing ones; None for a model that needs no pack."""
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
    watch: "MemoryWatch | None" = None,
    workers: WorkersChoice | None = None,
) -> "Engine":
    """Load an engine whose packs exist.

    Args:
        target: model that writes the text.
        draft: model that drafts trees, or None.
        plan: plan to load.
        packs: packs of target and draft, as `make_packs` returns them.
        warn: receives one-line warnings about requests that the system refused.
        watch: tells when memory is short, so that layers are given back; None keeps all layers, as measurements need.
        workers: machines that a plan deals layers to; with them, all layers are kept.
    """
    with _opened(target, draft, plan) as (weights, draft_weights):
        return _load(plan, weights, draft_weights, packs, warn, watch, workers)


def _load(
    plan: Plan,
    weights: "ModelWeights",
    draft_weights: "ModelWeights | None",
    packs: "tuple[Pack | None, Pack | None]",
    warn: Callable[[str], None],
    watch: "MemoryWatch | None",
    workers: WorkersChoice | None,
) -> "Engine":
    """Load an engine from opened weights, on this machine or on several."""
    from specchat.engine.engine import Engine

    if workers is None:
        return Engine.load(plan, weights, draft_weights, *packs, warn=warn, watch=watch)
    from specchat.loading.workers import load_with_workers

    return load_with_workers(workers, plan, weights, draft_weights, packs, warn)


@contextmanager
def _opened(
    target: ModelSource, draft: ModelSource | None, plan: Plan
) -> "Iterator[tuple[ModelWeights, ModelWeights | None]]":
    """Check both models and open their weights; close the weights after an error only."""
    from specchat.engine.attention import tree_attention

    for source in (target, draft):
        if source is not None and not source.part:  # a part has the target's architecture
            check_model(source)  # at no cost after `make_plan`, which needs the check before any download
    with ExitStack() as undo:
        opened = partial(_open, attention=tree_attention, dtype=plan.work.dtype)
        weights = undo.enter_context(opened(target, plan.quant))
        draft_weights = None if draft is None else undo.enter_context(opened(draft, plan.draft_quant))
        yield weights, draft_weights
        undo.pop_all()


def _open(source: ModelSource, quant: str, dtype: Dtype, attention: "AttentionFunction") -> "ModelWeights":
    from specchat.models.sizes import cache
    from specchat.models.weights.open import open_weights

    described = cache.load(cache.key_of(source, quant), source.name)
    return open_weights(source, dtype, quant, attention, () if described is None else described.kv_shapes)


def _packs(
    weights: "ModelWeights", draft_weights: "ModelWeights | None", plan: Plan, reporter: Reporter
) -> "tuple[Pack | None, Pack | None]":
    is_packed = plan.placement.streams or plan.quant in LOWER_QUANTS
    by_experts = plan.placement.experts is not None
    pack = packed(weights, plan.quant, reporter, by_experts=by_experts) if is_packed else None
    if draft_weights is None or plan.draft_quant not in LOWER_QUANTS:
        return pack, None
    if draft_weights.source.is_copy and not plan.placement.streamed:
        return pack, None  # a copy has no layers of its own then
    return pack, packed(draft_weights, plan.draft_quant, reporter)


def stop_ids(defaults: GenerationDefaults, tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the tokens that end an answer: those of the generation_config, and the tokenizer's end token.

    The config of a chat model often names only the end token of the base model.
    """
    eos = tokenizer.eos_token_id
    return defaults.stop_ids if eos is None else defaults.stop_ids | {eos}


def packed(weights: "ModelWeights", quant: str, reporter: Reporter, *, by_experts: bool = False) -> "Pack | None":
    """Return the pack of a model, and write a missing one; None if the model's own files can be streamed."""
    from specchat.models.packs.prepare import prepare

    what = f"{'quantizing' if quant in LOWER_QUANTS else 'repacking'} {weights.source.name}"
    with reporter.moving(what) as update:
        return prepare(
            weights,
            by_experts=by_experts,
            progress=lambda at: update(at.bytes_done, at.bytes_total),
            warn=reporter.warn,
        )


def _size_of(plan: Plan) -> str:
    if plan.experts is not None and plan.placement.experts is not None:
        return f"{plan.placement.experts.quota} of {plan.experts.num_experts} experts of each layer in memory"
    layers = f"{len(plan.placement.resident)} of {plan.placement.num_layers} layers resident"
    return f"{layers} and a tree of {plan.work.tree_budget}" if plan.work.tree_budget else layers
