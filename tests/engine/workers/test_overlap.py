"""Microbatches over gloo: two processes compute at the same time, as if each had a device of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.workers import LAYERS, least_pass_s, loaded, model, sleep_for_rows
from support.crews import crew
from support.engines import make_plan

from specchat.engine.workers.models import RoutedModel

ROWS = 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "most"),
    [([2 * index // LAYERS for index in range(LAYERS)], 0.9), ([index % 2 for index in range(LAYERS)], 0.8)],
    ids=["ranges", "in turn"],
)
def test_two_processes_compute_at_the_same_time(
    owner: list[int], most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without any loss, two microbatches take 0.75 of the time in ranges, and 0.54 in turn."""
    monkeypatch.setattr(RoutedModel, "_run_chunks", RoutedModel._run_chunks)
    target, taken = model(tmp_path), {}
    plan = make_plan(target, None, num_layers=LAYERS, ctx=256)
    with crew(1, tmp_path, [sleep_for_rows]) as (worker,):
        sleep_for_rows()
        for count in (1, 2):
            with loaded(worker, plan, target, owner, count) as engine:
                taken[count] = least_pass_s(engine, ROWS)
    assert taken[2] <= most * taken[1], f"{taken[2] / taken[1]:.2f} of one piece"
