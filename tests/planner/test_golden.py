"""Plans of many machines must match golden/, where each has a reviewed reason.

Predicted speeds may differ by 20% from the files: a corrected rate does not make another plan.
"""

from __future__ import annotations

import pytest
from support.golden import KEYS, MODELS, golden_plans, read_golden
from support.loading import asking
from support.machines import MACHINES, read_machine

from specchat.models.catalog.known_models import known_models
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, find_recommendations, recommend

AGAIN = "review the change, run `PYTHONPATH=.:tests python -m support.golden`, then write the reasons"


@pytest.mark.parametrize("machine", MACHINES)
def test_plans_match_the_reviewed_ones(machine: str):
    written, found = read_golden(machine), golden_plans(machine)
    assert list(found) == list(written)
    for model, plan in written.items():
        assert plan["why"], AGAIN
        assert {key: plan.get(key) for key in KEYS} == {key: found[model].get(key) for key in KEYS}, AGAIN
        speeds = [float(each.get("speed", "0").partition(" ")[0]) for each in (plan, found[model])]
        assert speeds[1] == pytest.approx(speeds[0], rel=0.2), AGAIN


def test_machine_files_cover_every_kind():
    files = [read_machine(name) for name in MACHINES]
    cards = {gpu.vram_total_bytes >> 30 for file in files for gpu in file.hardware.survey.gpus}
    assert len(files) >= 12 and len(MODELS) >= 6 and {8, 12, 16, 24} <= cards
    assert {file.hardware.platform.wsl for file in files} == {True, False}
    assert any(file.hardware.ram.cgroup_limit_bytes for file in files)
    without = [file.hardware.cpu.isa for file in files if not file.hardware.survey.gpus]
    assert {"avx512_bf16" in isa for isa in without} == {True, False}


@pytest.mark.parametrize("machine", ["desktop-12gb-pcie4x16-32gb", "laptop-none-avx2-16gb"])
def test_recommendations_rank_the_models_that_run(machine: str):
    file = read_machine(machine)
    rates, typical = (rates_of(file.hardware, file.machine, measured) for measured in (file.measured, None))
    cached = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")

    def found(**changes):
        options = {"cached": cached, "free_disk_bytes": file.hardware.disk.free_bytes} | changes
        return find_recommendations(ANYTHING, file.machine, rates, typical, **options)

    recommendations = found()
    offered = [model.id for model in known_models().values() if model.offered]
    assert sorted(
        [*(each.model.id for each in recommendations.best), *recommendations.too_large, *recommendations.no_disk]
    ) == sorted(offered)
    well = [each.reads_well for each in recommendations.best]
    assert well == sorted(well, reverse=True) and any(well) and not all(well)
    able = [each.capability for each in recommendations.best if each.reads_well]
    assert able == sorted(able, reverse=True)
    cached_one = next(each for each in recommendations.best if each.model.id == "Qwen/Qwen3-8B")
    assert cached_one.is_cached and cached_one.download_bytes == 0
    assert found() == recommendations
    little = found(free_disk_bytes=1 << 30)
    assert len(little.best) < len(recommendations.best) and "Qwen/Qwen3-32B" in little.no_disk


def test_a_recommendation_keeps_user_settings():
    file = read_machine("desktop-24gb-pcie4x16-64gb")
    rates = rates_of(file.hardware, file.machine, file.measured)
    asked = asking(ANYTHING, vram_bytes=6 << 30, ctx=2048, quant="int4", draft_is_open=False)
    plan = recommend(known_models()["Qwen/Qwen3-32B"], asked, file.machine, rates, rates).plan
    assert (plan.quant, plan.work.ctx, plan.draft, plan.vram_bytes) == ("int4", 2048, None, 6 << 30)
