"""Plans that read experts one by one: the formulas against simulated pools, the ledger, and which plan is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.loading import asking, plan_request
from support.machines import read_machine
from support.planning import UNKNOWN_RATES
from support.routing import COMMITTED, Router

from specchat.hardware.machine import Machine
from specchat.models.catalog.known_models import known_models
from specchat.models.sizes.geometry import layer_sizes, weight_bytes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.candidates import Candidates
from specchat.planner.experts import ExpertTier, expert_options, hit_rate, used_share
from specchat.planner.explain import ExplainedPlan
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, recommend
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.records.model import ModelSource
from specchat.units import GIB

MOE = "Qwen/Qwen3-30B-A3B"


def simulated(rows: int, share: float, num_layers: int = 4, passes: int = 60) -> tuple[float, float]:
    """The experts that a pass uses, and the share of them that the pool has, with a decayed count for each expert."""
    num_experts, quota = 128, int(128 * share)
    router, uses = Router(num_layers, num_experts, 8, seed=2), np.zeros((num_layers, num_experts))
    kept = [set[int]() for _ in range(num_layers)]
    hits = used = 0
    for number in range(passes):
        for layer, ids in enumerate(router.tree(rows)):
            wanted = set(np.unique(ids).tolist())
            if number >= passes // 2:
                used, hits = used + len(wanted), hits + len(wanted & kept[layer])
            uses[layer] *= 0.97
            uses[layer, list(wanted)] += 1
            best = sorted(kept[layer] | wanted, key=lambda expert: -uses[layer, expert])
            kept[layer] = set(best[:quota])
        router.commit(COMMITTED[rows])
    return used / (passes - passes // 2) / num_layers, hits / used


@pytest.mark.parametrize(("rows", "share"), [(1, 0.25), (8, 0.25), (8, 0.5), (16, 0.125), (64, 0.25)])
def test_formulas_fit_simulated_pools(rows: int, share: float):
    used, hits = simulated(rows, share)
    assert used_share(8 / 128, rows) * 128 == pytest.approx(used, rel=0.1)
    assert hit_rate(share, used / 128) == pytest.approx(hits, abs=0.05)


def test_more_rows_and_smaller_pools_miss_more():
    tier = ExpertTier(12, 128, 8, 1000, quota=32, num_cached=0)
    missed = [tier.missed_bytes(rows) for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert missed == sorted(missed) and missed[-1] < tier.all_bytes
    assert replace(tier, quota=64).missed_bytes(8) < tier.missed_bytes(8) < replace(tier, quota=8).missed_bytes(8)


def test_reading_ahead_is_planned_where_passes_wait_for_experts():
    """It hides reads behind the layers that are computed, and costs a little time in every layer."""
    plain = ExpertTier(12, 128, 8, 1000, quota=32, num_cached=0)
    ahead = replace(plain, looks_ahead=True)
    assert 0.4 - 0.3 <= ahead.waited_s(8, 0.4, 0.3, 0.1) < plain.waited_s(8, 0.4, 0.3, 0.1)
    assert plain.waited_s(8, 0.05, 0.3, 0.1) < ahead.waited_s(8, 0.05, 0.3, 0.1), "where nothing waits, it only costs"


@pytest.mark.parametrize("gib", [12, 16, 20])
def test_the_chosen_tree_and_pool_are_near_the_best_of_a_grid(gib: int):
    """By the planner's own cost, which it does not compute for every size of the pool and of the trees."""
    file = read_machine("laptop-none-avx2-16gb")
    rates, spec = rates_of(file.hardware, file.machine, file.measured), known_spec(MOE, "int4")
    machine = replace(file.machine, ram_available_bytes=(gib + 4) * GIB, total_bytes=(gib + 8) * GIB)
    draft = known_spec("Qwen/Qwen3-0.6B")
    inputs = PlanInputs(machine, rates, rates, lambda _: spec, draft)
    request = plan_request(
        ModelSource(MOE, Path()), ModelSource(draft.name, Path()), vram_bytes=gib * GIB, quant="int4"
    )
    best = Candidates(request, inputs, spec).best
    assert best is not None
    tier = best.sizes.experts
    assert tier is not None
    speeds = []
    for quota in range(0, tier.quota + 1, max(tier.quota // 8, 1)):
        for looks_ahead in (False, True):
            sizes = replace(best.sizes, experts=replace(tier, quota=quota, looks_ahead=looks_ahead))
            speeds += [best.model.tok_per_s(sizes, nodes, adaptive=False) for nodes in (0, *range(1, 33), 64, 128)]
    assert best.tok_per_s >= 0.9 * max(speeds)
    assert best.tok_per_s > 1.2 * min(speeds), "a grid of equal speeds shows nothing"


def test_a_context_is_shortened_where_whole_layers_would_be_much_slower():
    from support.golden import golden_plans

    plan = golden_plans("laptop-none-avx2-16gb")["google/gemma-4-26B-A4B-it"]["plan"]
    assert "ctx 4096" in plan and "experts" in plan
    file = read_machine("laptop-none-avx2-16gb")
    rates = rates_of(file.hardware, file.machine, file.measured)
    asked = asking(ANYTHING, ctx=8192)
    asked_plan = recommend(known_models()["google/gemma-4-26B-A4B-it"], asked, file.machine, rates, rates).plan
    assert asked_plan.work.ctx == 8192 and asked_plan.experts is None, "unless the user asked for it"


@pytest.mark.parametrize("quant", ["none", "int4", "int8"])
def test_slots_for_all_experts_take_what_layers_take(quant: str):
    spec = known_spec(MOE, quant)
    options = expert_options(spec, "bf16")
    assert options is not None
    all_slots = options.nbytes(options.tier.num_experts) - options.nbytes(0) + options.beside_bytes
    assert all_slots == pytest.approx(sum(layer_sizes(spec, "bf16")), rel=0.01)
    fits = {17: options.nbytes(17), 16: options.nbytes(17) - 1, 0: options.least_bytes}
    for quota, room in fits.items():
        tier = options.fit(room)
        assert tier is not None and tier.quota == quota
    assert options.fit(options.least_bytes - 1) is None
    assert options.fit(2 * weight_bytes(spec, "bf16")) is None


def test_a_machine_without_a_gpu_reads_experts_of_what_does_not_fit():
    from support.golden import golden_plans

    plan = golden_plans("laptop-none-avx2-16gb")[MOE]
    assert read_machine("laptop-none-avx2-16gb").machine.device == "cpu"
    assert "experts" in plan["plan"], plan


def test_original_weights_whose_experts_are_read_do_not_fit_the_device():
    """Their precision is weighed as that of models whose layers stream."""
    machine = Machine("cpu", 60 * GIB, 60 * GIB, fast_bf16=True, total_bytes=64 * GIB, device_total_bytes=64 * GIB)
    inputs = PlanInputs(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda quant: known_spec(MOE, quant), None)
    target = ModelSource(MOE, Path())

    def planned(gib: int, **asked: object) -> ExplainedPlan:
        return choose_plan(plan_request(target, None, vram_bytes=gib * GIB, lowers_for_speed=True, **asked), inputs)

    original = planned(40, quant="none")
    assert original.plan.experts is not None and not original.plan.placement.streamed
    chosen = planned(40)
    why = {choice.option: choice.why for choice in chosen.choices}["quant"]
    is_much_faster = planned(40, quant="int8").prediction.tok_per_s >= 1.3 * original.prediction.tok_per_s
    assert chosen.plan.quant == ("int8" if is_much_faster else "none")
    assert why != "original weights fit the device"
