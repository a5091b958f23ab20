"""Quantized layers take more memory where the budget leaves some, and plans predict that they are faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.loading import plan_request
from support.planning import UNKNOWN_RATES

from specchat.hardware.machine import Machine
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.geometry import expanded_sizes, layer_sizes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.explain import ExplainedPlan
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.records.model import ModelSource
from specchat.units import GIB

NAME = "Qwen/Qwen3-4B"
CPU = Machine("cpu", 64 * GIB, 64 * GIB, fast_bf16=True, total_bytes=64 * GIB, has_row_kernel=True)
RATES = replace(UNKNOWN_RATES, matmul_dtype="bf16", has_row_kernel=True)


def planned(quant: str, vram_bytes: int, machine: Machine = CPU) -> ExplainedPlan:
    request = plan_request(
        ModelSource(NAME, demo_source("target").path), None, vram_bytes=vram_bytes, quant=quant, ctx=512
    )
    inputs = PlanInputs(machine, RATES, RATES, lambda _: known_spec(NAME, quant), None)
    return choose_plan(replace(request, lowers_for_speed=False), inputs)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_as_many_layers_are_expanded_as_the_budget_allows(quant):
    spec = known_spec(NAME, quant)
    assert sum(spec.layer_quant) == pytest.approx(spec.num_layer_params, rel=0.01)
    sizes, larger = layer_sizes(spec, "bf16"), expanded_sizes(spec, "bf16", has_row_kernel=True)
    most, speeds = planned(quant, 40 * GIB), []
    for count in (0, spec.num_layers * 2 // 3, spec.num_layers):
        room = sum(large - size for large, size in zip(larger[:count], sizes[:count], strict=True))
        base = most.plan.device_bytes - most.plan.placement.expanded_bytes
        found = planned(quant, base + room)
        assert len(found.plan.placement.expanded) == count and found.plan.placement.expanded_bytes == room
        assert found.plan.device_bytes == base + room <= found.plan.vram_bytes
        speeds.append(found.prediction.tok_per_s)
    few = sum(large - size for large, size in zip(larger[:5], sizes[:5], strict=True))
    assert not planned(quant, base + few).plan.placement.expanded
    assert speeds == sorted(set(speeds)) and len(most.plan.placement.expanded) == spec.num_layers


def test_codes_of_4_bits_keep_a_copy_where_a_kernel_reads_it():
    spec = known_spec(NAME, "int4")
    stored = sum(layer_sizes(spec, "bf16"))
    copies, dense = (sum(expanded_sizes(spec, "bf16", has_row_kernel=each)) for each in (True, False))
    assert 1.9 * stored < copies < 2.1 * stored and 3.5 * stored < dense
    assert sum(expanded_sizes(spec, "fp32", has_row_kernel=True)) > dense
    assert expanded_sizes(spec, "fp16", has_row_kernel=True) == layer_sizes(spec, "fp16")


def test_nothing_is_expanded_while_layers_stream_or_on_a_gpu():
    spec = known_spec(NAME, "int8")
    some = planned("int8", sum(layer_sizes(spec, "bf16")))
    assert some.plan.placement.streamed and not some.plan.placement.expanded
    gpu = Machine("cuda:0", 40 * GIB, 64 * GIB, fast_bf16=True)
    assert not planned("int8", 39 * GIB, gpu).plan.placement.expanded
    assert not planned("none", 40 * GIB).plan.placement.expanded
