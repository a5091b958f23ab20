"""The bytes that passes are expected to read, beside those that a real pool reads behind a synthetic router."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.fake_engine import PLAN
from support.routing import COMMITTED, Router

from specchat.engine.experts.pool import ExpertPool
from specchat.engine.experts.reader import ExpertReader, HostSlots
from specchat.engine.streaming.slots import page_aligned
from specchat.models.weights.experts import Extent
from specchat.planner.expert_statistics import load_experts
from specchat.planner.experts import ExpertTier
from specchat.planner.statistics import record
from specchat.records.generation import Step
from specchat.records.plan import ExpertSlots

LAYERS, EXPERTS, PER_ROW, PART = 12, 128, 8, 8
# Passes until the pool has learned, then those that are counted.
WARM, COUNTED = 40, 40


def open_pool(folder: Path, quota: int) -> ExpertPool:
    path = folder / "weights"
    path.write_bytes(bytes(LAYERS * EXPERTS * PART))
    places = {
        layer: [(Extent(path, (layer * EXPERTS + expert) * PART, 0, PART),) for expert in range(EXPERTS)]
        for layer in range(LAYERS)
    }
    reader = ExpertReader(places, HostSlots(page_aligned((LAYERS * quota + EXPERTS) * PART), PART), range(LAYERS))
    held: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in range(LAYERS)}
    return ExpertPool(range(LAYERS), EXPERTS, quota, EXPERTS, reader, held, {}, 64)


def run(pool: ExpertPool, router: Router, rows: int, passes: int) -> list[Step]:
    """Run passes of the router's trees, as steps."""
    steps = []
    for _ in range(passes):
        before = pool.counters()
        pool.begin(rows)
        for layer, ids in enumerate(torch.from_numpy(router.tree(rows))):
            list(pool.fetch(layer, ids)[1])
        router.commit(COMMITTED[rows])
        after = pool.counters()
        made = Step((1,), None, 1, 100, rows - 1, 1, 9, 0.5, 0.1, 0.4, 0.0, 0.0, after.num_bytes - before.num_bytes)
        hits, misses = after.expert_hits - before.expert_hits, after.expert_misses - before.expert_misses
        steps.append(replace(made, expert_hits=hits, expert_misses=misses, experts_used=pool.experts_used()))
    return steps


def mean_bytes(steps: list[Step]) -> float:
    return sum(step.streamed_bytes for step in steps) / len(steps)


Learn = Callable[[ExpertTier, list[Step]], ExpertTier]


@pytest.fixture
def learn(tmp_path: Path) -> Learn:
    """A function that returns a tier with what steps have shown."""

    def learnt(tier: ExpertTier, steps: list[Step]) -> ExpertTier:
        placement = replace(PLAN.placement, experts=ExpertSlots(tier.quota, EXPERTS))
        record(tmp_path, replace(PLAN, placement=placement, experts=tier.forecast(8)), 0.0, steps)
        return replace(tier, learnt=load_experts(tmp_path, PLAN.target))

    return learnt


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_expected_bytes_are_read(tmp_path: Path, learn: Learn, rows: int, share: float):
    """Before anything was learned with a quarter of the experts in memory, and after other passes with half of them."""
    tier = ExpertTier(LAYERS, EXPERTS, PER_ROW, PART, int(share * EXPERTS), 0)
    with closing(open_pool(tmp_path, tier.quota)) as pool:
        router = Router(LAYERS, EXPERTS, PER_ROW, seed=rows)
        _, earlier, later = (run(pool, router, rows, passes) for passes in (WARM, COUNTED, COUNTED))
    found = mean_bytes(later)
    if share == 0.25:
        assert tier.missed_bytes(rows) == pytest.approx(found, rel=0.15)
    assert learn(tier, earlier).missed_bytes(rows) == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_a_filled_pool_reads_less_at_first(tmp_path: Path, learn: Learn, rows: int):
    tier = ExpertTier(LAYERS, EXPERTS, PER_ROW, PART, EXPERTS // 4, 0)
    router, first = Router(LAYERS, EXPERTS, PER_ROW, seed=rows), 4
    with closing(open_pool(tmp_path, tier.quota)) as pool:
        uses = learn(tier, run(pool, router, rows, WARM)).learnt.uses
    again = Router(LAYERS, EXPERTS, PER_ROW, seed=rows)
    again.commit(400)  # another text: only what never changes is left of the first one
    with closing(open_pool(tmp_path, tier.quota)) as pool:
        pool.fill(uses)
        filled = mean_bytes(run(pool, again, rows, first))
    again = Router(LAYERS, EXPERTS, PER_ROW, seed=rows)
    again.commit(400)
    with closing(open_pool(tmp_path, tier.quota)) as pool:
        assert filled < 0.85 * mean_bytes(run(pool, again, rows, first))
