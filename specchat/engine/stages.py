"""The stages of a chat: what is resident, and how large the caches are, while the text is short."""

from __future__ import annotations

from collections.abc import Sequence

from specchat.engine.loading import allocating
from specchat.engine.model import TreeModel
from specchat.records.plan import Plan, Stage


class Stages:
    """Moves memory from resident layers to the caches when a chat outgrows a stage.

    Args:
        plan: plan with the stages; without stages, everything has its final size from the beginning.
        target: target model, loaded for the first stage.
        drafts: models of the drafter.
    """

    def __init__(self, plan: Plan, target: TreeModel, drafts: Sequence[TreeModel]) -> None:
        self._plan = plan
        self._target = target
        self._drafts = tuple(drafts)
        last = Stage(plan.work.ctx, plan.placement.resident)
        self._stages = (*plan.stages, last)
        self._ctx = plan.first_stage.ctx

    def make_room(self, num_tokens: int) -> None:
        """Begin the first stage whose context holds the tokens, if the present one does not.

        First further layers are streamed, then the caches take their memory; so no more is held at any time than in
        one of the two stages, except for the old buffer of one layer's keys.

        Raises:
            AllocationError: planned memory cannot be allocated.
        """
        if num_tokens <= self._ctx:
            return
        stage = next(each for each in self._stages if num_tokens <= each.ctx)
        with allocating(self._plan):
            self._begin(stage)

    def _begin(self, stage: Stage) -> None:
        # Layers that were given back while memory was short are streamed already.
        leaving = set(range(self._plan.placement.num_layers)) - set(stage.resident) - self._target.streamed
        if leaving:
            self._target.restream(leaving)
        self._target.cache.grow(stage.ctx + self._plan.work.tree_rows)
        for draft in self._drafts:
            draft.cache.grow(stage.ctx + self._plan.work.draft_rows)
        self._ctx = stage.ctx
