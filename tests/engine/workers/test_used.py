"""What workers tell of their work: how long they computed, read and waited, and what they sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support.crews import compute_slowly, crew, load_with, with_owners
from support.engines import make_plan
from support.tiny_models import make_config, random_model, save

from specchat.engine.streaming.base import DeviceCounters, StreamCounters
from specchat.engine.workers.messages import counter_values, counters_of
from specchat.records.plan import DevicePlan

TOLD = DeviceCounters(StreamCounters(5, 0.5, link_s=2.5), 1.5, 0.25, 7)


def test_totals_travel_as_plain_values():
    assert counters_of(counter_values(TOLD)) == TOLD


def test_each_machine_tells_what_it_did(tmp_path: Path):
    """The worker sleeps 20 ms for each of its two layers, and sends each row twice."""
    target = save(random_model(make_config("llama")), tmp_path / "target")
    plan = with_owners(make_plan(target, None, num_layers=4, resident=(0, 1, 2)), [0, 1, 0, 1], slots=1)
    devices = tuple(DevicePlan(name, 0, 2, (), 5, 0, 1.0, 0.0, 0.0) for name in plan.placement.devices)
    planned = replace(plan, devices=devices)
    with crew(1, tmp_path, [compute_slowly]) as (worker,), load_with([worker], planned, target, None) as engine:
        assert engine.memory().devices[1].sent_bytes == 0, "nothing was told yet"
        for num_rows in (5, 1):
            engine.target.append(list(range(num_rows)))
        engine.target.streamer.passed(1.0)  # as the clock of a step does
        engine.target.append([1])  # the totals of the passes before have come by now
        first, second = engine.memory().devices
    row_bytes = 4 * 64
    assert engine.target.skeleton.config.hidden_size == 64
    assert first.sent_bytes == 2 * 7 * row_bytes and second.sent_bytes in (2 * 6 * row_bytes, 2 * 7 * row_bytes)
    assert first.row_wait_s > 3 * 0.04 > 1.5 * first.compute_busy
    assert second.device == "worker 1" and second.streamed_bytes > 0 == first.streamed_bytes
    assert 0 < second.link_busy < 1 and 0 < second.compute_busy < 1
