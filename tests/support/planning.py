"""Plans on a machine of which little is known, and shapes of models that need not exist."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from specchat.hardware.machine import Machine, MatmulRate
from specchat.planner.placement import usable_ram
from specchat.planner.rates import Rate, Rates
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_plan
from specchat.records.model import KvShape, ModelSpec, ParamSize
from specchat.records.plan import Plan
from specchat.units import GIB

# A slow machine of a kind that nobody knows.
UNKNOWN_RATES = Rates(
    disk=Rate(2.5e9, "guessed"),
    ram=Rate(18e9, "guessed"),
    pinned=Rate(12.8e9, "guessed"),
    pageable=Rate(6e9, "guessed"),
    memory=Rate(36e9, "guessed"),
    matmul=(MatmulRate(1, 18e9), MatmulRate(512, 8e10)),
    matmul_dtype="fp32",
    compute_basis="guessed",
    dequantize_s={"int8": 3.9e-11, "int4": 1.5e-11},
)


def plan_for(request: PlanRequest, machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """The plan for a target in this very precision."""
    known = PlanInputs(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: target, draft)
    return choose_plan(replace(request, lowers_for_speed=False), known).plan


def available(usable_bytes: int) -> int:
    """Return the memory of which `usable_bytes` are left by the reserve."""
    found = usable_bytes + min(4 * GIB, usable_bytes // 3)
    assert usable_ram(found) == usable_bytes
    return found


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Shapes of models that need not exist; layers may differ in size."""
    num_layers = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(10, 100_000), min_size=1, max_size=3))
    item_bytes = draw(st.sampled_from([None, 1]))
    num_other = draw(st.integers(10, 10**6))
    return ModelSpec(
        name="any",
        architecture="AnyForCausalLM",
        vocab_size=draw(st.integers(10, 5000)),
        hidden_size=64,
        num_layers=num_layers,
        mlp_size=128,
        num_heads=4,
        max_positions=draw(st.sampled_from([512, 1024, 4096, 100_000])),
        dtype="fp32",
        num_params=draw(st.integers(10**6, 10**9)),
        num_layer_params=draw(st.integers(10, 10**6)),
        layer_params=tuple((ParamSize(sizes[i % len(sizes)], item_bytes), ParamSize(64)) for i in range(num_layers)),
        other_params=(ParamSize(num_other),),
        lookup_params=draw(st.integers(0, num_other)),
        buffer_bytes=draw(st.integers(0, 100)),
        kv_shapes=(KvShape(2, 16, 16),) * num_layers,
    )
