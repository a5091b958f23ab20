"""The drafter of a plan: the draft model or the head that scores, and the sources that need no model."""

from __future__ import annotations

from dataclasses import replace

from specchat.engine.drafting.drafter import Drafter, ModelDrafter, NoDrafter, TreeDrafter, free_sources
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.mtp import MtpHead, MtpModel
from specchat.engine.loading import load_model
from specchat.engine.model import TreeModel
from specchat.models.packs.pack import Pack
from specchat.models.weights.open import ModelWeights
from specchat.records.plan import Placement, Plan


def load_draft(plan: Plan, draft: ModelWeights, pack: Pack | None) -> TreeModel:
    """Load a draft model, or a head of the target, with all layers resident."""
    work = replace(plan.work, host_embeddings=False)
    num_layers = len(draft.skeleton.layers)
    placement = Placement(num_layers, tuple(range(num_layers)))
    model_class = MtpModel if draft.source.part == "mtp" else TreeModel
    return load_model(
        draft,
        work,
        placement,
        cache_rows=plan.first_stage.ctx + work.draft_rows,
        tree_rows=work.draft_rows,
        pack=pack,
        grows=True,
        model_class=model_class,
    )


def make_drafter(plan: Plan, target: TreeModel, small: TreeModel | None) -> Drafter:
    """Return the drafter of a plan: a model or a head that scores, and the sources that need no model."""
    proposers = free_sources(plan.work.seats) if plan.retrieval else []
    max_rows = plan.work.draft_rows
    if small is None:
        return TreeDrafter(None, proposers) if proposers else NoDrafter()
    if isinstance(small, MtpModel):
        return TreeDrafter(MtpHead(small, target, max_rows=max_rows, check=HeadCheck()), proposers)
    return ModelDrafter(small, max_rows=max_rows, max_context=small.max_positions, proposers=proposers)
