"""The pieces of the simulation of a step on a GPU, against times that can be added up by hand, and what it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.simulated_step import Case, Times, Work, case_of, planned, settings, simulate
from support.gpu_counts import DemoCounts, PassCounts, StepCounts, count_pass, num_pieces

# Nothing but large matrices and layers takes time.
FREE = Times(host_kernel=0, device_kernel=0, graph_launch=0, graph_kernel=0, copy=0, wait=0, python=0)
NOTHING = Work(0, 0.0)
COUNTS = StepCounts(
    0, 0, draft_copies=1, draft_waits=1, pass_copies=1, block=0, walk_copies=0, walk_waits=1, kept=0, kept_copies=1
)
# Eight layers, of which every other one takes a second of the link; four draft passes of a tenth of a second.
CASE = Case(
    streams=(False, True) * 4,
    layer_s=1.0,
    slots=2,
    draft=Work(0, 0.1),
    grow=NOTHING,
    layer=Work(0, 0.01),
    around=NOTHING,
    block=Work(0, 0.1),
    keep=NOTHING,
    passes=4,
    blocks=1,
    counts=COUNTS,
)


def test_a_step_that_waits_for_the_link_is_the_time_of_its_layers_after_the_slots_are_full():
    """The link idles from when both slots are full until the first streamed layer was computed: never here."""
    found = simulate(CASE, FREE)
    assert found.step_s == pytest.approx(4.0) and found.busy == pytest.approx(1.0)
    assert found.draft_s == pytest.approx(0.4) and found.walk_s == pytest.approx(0.1)


def test_drafting_beyond_full_slots_is_not_hidden():
    found = simulate(replace(CASE, passes=30), FREE)
    assert found.step_s == pytest.approx(3.0 + 0.1 + 0.02 + 2 * 1.0 + 0.01 - 0.01, abs=0.03)
    assert found.busy < 0.8


def test_a_step_that_waits_for_computing_is_the_sum_of_its_parts():
    found = simulate(replace(CASE, layer=Work(0, 2.0)), FREE)
    assert found.step_s == pytest.approx(8 * 2.0 + 0.4 + 0.1)


def test_resident_layers_in_a_row_let_the_link_idle():
    rows = replace(CASE, layer=Work(0, 0.45), streams=(True, True) * 10 + (False,) * 20)
    woven = replace(rows, streams=(False, True) * 20)
    assert simulate(rows, FREE).step_s > 1.2 * simulate(woven, FREE).step_s


def test_small_copies_that_wait_for_layers_take_what_drafting_would_hide():
    found = simulate(replace(CASE, waits_for_layers=True), FREE)
    assert found.step_s == pytest.approx(4.0 + 0.4, abs=0.05)


def test_queueing_counts_once_it_takes_longer_than_computing():
    times = replace(FREE, host_kernel=1e-3, graph_launch=5e-3)
    resident = replace(CASE, streams=(False,) * 8, draft=Work(500, 0.1))
    eager = simulate(replace(resident, by_graphs=False), times)
    assert eager.draft_s == pytest.approx(4 * 0.5, rel=0.01)
    assert simulate(resident, times).draft_s == pytest.approx(4 * 0.1, rel=0.02)


def test_kernels_of_pieces_are_counted(tmp_path: Path):
    """A matrix of a 70B model is dequantized in pieces; each takes the kernels of one more product."""
    counts = count_pass("llama", "int4", tmp_path)
    assert 55 <= counts.layer <= 64 and 4 <= counts.piece <= 7 and counts.beside <= 40 and counts.head <= 6
    assert num_pieces(8192, 8192) == 1 and num_pieces(28672, 8192) == 4 and num_pieces(8192, 28672) == 4


@pytest.mark.slow
def test_the_planner_predicts_what_is_simulated():
    draft = {"llama": PassCounts(41, 0, 34, 2), "qwen3": PassCounts(57, 0, 34, 2)}
    target = {"llama": PassCounts(62, 5.3, 34, 4), "qwen3": PassCounts(78, 5.3, 34, 4)}
    counts = StepCounts(69, 14, 1, 1, 1, 160, 0, 1, 4, 1)
    for setting in settings():
        found = planned(setting)
        name = setting.architecture
        case = case_of(found, setting.card, target[name], draft[name], counts, DemoCounts(16.4, 3.75))
        assert found.prediction.pass_s == pytest.approx(simulate(case).step_s, rel=0.1)
