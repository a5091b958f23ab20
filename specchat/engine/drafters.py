"""The drafter of a plan: the model, head or copy of the target that scores, and the sources that need no model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from specchat.engine.drafting.assistant import Assistant, AssistantModel
from specchat.engine.drafting.dflash import DFlashHead, DFlashModel
from specchat.engine.drafting.drafter import Drafter, ModelDrafter, NoDrafter, TreeDrafter, free_sources
from specchat.engine.drafting.eagle3 import Eagle3Head, Eagle3Model
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.mtp import MtpHead, MtpModel
from specchat.engine.drafting.mtp_stack import MtpStackHead, MtpStackModel
from specchat.engine.drafting.own_copy import CopyModel, OwnCopy
from specchat.engine.drafting.sources import ScoringSource
from specchat.engine.loading import load_layers, load_model
from specchat.engine.model import TreeModel
from specchat.engine.warming import warm_up
from specchat.models.hf.norms import fuse_norms
from specchat.models.packs.pack import Pack
from specchat.models.weights.layout import share_buffers
from specchat.models.weights.open import ModelWeights
from specchat.records.limits import draft_width
from specchat.records.plan import Placement, Plan

# Class of the modules of each kind of head, by the part of its source.
_HEADS: dict[str, type[TreeModel]] = {
    "mtp": MtpModel,
    "eagle3": Eagle3Model,
    "dflash": DFlashModel,
    "assistant": AssistantModel,
}


def load_copy(plan: Plan, target: TreeModel, copy: ModelWeights, pack: Pack | None) -> CopyModel:
    """Load the target's own low-bit copy: its streamed layers, quantized and resident.

    Args:
        plan: sizes and placement.
        target: loaded target, whose other modules and KV cache the copy shares.
        copy: weights of the target in the copy's precision.
        pack: pack of these weights; None quantizes the checkpoint's own files.
    """
    assert target.cache.recurrent is None, "the planner offers no copies of recurrent layers"
    streamed = plan.placement.streamed
    layers = load_layers(copy, streamed, target.device, pack)
    for index in streamed:
        share_buffers(layers[index], target.skeleton.layers[index])
    return CopyModel(target, {index: layers[index] for index in streamed})


def load_draft(plan: Plan, draft: ModelWeights, pack: Pack | None) -> TreeModel:
    """Load a draft model, or a head of the target, with all layers resident."""
    work = replace(plan.work, host_embeddings=False)
    num_layers = len(draft.skeleton.layers)
    placement = Placement(num_layers, tuple(range(num_layers)))
    model_class = _HEADS.get(draft.source.part, TreeModel)
    if model_class is MtpModel and num_layers > 1:
        model_class = MtpStackModel
    model = load_model(
        draft,
        work,
        placement,
        cache_rows=plan.first_stage.ctx + work.draft_rows,
        tree_rows=work.draft_rows,
        pack=pack,
        grows=True,
        model_class=model_class,
    )
    if work.device != "cpu" and not draft.source.part:
        fuse_norms(model.skeleton.model)
    warm_up(model.skeleton, (work.seats, draft_width(work.tree_budget, work.seats)), work)
    return model


def complete_drafter(
    plan: Plan, target: TreeModel, small: TreeModel | None, draft: ModelWeights | None, pack: Pack | None
) -> Drafter:
    """Return the drafter of a plan, after loading what needs the loaded target; if that fails, close the target.

    Args:
        plan: sizes and placement.
        target: loaded target.
        small: loaded draft model or head; None without one.
        draft: weights of the draft; None to draft without a model.
        pack: pack of these weights; None reads the checkpoint's own files.
    """
    with ExitStack() as undo:
        undo.callback(target.close)
        if draft is not None and draft.source.is_copy:
            small = load_copy(plan, target, draft, pack)
        drafter = _make_drafter(plan, target, small)
        undo.pop_all()
    return drafter


def _make_drafter(plan: Plan, target: TreeModel, small: TreeModel | None) -> Drafter:
    """Return the drafter of a plan: a model, head or copy that scores, and the sources that need no model."""
    proposers = free_sources(plan.work.seats) if plan.retrieval else []
    max_rows = plan.work.draft_rows
    if small is None:
        return TreeDrafter(None, proposers) if proposers else NoDrafter()
    if isinstance(small, CopyModel):
        return TreeDrafter(OwnCopy(small, max_rows=max_rows), proposers)
    head = _head_of(target, small, max_rows)
    if head is not None:
        return TreeDrafter(head, proposers)
    return ModelDrafter(small, max_rows=max_rows, max_context=small.max_positions, proposers=proposers)


def _head_of(target: TreeModel, small: TreeModel, max_rows: int) -> ScoringSource | None:
    """Return the head that `small` holds the modules of; None for a draft model."""
    if isinstance(small, Eagle3Model):
        small.skeleton.check_vocabulary()
        return Eagle3Head(small, target, max_rows=max_rows, check=HeadCheck())
    if isinstance(small, AssistantModel):
        return Assistant(small, target, max_rows=max_rows, check=HeadCheck())
    if isinstance(small, DFlashModel):
        return DFlashHead(small, target, max_rows=max_rows, check=HeadCheck())
    if isinstance(small, MtpStackModel):
        return MtpStackHead(small, target, max_rows=max_rows, check=HeadCheck())
    if isinstance(small, MtpModel):
        return MtpHead(small, target, max_rows=max_rows, check=HeadCheck())
    return None
