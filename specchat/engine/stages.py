"""The stages of a chat: what is resident, and how large the caches are, while the text is short."""

from __future__ import annotations

from collections.abc import Sequence, Set

from specchat.engine.loading import allocating
from specchat.engine.model import TreeModel
from specchat.records.plan import Plan, Stage

# The share of a stage's context that a text may fill for the engine to go back to that stage: a longer text would soon
# outgrow it again.
_MOST_USED = 0.5


class Stages:
    """Moves memory from resident layers to the caches when a chat outgrows a stage, and back for a new one.

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

    def fit(self, num_tokens: int, lost: Set[int] = frozenset()) -> None:
        """Begin the stage of the longest text, if it is another one than the present one.

        To a later stage, layers are streamed before the caches grow. Back to an earlier one, the caches shrink before
        layers are read once more. So no more is held at any time than in one of the two stages, except for one old
        buffer of keys and values. It takes the place of a pass's workspaces.

        Args:
            num_tokens: tokens of the longest text that a seat holds.
            lost: layers that were given back while memory was short, and stay away.

        Raises:
            AllocationError: planned memory cannot be allocated.
            CorruptCheckpointError: the files are damaged or truncated.
        """
        if num_tokens > self._ctx:
            self._go_on(next(stage for stage in self._stages if num_tokens <= stage.ctx))
        else:
            # A draft keeps the rows of the text before until it drafts for the next one.
            rows = max((length for draft in self._drafts for length in draft.cache.lengths), default=0)
            earlier = [stage for stage in self._stages if rows <= stage.ctx < self._ctx]
            roomy = next((stage for stage in earlier if num_tokens <= _MOST_USED * stage.ctx), None)
            if roomy is not None:
                self._go_back(roomy, lost)

    def _go_on(self, stage: Stage) -> None:
        with allocating(self._plan):
            # Layers that were given back while memory was short are streamed already.
            leaving = set(range(self._plan.placement.num_layers)) - set(stage.resident) - self._target.streamed
            if leaving:
                self._target.restream(leaving)
            self._resize_caches(stage)

    def _go_back(self, stage: Stage, lost: Set[int]) -> None:
        with allocating(self._plan):
            self._resize_caches(stage)
            returning = (set(stage.resident) & self._target.streamed) - lost
            if returning:
                self._target.bring_back(sorted(returning))

    def _resize_caches(self, stage: Stage) -> None:
        self._target.cache.resize(stage.ctx + self._plan.work.tree_rows)
        for draft in self._drafts:
            draft.cache.resize(stage.ctx + self._plan.work.draft_rows)
        self._ctx = stage.ctx
