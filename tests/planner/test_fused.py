"""Plans know which matrices a GPU multiplies with few rows as they are stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import read_machine

from specchat.hardware.machine import MatmulRate
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.acceptance import INT4_GAIN
from specchat.planner.compute import ComputeTimes
from specchat.planner.rates import Rates, rates_of
from specchat.planner.request import PlanInputs
from specchat.records.model import Quant

MACHINE = read_machine("desktop-24gb-pcie4x16-64gb")
RATES = rates_of(MACHINE.hardware, MACHINE.machine, MACHINE.measured)
DRAFT = "meta-llama/Llama-3.2-1B-Instruct"


def pass_s(quant: Quant, rates: Rates, rows: int) -> float:
    return ComputeTimes(known_spec(DRAFT, quant), "bf16", rates, on_cpu=False).pass_s(rows, by_graph=True)


@pytest.mark.parametrize("rows", [8, 32])
def test_drafts_in_fewer_bits_compute_faster_where_kernels_read_codes(rows: int):
    without = replace(RATES, fused_s={})
    assert pass_s("int4", RATES, rows) < pass_s("int8", RATES, rows) < 0.85 * pass_s("none", RATES, rows)
    assert pass_s("int8", without, rows) > pass_s("none", without, rows) == pass_s("none", RATES, rows)


def test_kernels_for_few_rows_serve_no_more():
    without = replace(RATES, fused_s={})
    assert pass_s("int8", RATES, 64) < pass_s("int8", without, 64)
    assert pass_s("int8", RATES, 65) == pass_s("int8", without, 65)


def test_turing_has_the_kernel_for_four_bits_only():
    old = rates_of(MACHINE.hardware, replace(MACHINE.machine, fused=("int4",)), None)
    assert set(old.fused_s) == {"int4"} and set(RATES.fused_s) == {"int4", "int8"}


def test_a_measured_rate_of_memory_counts():
    """A matmul with one row reads a matrix of two bytes per weight: 1 Tflop/s are 1 TB/s."""
    measured = replace(MACHINE.measured, matmul=(MatmulRate(1, 1e12), MatmulRate(64, 5e13)))
    found = rates_of(MACHINE.hardware, MACHINE.machine, measured).fused_s
    assert found["int8"] == pytest.approx(1 / 0.75e12) and found["int4"] == pytest.approx(0.5 / 0.75e12)


def test_a_draft_in_four_bits_is_expected_to_guess_worse():
    inputs = PlanInputs(MACHINE.machine, RATES, RATES, lambda quant: known_spec("Qwen/Qwen3-32B", quant))
    plain, int8, int4 = (
        inputs.acceptance(known_spec("Qwen/Qwen3-32B"), known_spec(DRAFT, quant), samples=True)
        for quant in ("none", "int8", "int4")
    )
    assert int8 == plain and int4.gain == pytest.approx(INT4_GAIN * plain.gain) and int4.knee == plain.knee
