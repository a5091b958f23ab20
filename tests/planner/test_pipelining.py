"""Microbatches: times that can be added up by hand, and numbers of them that pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner.test_device_plans import FIRST, SECOND, chosen, over
from planner.test_worker_plans import worker

from specchat.planner.pipelining import Hop, choose_microbatches, pipelined_s
from specchat.planner.request import DeviceInputs
from specchat.records.microbatches import Microbatches, Stretch, cuts_of, stretches_of
from specchat.records.plan import Plan
from specchat.ui.devices_view import passes_text
from specchat.units import GIB

NOWHERE = Hop(0.0, 0.0)


def test_stretches_end_with_their_device_and_before_a_second_streamed_layer():
    found = stretches_of((0, 0, 0, 1, 0, 0), frozenset({1, 2, 3}))
    assert found == (Stretch(0, 0, 2, 1), Stretch(0, 2, 1, 1), Stretch(1, 3, 1, 1), Stretch(0, 4, 2, 0))
    assert [each.last for each in found] == [1, 2, 3, 5]


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 2), (64, 3), (5, 5)])
def test_cuts_cover_all_rows_once(rows: int, count: int):
    cuts = cuts_of(rows, count)
    assert [row for begin, end in cuts for row in range(begin, end)] == list(range(rows))
    assert len(cuts) == count and all(begin < end for begin, end in cuts)


def test_the_number_is_that_of_the_last_limit_below():
    found = Microbatches(((2, 2), (40, 4), (100, 1)))
    assert [found.count(rows) for rows in (1, 2, 39, 40, 100)] == [1, 2, 2, 4, 1]
    assert Microbatches().count(1000) == 1 and Microbatches(((1, 8),)).count(3) == 3


@pytest.mark.parametrize(("count", "seconds"), [(1, 24), (2, 18), (3, 16), (6, 14)])
def test_ranges_are_filled(count: int, seconds: float):
    """Two devices with half of 24 s of work each: the second one waits for the first microbatch."""
    halves = (Stretch(0, 0, 6, 0), Stretch(1, 6, 6, 0))
    assert pipelined_s(halves, lambda _, rows: float(rows), NOWHERE, 12, count) == pytest.approx(seconds)


def test_woven_layers_need_two_microbatches():
    layers = tuple(Stretch(index % 2, index, 1, 0) for index in range(12))
    found = [pipelined_s(layers, lambda _, rows: rows / 12, NOWHERE, 12, count) for count in (1, 2, 4)]
    assert found == pytest.approx([12, 6.5, 6.25])


def test_the_network_carries_one_microbatch_after_the_other():
    layers = tuple(Stretch(index % 2, index, 1, 0) for index in range(4))
    found = pipelined_s(layers, lambda *_: 0.0, Hop(0.5, 1.0), 6, 2)
    assert found == pytest.approx(4 * (3 + 0.5) + 3), "the second one follows the first"


def test_passes_are_cut_only_where_that_gains():
    def seconds(rows: int, count: int) -> float:
        return max(rows / 4, 10.0) + rows / count  # waits for links up to 40 rows

    assert choose_microbatches(lambda rows, _: float(rows), 500) == Microbatches()
    found = choose_microbatches(lambda rows, count: max(30.0, seconds(rows, count)), 500)
    assert found.count(16) == 1 and found.count(400) > 1


def plans() -> dict[str, Plan]:
    big = [replace(each, device_free_bytes=24 * GIB) for each in (FIRST, SECOND)]
    slow = replace(worker(1e8), machine=big[1])
    return {
        "two cards": chosen(DeviceInputs(big[1], over(12.5)), first=big[0], seats=10).plan,
        "slow network": chosen(slow, first=big[0], devices=(), seats=10).plan,
        "fits on one": chosen(DeviceInputs(big[1], over(12.5)), first=big[0]).plan,
    }


def test_plans_cut_passes_over_several_devices():
    found = plans()
    counts = {name: plan.placement.microbatches for name, plan in found.items()}
    assert counts["two cards"].count(2000) > 1 and counts["slow network"].count(2000) > 1
    assert counts["two cards"].count(11) == 1 and counts["fits on one"] == Microbatches()
    assert passes_text(found["two cards"]).startswith("in 2 microbatches from ")
    assert passes_text(found["fits on one"]).startswith("in one piece")
