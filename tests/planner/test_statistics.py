"""Statistics of chats: stored, summed, and harmless if damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.fake_engine import CHOSEN, PLAN
from support.loading import plan_request
from support.planning import UNKNOWN_RATES
from support.plans import changed

from specchat.hardware.machine import Machine
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.describe import describe
from specchat.planner.acceptance import TYPICAL_ACCEPTANCE
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.planner.statistics import AnswerStep, Statistics, Tally, load, plan_key, record, record_passes
from specchat.records.generation import Step
from specchat.units import GIB


def step(tokens: int = 5, nodes: int = 63, seconds: float = 0.5, **changes: object) -> Step:
    made = Step((1,) * tokens, None, 1, 100, nodes, tokens - 1, 9, seconds, 0.1, seconds - 0.1, 0.0, 0.0, 0)
    return replace(made, **changes)


def test_a_missing_file_gives_empty_statistics(tmp_path):
    statistics = load(tmp_path / "absent", pytest.fail)
    assert statistics == Statistics()
    assert statistics.acceptance("demo", "demo draft", TYPICAL_ACCEPTANCE, samples=False) is TYPICAL_ACCEPTANCE
    assert statistics.corrected(PLAN, CHOSEN.prediction, samples=False) is CHOSEN.prediction


def test_acceptance_is_measured_after_enough_steps(tmp_path):
    """Scale the prior to the measured tokens, also for tree sizes between measured ones."""
    for _ in range(2):
        record(tmp_path, PLAN, 0.0, [step()] * 20)
    acceptance = load(tmp_path).acceptance("demo", "demo draft", TYPICAL_ACCEPTANCE, samples=False)
    assert acceptance.basis == "measured" and acceptance.tokens_per_step(63) == pytest.approx(5)
    assert acceptance.tokens_per_step(0) == 1 < acceptance.tokens_per_step(16) < 5 < acceptance.tokens_per_step(128)
    assert load(tmp_path).acceptance("demo", "another", TYPICAL_ACCEPTANCE, samples=False) is TYPICAL_ACCEPTANCE


def test_a_prediction_uses_the_measured_speed_of_its_plan(tmp_path):
    record(tmp_path, PLAN, 0.0, [step(), step(3, 31, 0.3)] * 20 + [step(seconds=90.0, new_rows=500)])
    found = load(tmp_path).corrected(PLAN, CHOSEN.prediction, samples=False)
    assert (found.pass_s, found.tok_per_s, found.basis) == (pytest.approx(0.4), pytest.approx(10), "measured")
    other = changed(PLAN, slots=3)
    assert plan_key(other, samples=False) != plan_key(PLAN, samples=False)
    assert load(tmp_path).corrected(other, CHOSEN.prediction, samples=False) is CHOSEN.prediction


def test_greedy_and_sampled_answers_are_counted_separately(tmp_path):
    """Acceptance rates differ between the two; all temperatures above 0 count together."""
    record(tmp_path, PLAN, 0.0, [step(3, seconds=0.3)] * 40)
    for temperature in (0.2, 1.5):
        record(tmp_path, PLAN, temperature, [step(6, seconds=0.4)] * 20)
    statistics = load(tmp_path)
    for samples, tokens, tok_per_s in ((False, 3, 10), (True, 6, 15)):
        acceptance = statistics.acceptance("demo", "demo draft", TYPICAL_ACCEPTANCE, samples=samples)
        assert acceptance.tokens_per_step(63) == pytest.approx(tokens)
        found = statistics.corrected(PLAN, CHOSEN.prediction, samples=samples)
        assert (found.tokens_per_step, found.tok_per_s) == (pytest.approx(tokens), pytest.approx(tok_per_s))


def test_interrupted_and_truncated_steps_are_ignored(tmp_path):
    """Ignore steps without tokens, and the last step of an answer cut at its maximum length."""
    record(tmp_path, PLAN, 0.0, [step(0), step(1, finish_reason="length")])
    assert load(tmp_path).pairs == {"demo demo draft greedy": {}}


def test_answers_that_share_a_pass_count_its_seconds_once(tmp_path):
    plan = changed(PLAN, seats=3)
    shared = [AnswerStep(step(tokens, nodes, 0.6, num_sharing=3), samples=False) for tokens, nodes in PASS]
    record_passes(tmp_path, plan, [shared] * 40)
    statistics = load(tmp_path)
    assert statistics.plans == {plan_key(plan, samples=False): Tally(40, 40 * 34, 40 * 9, pytest.approx(24))}
    found = statistics.corrected(plan, CHOSEN.prediction, samples=False)
    assert (found.pass_s, found.tokens_per_step, found.tree_nodes) == (pytest.approx(0.6), 9, 34)
    assert found.tok_per_s == pytest.approx(15)
    rows = statistics.pairs["demo demo draft greedy"]
    assert {size: (tally.steps, tally.tokens) for size, tally in rows.items()} == {"4": (40, 160), "5": (40, 160)}
    acceptance = statistics.acceptance("demo", "demo draft", TYPICAL_ACCEPTANCE, samples=False)
    assert acceptance.tokens_per_step(17) == pytest.approx(4, rel=0.1), "that of a tree of one answer"


PASS = ((4, 10), (1, 0), (4, 24))


@pytest.mark.parametrize(
    "shared",
    [
        [AnswerStep(step(num_sharing=2), samples=False)] * 2,
        [AnswerStep(step(num_sharing=3, new_rows=rows), samples=False) for rows in (1, 80, 1)],
        [AnswerStep(step(num_sharing=3), samples=samples) for samples in (True, False, False)],
        [AnswerStep(step(0, num_sharing=3, finish_reason="interrupt"), samples=False)] * 3,
    ],
    ids=["a free seat", "a prompt", "both classes", "interrupted"],
)
def test_other_passes_do_not_count_for_a_plan_of_several_seats(tmp_path, shared):
    record_passes(tmp_path, changed(PLAN, seats=3), [shared])
    assert not any(tally.steps for tally in load(tmp_path).plans.values())


def test_old_chats_fade_and_old_plans_are_dropped(tmp_path):
    record(tmp_path, PLAN, 0.0, [step(2)] * 4000)
    record(tmp_path, PLAN, 0.0, [step(9)] * 4000)
    acceptance = load(tmp_path).acceptance("demo", "demo draft", TYPICAL_ACCEPTANCE, samples=False)
    assert acceptance.tokens_per_step(63) > 7
    for slots in range(300):
        record(tmp_path, changed(PLAN, slots=slots), 0.0, [step()])
    plans = load(tmp_path).plans
    assert len(plans) == 200 and plan_key(changed(PLAN, slots=299), samples=False) in plans
    assert plan_key(PLAN, samples=False) not in plans


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "7", '{"version": 1}', '{"version": 1, "pairs": {"a": {"1": [1]}}, "plans": {}}', "\x00\xff"],
)
def test_a_damaged_file_warns_and_is_replaced_by_the_next_chat(tmp_path, damage):
    (tmp_path / "statistics.json").write_bytes(damage.encode("latin-1"))
    warnings: list[str] = []
    assert load(tmp_path, warnings.append) == Statistics()
    assert len(warnings) == 1 and "statistics.json" in warnings[0] and "\n" not in warnings[0]
    record(tmp_path, PLAN, 0.0, [step()])
    assert load(tmp_path, pytest.fail).plans


def test_impossible_sums_count_as_damage(tmp_path):
    record(tmp_path, PLAN, 0.0, [step()])
    file = tmp_path / "statistics.json"
    values = json.loads(file.read_text())
    values["plans"][plan_key(PLAN, samples=False)][3] = -1.0
    file.write_text(json.dumps(values))
    warnings: list[str] = []
    assert load(tmp_path, warnings.append) == Statistics() and warnings


def test_an_unwritable_folder_is_left_unchanged(tmp_path):
    (tmp_path / "file").write_text("")
    record(tmp_path / "file", PLAN, 0.0, [step()])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_alternatives_are_scaled_by_the_measured_speed():
    """A plan that is slower than predicted must still look faster than its alternatives."""
    target, draft = describe(demo_source("target")), describe(demo_source("draft"))
    machine = Machine("cpu", 8 * GIB, 8 * GIB, fast_bf16=False)
    known = PlanInputs(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: target, draft)
    request = plan_request(demo_source("target"), demo_source("draft"), draft_is_open=True)
    first = choose_plan(request, known)
    slow = Tally(steps=100, nodes=6400, tokens=200, seconds=200 / first.prediction.tok_per_s * 4)
    slower = Statistics(plans={plan_key(first.plan, samples=False): slow})
    then = choose_plan(request, replace(known, statistics=slower))
    assert then.plan == first.plan
    assert then.prediction.tok_per_s == pytest.approx(first.prediction.tok_per_s / 4)
    others = [(a.alternative, b.alternative) for a, b in zip(first.choices, then.choices, strict=True) if a.alternative]
    assert others
    for before, after in others:
        assert after.tok_per_s == pytest.approx(before.tok_per_s / 4)
        assert after.tok_per_s <= then.prediction.tok_per_s
