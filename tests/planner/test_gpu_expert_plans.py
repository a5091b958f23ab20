"""Plans that keep a pool of experts on a GPU: the cost of a layer, host memory, ledgers, and which plan is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.loading import plan_request
from support.machines import read_machine

from specchat.models.catalog.known_models import known_models
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.candidates import Candidates
from specchat.planner.experts import ExpertTier, LearntExperts, expert_options
from specchat.planner.explain import ExplainedPlan
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, recommend
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_plan, smaller_plan
from specchat.records.model import ModelSource, Quant
from specchat.ui.placement_view import expert_facts
from specchat.units import GIB

MOE = "Qwen/Qwen3-30B-A3B"
SMALL, SHORT_OF_RAM = "desktop-8gb-pcie4x8-64gb", "desktop-12gb-pcie4x16-32gb"
GPU_TIER = ExpertTier(48, 128, 8, 1000, quota=32, num_cached=0, on_gpu=True, slot_bytes=4096)


def inputs_for(machine: str) -> PlanInputs:
    file = read_machine(machine)
    rates = rates_of(file.hardware, file.machine, file.measured)
    return PlanInputs(file.machine, rates, rates, lambda quant: known_spec(MOE, quant), known_spec("Qwen/Qwen3-0.6B"))


def asked_for(quant: Quant, **asked: object) -> PlanRequest:
    draft = ModelSource("Qwen/Qwen3-0.6B", Path())
    return plan_request(ModelSource(MOE, Path()), draft, device="cuda:0", quant=quant, **asked)


def planned(machine: str, quant: Quant = "int8", **asked: object) -> ExplainedPlan:
    return choose_plan(asked_for(quant, **asked), inputs_for(machine))


def test_reading_ahead_hides_copies_but_not_the_host():
    """Without it, a GPU waits for every missing expert: those that are there are not computed before."""
    ahead = replace(GPU_TIER, looks_ahead=True)
    host_s = GPU_TIER.waited_s(8, 0.0, 0.1, 0.05)
    assert 48 * 0.9e-3 < host_s < 48 * 1.5e-3, "the host's part of a layer, which copies no longer hide"
    assert GPU_TIER.waited_s(8, 0.08, 0.1, 0.05) == pytest.approx(host_s + 0.08)
    assert host_s < ahead.waited_s(8, 0.08, 0.1, 0.05) < GPU_TIER.waited_s(8, 0.08, 0.1, 0.05)
    assert ahead.waited_s(8, 0.0, 0.1, 0.05) > host_s, "where nothing is missing, it only costs"
    assert GPU_TIER.waited_s(64, 0.0, 0.1, 0.05) > host_s, "each copy takes the host a moment"


def test_experts_that_host_memory_does_not_hold_come_from_the_disk():
    most = GPU_TIER.kept(10**9)
    assert most.num_in_host == 128 and not most.reads_disk and most.disk_share == 0.0
    some = GPU_TIER.kept(48 * 4096 * 90 + 5)
    assert some.num_in_host == 90 and some.reads_disk and some.disk_share == pytest.approx(38 / 128)
    learnt = replace(some, learnt=LearntExperts(uses=((0.1,) * 128,) * 48))
    assert learnt.disk_share == pytest.approx(6 / 96), "the most used ones fill the pool"
    assert {item.item: item.bytes for item in some.host_items} == {
        "pinned experts": 48 * 90 * 4096,
        "pinned windows": 32 * 2**20,
    }
    assert [item.item for item in most.host_items] == ["pinned experts"]


@pytest.mark.parametrize("machine", [SMALL, SHORT_OF_RAM])
def test_single_experts_are_faster_than_whole_layers(machine: str):
    chosen = planned(machine)
    plan, slots = chosen.plan, chosen.plan.placement.experts
    assert slots is not None and plan.experts is not None and not plan.placement.streamed
    why = {choice.option: choice for choice in chosen.choices}["experts"]
    assert why.alternative is not None and why.alternative.tok_per_s is not None
    assert chosen.prediction.tok_per_s > 1.2 * why.alternative.tok_per_s
    assert plan.streamed_bytes_per_step == plan.experts.missed_bytes < 0.2 * plan.experts.all_bytes
    assert plan.device_bytes <= plan.vram_bytes
    one_more = expert_options(known_spec(MOE, "int8"), "bf16", on_gpu=True)
    assert one_more is not None
    assert plan.device_bytes + 48 * one_more.slot_bytes > plan.vram_bytes, "the pool is what memory is left"
    host = {item.item: item.bytes for item in plan.host_ledger}
    assert host["pinned experts"] == 48 * slots.in_host * one_more.slot_bytes <= plan.host_bytes
    assert (slots.in_host == 128) == (machine == SMALL) == ("pinned windows" not in host)


@pytest.mark.parametrize("machine", [SMALL, SHORT_OF_RAM])
def test_the_chosen_tree_and_pool_are_near_the_best_of_a_grid(machine: str):
    found = Candidates(asked_for("int8"), inputs_for(machine), known_spec(MOE, "int8"))
    best = found.best
    assert best is not None and best.sizes.experts is not None
    tier, speeds = best.sizes.experts, []
    for quota in range(0, tier.quota + 1, max(tier.quota // 4, 1)):
        for looks_ahead in (False, True):
            sizes = replace(best.sizes, experts=replace(tier, quota=quota, looks_ahead=looks_ahead))
            speeds += [best.model.tok_per_s(sizes, nodes, adaptive=False) for nodes in (0, *range(1, 33), 64, 256)]
    assert best.tok_per_s >= 0.9 * max(speeds)
    assert best.tok_per_s > 1.2 * min(speeds), "a grid of equal speeds shows nothing"


def test_whole_layers_stream_where_the_kernel_is_missing_or_slots_were_asked_for():
    assert known_spec(MOE, "int3").experts.has_kernel is False  # type: ignore[union-attr]
    for chosen, why in (
        (planned(SMALL, "int3"), "no kernel for many experts in int3"),
        (planned(SMALL, slots=2), "slots"),
    ):
        assert chosen.plan.experts is None and chosen.plan.placement.streamed
        assert why in {choice.option: choice for choice in chosen.choices}["experts"].why


def test_smaller_plans_give_up_slots_of_experts():
    request, inputs = asked_for("int8"), inputs_for(SHORT_OF_RAM)
    plan = choose_plan(request, inputs).plan
    smaller = smaller_plan(request, inputs, plan)
    before, after = plan.placement.experts, smaller.placement.experts
    assert before is not None and after is not None and after.quota == before.quota - 1
    assert smaller.device_bytes < plan.device_bytes


def test_the_plan_says_where_experts_are():
    plan = planned(SHORT_OF_RAM).plan
    assert plan.experts is not None
    text = dict(expert_facts(plan, plan.experts))
    assert "stay in VRAM" in text["experts"] and "are in VRAM" in text["streamed"]
    assert "pinned RAM (" in text["streamed"] and "and disk" in text["streamed"]
    all_in_ram = planned(SMALL).plan
    assert all_in_ram.experts is not None
    assert "from pinned RAM:" in dict(expert_facts(all_in_ram, all_in_ram.experts))["streamed"]


def test_a_card_too_small_for_everything_else_streams_whole_layers():
    file = read_machine(SMALL)
    machine = replace(file.machine, device_free_bytes=4 * GIB)
    rates = rates_of(file.hardware, machine, file.measured)
    plan = recommend(known_models()["Qwen/Qwen3.6-35B-A3B"], ANYTHING, machine, rates, rates).plan
    assert plan.device_bytes <= 3 * GIB
