"""The plans of many machines: as written down in golden/, each with the reason why it is sensible.

Predicted speeds may differ by a fifth from what is written: a closer look at a rate is no other plan.
"""

from __future__ import annotations

import pytest
from support.golden import MODELS, golden_plans, read_golden
from support.loading import asking
from support.machines import MACHINES, read_machine

from specchat.models.catalog.known_models import known_models
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, find_recommendations, recommend

AGAIN = "after reading what has changed: PYTHONPATH=.:tests python -m support.golden, then write the reasons"


@pytest.mark.parametrize("machine", MACHINES)
def test_plans_are_as_they_were_read_by_a_person(machine: str):
    written, found = read_golden(machine), golden_plans(machine)
    assert list(found) == list(written)
    for model, plan in written.items():
        assert plan["why"], AGAIN
        assert {key: plan.get(key) for key in ("plan", "bytes")} == {
            key: found[model].get(key) for key in ("plan", "bytes")
        }, AGAIN
        speeds = [float(each.get("speed", "0").partition(" ")[0]) for each in (plan, found[model])]
        assert speeds[1] == pytest.approx(speeds[0], rel=0.2), AGAIN


def test_there_are_machines_of_every_kind():
    files = [read_machine(name) for name in MACHINES]
    cards = {gpu.vram_total_bytes >> 30 for file in files for gpu in file.hardware.survey.gpus}
    assert len(files) >= 12 and len(MODELS) >= 6 and {8, 12, 16, 24} <= cards
    assert {file.hardware.platform.wsl for file in files} == {True, False}
    assert any(file.hardware.ram.cgroup_limit_bytes for file in files)
    without = [file.hardware.cpu.isa for file in files if not file.hardware.survey.gpus]
    assert {"avx512_bf16" in isa for isa in without} == {True, False}


@pytest.mark.parametrize("machine", ["desktop-12gb-pcie4x16-32gb", "laptop-none-avx2-16gb"])
def test_what_a_machine_can_run(machine: str):
    file = read_machine(machine)
    rates, typical = (rates_of(file.hardware, file.machine, measured) for measured in (file.measured, None))
    cached = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")

    def found(**changes):
        options = {"cached": cached, "free_disk_bytes": file.hardware.disk.free_bytes} | changes
        return find_recommendations(ANYTHING, file.machine, rates, typical, **options)

    offers = found()
    offered = [model.id for model in known_models().values() if model.offered]
    assert sorted([*(each.model.id for each in offers.best), *offers.too_large, *offers.no_disk]) == sorted(offered)
    well = [each.reads_well for each in offers.best]
    assert well == sorted(well, reverse=True) and any(well) and not all(well)
    able = [each.capability for each in offers.best if each.reads_well]
    assert able == sorted(able, reverse=True)
    cached_one = next(each for each in offers.best if each.model.id == "Qwen/Qwen3-8B")
    assert cached_one.is_cached and cached_one.download_bytes == 0
    assert found() == offers
    little = found(free_disk_bytes=1 << 30)
    assert len(little.best) < len(offers.best) and "Qwen/Qwen3-32B" in little.no_disk


def test_what_was_asked_for_holds():
    file = read_machine("desktop-24gb-pcie4x16-64gb")
    rates = rates_of(file.hardware, file.machine, file.measured)
    asked = asking(ANYTHING, vram_bytes=6 << 30, ctx=2048, quant="int4", draft_is_open=False)
    plan = recommend(known_models()["Qwen/Qwen3-32B"], asked, file.machine, rates, rates).plan
    assert (plan.quant, plan.work.ctx, plan.draft, plan.vram_bytes) == ("int4", 2048, None, 6 << 30)
