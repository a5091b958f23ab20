"""Plans on a machine of which little is known."""

from __future__ import annotations

from dataclasses import replace

from specchat.config import ModelSpec, Plan
from specchat.hardware.machine import Machine, MatmulRate
from specchat.planner.rates import Rate, Rates
from specchat.planner.request import Known, PlanRequest
from specchat.planner.search import choose_for

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
    known = Known(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: target, draft)
    return choose_for(replace(request, lowers_for_speed=False), known).plan
