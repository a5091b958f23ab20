"""Links of several GPUs in use at the same time: what is measured, kept, and planned with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.machines import MEASURED, read_machine
from support.planning import UNKNOWN_RATES
from support.pretended_gpu import PretendedGpu

from specchat.hardware import cuda, probe, store
from specchat.hardware.cuda import measure_links_at_once, rates_at_once
from specchat.hardware.machine import LinkRate, Machine
from specchat.hardware.report import report_object
from specchat.hardware.verdicts import judge
from specchat.planner.rates import Rate, at_once
from specchat.units import GIB


def test_rates_count_until_the_first_link_has_ended():
    """The slow link copies 2 pieces in the second that the fast one takes; alone, it is twice as fast."""
    fast, slow = [0.25, 0.5, 0.75, 1.0], [0.5, 1.0, 1.25, 1.5]
    assert rates_at_once([fast, slow], 100) == (400, 200)
    assert rates_at_once([fast, [9.0, 18.0]], 100) == pytest.approx((400, 100 / 9))  # not one piece in that time
    assert rates_at_once([fast], 100) == (400,)


def test_all_gpus_are_measured_and_nothing_stays_pinned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_PIECE_BYTES", 1 << 20)
    with PretendedGpu(num_devices=3) as gpu:
        found = measure_links_at_once()
        assert len(found) == 3 and len(set(gpu.runtime.timed)) == 3 and not gpu.runtime.pinned
        gpu.runtime.refuses_to_pin = True
        assert measure_links_at_once() == (None, None, None)
        gpu.runtime.refuses_to_pin = False
        machine = Machine("cuda:0", 8 * GIB, 8 * GIB, fast_bf16=True)
        assert [each.device for each in probe._links_at_once(machine)] == ["cuda:0", "cuda:1", "cuda:2"]
        assert probe._links_at_once(replace(machine, device="cpu")) == ()
    with PretendedGpu(num_devices=1):
        assert probe._links_at_once(machine) == ()


def test_rates_are_kept_and_reported(tmp_path):
    file = read_machine("desktop-8gb-pcie4x8-64gb")
    measured = replace(file.measured, at_once=(LinkRate("cuda:0", 12e9), LinkRate("cuda:1", 6e9)))
    store.save(tmp_path, "key", measured)
    assert store.load(tmp_path, "key") == measured
    verdicts = judge(file.hardware, measured)
    assert any(each.topic == "GPUs at once" and "cuda:1 6.0 GB/s" in each.text for each in verdicts)
    report = report_object(probe.Report(file.hardware, measured, verdicts), verdicts, None)
    assert report["links_at_once"][1] == {"device": "cuda:1", "h2d_pinned_bytes_per_s": 6e9}
    assert MEASURED.at_once == ()


def test_plans_count_on_links_that_are_in_use_together():
    fast = replace(UNKNOWN_RATES, pinned=Rate(25e9, "typical"))
    assert [each.host for each in at_once([fast, fast], [20e9, 11e9])] == [
        Rate(20e9, "measured"),
        Rate(11e9, "measured"),
    ]
    shared = at_once([fast, fast], [None, None])  # host memory is copied with 18 GB/s, and read with 36
    assert [each.host.per_s for each in shared] == pytest.approx([18e9, 18e9])
    assert at_once([UNKNOWN_RATES], [None]) == [UNKNOWN_RATES]
