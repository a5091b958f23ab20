"""The stages of a chat: what is resident, and how large the caches are, while the text is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from specchat.engine.model import TreeModel
from specchat.errors import AllocationError, is_lack_of_memory
from specchat.records.plan import Plan, Stage
from specchat.units import format_bytes


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
        streamed = sorted(set(range(len(self._target.skeleton.layers))) - set(stage.resident))
        if len(streamed) > len(self._target.streamed):
            self._target.restream(streamed)
        self._target.cache.grow(stage.ctx + self._plan.work.tree_budget)
        for draft in self._drafts:
            draft.cache.grow(stage.ctx + self._plan.work.draft_rows)
        self._ctx = stage.ctx


@contextmanager
def allocating(plan: Plan) -> Iterator[None]:
    """Convert out-of-memory errors of libraries into AllocationError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
    else:
        return
    # Raise outside the handler: the caught error's frames keep earlier allocations alive.
    raise AllocationError(
        f"cannot allocate {format_bytes(plan.device_bytes)} on {plan.work.device}",
        hint="close other programs, or set a smaller --vram or --ctx",
    )
