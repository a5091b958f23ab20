"""What passes have shown about a model's experts: stored, used by plans, and harmless if damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fake_engine import PLAN

from specchat.planner.expert_statistics import load_experts, record_experts
from specchat.planner.experts import NOTHING_LEARNT, ExpertTier
from specchat.planner.learning import Learning, PassSteps
from specchat.planner.statistics import record
from specchat.records.generation import Step
from specchat.records.plan import ExpertSlots, Plan

LAYERS, EXPERTS, QUOTA = 4, 16, 4
TIER = ExpertTier(LAYERS, EXPERTS, 2, 1000, QUOTA, 0)


def planned(tier: ExpertTier = TIER) -> Plan:
    placement = replace(PLAN.placement, experts=ExpertSlots(tier.quota, tier.num_experts))
    return replace(PLAN, placement=placement, experts=tier.forecast(8))


def step(experts: list[list[int]], misses: int, rows: int = 8, **changes: object) -> Step:
    """A pass that uses these experts of each layer."""
    used = np.zeros((len(experts), EXPERTS), dtype=bool)
    for layer, own in enumerate(experts):
        used[layer, own] = True
    made = Step((1, 2), None, 1, 100, rows - 1, 1, 9, 0.5, 0.1, 0.4, 0.0, 0.0, 0)
    hits = int(used.sum()) - misses
    made = replace(made, expert_hits=hits, expert_misses=misses, experts_used=bytes(np.packbits(used)))
    return replace(made, **changes)


def test_a_missing_file_teaches_nothing(tmp_path: Path):
    assert load_experts(tmp_path, "demo", pytest.fail) is NOTHING_LEARNT
    assert NOTHING_LEARNT.factor(8) == (1.0, 1.0)


def test_shares_of_passes_are_summed_over_answers(tmp_path: Path):
    for experts in ([[0, 1], [2], [], []], [[0], [2], [], []], [[0, 15], [2], [], []]):
        record(tmp_path, planned(), 0.0, [step(experts, 1)])
    first, second, *_ = load_experts(tmp_path, PLAN.target).uses
    assert first == pytest.approx([1, 1 / 3, *[0] * 13, 1 / 3]) and second == pytest.approx([0, 0, 1, *[0] * 13])
    assert load_experts(tmp_path, "another") is NOTHING_LEARNT


def test_prompts_and_interrupted_passes_and_unknown_rows_teach_nothing(tmp_path: Path):
    some = step([[0]] * LAYERS, 1)
    passes = [
        [replace(some, experts_used=b"")],
        [replace(some, token_ids=())],
        [replace(some, num_sharing=2)],
    ]
    record_experts(tmp_path, planned(), passes)
    record_experts(tmp_path, replace(planned(), experts=None), [[some]])
    assert load_experts(tmp_path, PLAN.target) is NOTHING_LEARNT


def test_a_server_learns_from_passes_that_answers_share(tmp_path: Path):
    """The steps of a pass arrive one after the other, and are saved when the server ends."""
    shared = [step([[0], [1], [], []], 1, num_sharing=2), step([[0], [1], [], []], 1, num_sharing=2)]
    collected = PassSteps()
    with Learning(tmp_path, planned()) as learning:
        assert collected.add(shared[0], samples=False) is None
        whole = collected.add(shared[1], samples=False)
        assert whole is not None
        learning.add(whole)
    assert load_experts(tmp_path, PLAN.target).uses[:2] == ((1.0, *[0.0] * 15), (0.0, 1.0, *[0.0] * 14))


def test_predictions_follow_enough_passes(tmp_path: Path):
    """Also between the seen numbers of rows, and for another pool."""
    few, many = step([[0, 1], [2, 3, 4, 5]] * 2, 6, rows=1), step([[*range(9)]] * 4, 28, rows=16)
    record(tmp_path, planned(), 0.0, [few] * 29 + [many] * 40)
    once = replace(TIER, learnt=load_experts(tmp_path, PLAN.target))
    assert once.used(16) == pytest.approx(9) and once.missed(16) == pytest.approx(7)
    assert once.hit_rate(16) == pytest.approx(1 - 7 / 9) and once.missed_bytes(16) == pytest.approx(28000)
    assert once.used(1) / TIER.used(1) == pytest.approx(9 / TIER.used(16)), "29 passes are too few"
    record(tmp_path, planned(), 0.0, [few])
    twice = replace(TIER, learnt=load_experts(tmp_path, PLAN.target))
    assert twice.used(1) == pytest.approx(3) and twice.missed(1) == pytest.approx(1.5)
    low, middle, high = (twice.used(rows) / TIER.used(rows) for rows in (1, 4, 16))
    assert middle == pytest.approx((low * high) ** 0.5)
    larger = replace(twice, quota=6)
    assert larger.missed(16) / replace(TIER, quota=6).missed(16) == pytest.approx(7 / TIER.missed(16))
    assert all(0 <= larger.hit_rate(rows) <= 1 and larger.used(rows) <= EXPERTS for rows in (1, 2, 500))


def test_old_passes_fade(tmp_path: Path):
    record(tmp_path, planned(), 0.0, [step([[0]] * LAYERS, 0)] * 2001)
    record(tmp_path, planned(), 0.0, [step([[1]] * LAYERS, 0)] * 1000)
    uses = load_experts(tmp_path, PLAN.target).uses[0]
    assert uses[:2] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_another_model_of_this_name_begins_anew(tmp_path: Path):
    record(tmp_path, planned(), 0.0, [step([[0]] * LAYERS, 0)] * 3)
    other = replace(TIER, num_layers=1)
    record(tmp_path, planned(other), 0.0, [step([[5]], 0)])
    assert load_experts(tmp_path, PLAN.target).uses == (tuple(float(each == 5) for each in range(EXPERTS)),)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "passes": -1, "counts": [], "sums": {}}'])
def test_a_damaged_file_is_a_warning(tmp_path: Path, text: str):
    record(tmp_path, planned(), 0.0, [step([[0]] * LAYERS, 0)])
    (file,) = (tmp_path / "experts").iterdir()
    file.write_text(text)
    warnings: list[str] = []
    assert load_experts(tmp_path, PLAN.target, warnings.append) is NOTHING_LEARNT
    assert len(warnings) == 1 and "experts" in warnings[0]
    record(tmp_path, planned(), 0.0, [step([[0]] * LAYERS, 0)])
    assert load_experts(tmp_path, PLAN.target, pytest.fail).uses
