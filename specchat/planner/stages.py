"""Stages of a chat: as long as it is short, memory of the context is lent to resident layers.

A plan promises its whole context, so its caches and workspaces are large. Most chats are short. While a chat fits in
a smaller context, the difference holds layers that would be streamed otherwise. When the chat outgrows a stage, these
layers are streamed again, and for the next short text they are resident again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import replace

from specchat.models.sizes.geometry import layer_sizes
from specchat.planner.memory import build_ledger
from specchat.planner.placement import TierSizes, interleaved
from specchat.records.model import ModelSpec
from specchat.records.plan import Placement, Plan, Stage, Workload

_FIRST_CTX = 1024
# A later stage is longer than the one before by this share of it, and at least by `_FIRST_CTX`. Beginning a stage
# copies the caches once.
_GROWTH = 4


def with_stages(plan: Plan, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """Return the plan with stages, for chats of models whose layers stream; other plans unchanged.

    A copy of the target has layers for those that stream in the last stage, and shares the target's caches. So plans
    with a copy stay as they are, and those with layers that take more memory to be faster, or on several devices.

    Args:
        plan: plan without stages.
        target: sizes of the target.
        draft: sizes of the draft, or None.
    """
    if not _has_stages(plan, draft):
        return plan
    # The first layer stays streamed if the others lie as evenly then: the slots are full when a pass begins.
    options = [_stages(plan, target, draft, delay) for delay in (1, 0)]
    longest = [max((_longest_row(stage.resident) for stage in stages), default=0) for stages in options]
    return replace(plan, stages=options[longest.index(min(longest))])


def with_first_stage(plan: Plan, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """Return the plan with the first stage of `with_stages` alone, which has as many resident layers."""
    if not _has_stages(plan, draft):
        return plan
    work = replace(plan.work, ctx=min(_FIRST_CTX, plan.work.ctx))
    resident = _resident(plan, target, draft, work, plan.placement.resident, 1)
    return plan if resident == plan.placement.resident else replace(plan, stages=(Stage(work.ctx, resident),))


def _has_stages(plan: Plan, draft: ModelSpec | None) -> bool:
    fixed = plan.devices or plan.placement.expanded or (draft is not None and draft.is_copy)
    return bool(plan.placement.streamed) and plan.work.seats == 1 and not fixed


def _stages(plan: Plan, target: ModelSpec, draft: ModelSpec | None, delay: int) -> tuple[Stage, ...]:
    """Return the stages, by ascending context; see `_spread` for `delay`."""
    stages, resident = list[Stage](), plan.placement.resident
    for ctx in reversed(_contexts(plan.work.ctx)):
        resident = _resident(plan, target, draft, replace(plan.work, ctx=ctx), resident, delay)
        if not stages or len(resident) > len(stages[-1].resident):
            stages.append(Stage(ctx, resident))
    useful = [stage for stage in stages if len(stage.resident) > len(plan.placement.resident)]
    return tuple(reversed(useful))


def first_sizes(plan: Plan, sizes: TierSizes, target: ModelSpec) -> TierSizes:
    """Return the tier sizes of a plan's first stage.

    Args:
        plan: plan with stages.
        sizes: tier sizes of the last stage.
        target: sizes of the target.
    """
    layers, resident = layer_sizes(target, plan.work.dtype), set(plan.first_stage.resident)
    in_ram = [layers[i] for i in plan.placement.in_ram if i not in resident]
    on_disk = [layers[i] for i in plan.placement.streamed if i not in {*resident, *plan.placement.in_ram}]
    return replace(
        sizes,
        num_in_ram=len(in_ram),
        num_on_disk=len(on_disk),
        ram_bytes=sum(in_ram),
        disk_bytes=sum(on_disk),
    )


def _contexts(most: int) -> list[int]:
    """Return the contexts of the stages, ascending and below `most`."""
    contexts, ctx = list[int](), _FIRST_CTX
    while ctx < most:
        contexts.append(ctx)
        ctx += max(_FIRST_CTX, ctx // _GROWTH)
    return contexts


def _resident(
    plan: Plan, target: ModelSpec, draft: ModelSpec | None, work: Workload, later: tuple[int, ...], delay: int
) -> tuple[int, ...]:
    """Return the resident layers of a stage: those of later stages, and as many more as the plan's memory holds."""
    sizes, placement = layer_sizes(target, work.dtype), replace(plan.placement, resident=later)
    streamed = {index: sizes[index] for index in placement.streamed}
    spare = plan.device_bytes - _bytes(target, draft, work, placement, plan.placement)
    # With no more streamed layers than slots, each slot could as well hold a resident layer, without any streaming.
    most = min(len(streamed) - placement.slots - 1, spare // min(streamed.values()))
    for count in range(most, 0, -1):
        resident = _spread(later, count, placement.num_layers, delay)
        if _bytes(target, draft, work, replace(placement, resident=resident), plan.placement) <= plan.device_bytes:
            return resident
    return later


def _spread(later: Sequence[int], count: int, num_layers: int, delay: int) -> tuple[int, ...]:
    """Return the resident layers of later stages and `count` further ones, such that all are spread evenly.

    Further ones that were spread among the streamed layers alone would lie beside earlier ones: ten resident layers in
    a row of an 80-layer model, during which the slots are full and the link idles. The last layer stays streamed.

    Args:
        later: resident layers of later stages.
        count: number of further ones.
        num_layers: number of decoder layers.
        delay: number of layers by which further ones follow an even division; 1 keeps the first layer streamed.
    """
    wanted = interleaved(len(later) + count, num_layers)
    resident, held = set(later), 0
    for index in range(num_layers - 1):
        passed = sum(each <= index - delay for each in wanted)
        if index not in resident and held < passed and len(resident) < len(wanted):
            resident.add(index)
        held += index in resident
    while len(resident) < len(wanted):  # earlier layers lie denser than wanted somewhere
        free = [index for index in range(num_layers - 1) if index not in resident]
        resident.add(min(free, key=lambda index: _num_beside(resident, index)))
    return tuple(sorted(resident))


def _longest_row(resident: Sequence[int]) -> int:
    """Return the number of resident layers in the longest row of them."""
    rows = itertools.groupby(enumerate(resident), key=lambda item: item[1] - item[0])
    return max((len(list(row)) for _, row in rows), default=0)


def _num_beside(resident: Set[int], index: int) -> int:
    """Return the number of resident layers in a row beside a streamed one, on both sides."""
    before = next(count for count in itertools.count() if index - count - 1 not in resident)
    return before + next(count for count in itertools.count() if index + count + 1 not in resident)


def _bytes(target: ModelSpec, draft: ModelSpec | None, work: Workload, placement: Placement, final: Placement) -> int:
    """Return the bytes of a stage; its slots have their final size from the beginning."""
    sizes = layer_sizes(target, work.dtype)
    largest = max(sizes[index] for index in placement.streamed)
    late = max(sizes[index] for index in final.streamed) - largest
    return placement.slots * late + sum(item.bytes for item in build_ledger(target, draft, work, placement))
