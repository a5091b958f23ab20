"""Plans over several devices on narrow and wide terminals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner.test_device_plans import FIRST, SECOND, TARGET, chosen, over
from planner.test_worker_plans import worker

from specchat.planner.explain import ExplainedPlan
from specchat.planner.request import DeviceInputs
from specchat.ui.plan_view import plan_text
from specchat.units import GIB


def plans() -> dict[str, ExplainedPlan]:
    far = worker(1e8)
    assert far.peer is not None
    far = replace(far, peer=replace(far.peer, address="[fe80:1234:5678:9abc::1]:47000"))
    big = [replace(each, device_free_bytes=24 * GIB) for each in (FIRST, SECOND)]
    return {
        "workers": chosen(worker(1e9), far, devices=(), seats=10),
        "two cards": chosen(DeviceInputs(big[1], over(12.5)), first=big[0], seats=10),
    }


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_of_a_plan_fit(width: int):
    for name, found in plans().items():
        text = plan_text(TARGET, found, "", width)
        assert max(map(len, text.splitlines())) <= width, f"{name}\n{text}"
        words = " ".join(text.split())
        assert "passes in 2 microbatches from" in words and "link busy" in words
        for device in found.plan.devices:
            assert f"{device.resident} layers" in words and device.device in words.replace("- ", "-")
