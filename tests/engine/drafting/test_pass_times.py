"""Pass times: from the prediction to what is measured."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specchat.engine.drafting.pass_times import FadingRatio, PassTimes

PREDICTED = ((1, 1.0), (65, 2.0))


def test_it_starts_from_the_prediction():
    times = PassTimes(PREDICTED, 129)
    assert [times.at(rows) for rows in (1, 33, 65, 129)] == pytest.approx([1.0, 1.5, 2.0, 3.0])


def test_the_first_pass_corrects_all_smaller_sizes_alike():
    times, before = PassTimes(PREDICTED, 128), PassTimes(PREDICTED, 128)
    times.add(64, 3 * before.at(64))
    assert [times.at(rows) / before.at(rows) for rows in (1, 20, 64)] == pytest.approx([3.0] * 3)


def test_larger_sizes_are_tried_and_then_believed():
    """Twice the rows are taken to cost half of what was predicted, as an exponent, until they are measured."""
    times, before = PassTimes(PREDICTED, 128), PassTimes(PREDICTED, 128)
    times.add(32, before.at(32))
    assert times.at(64) == pytest.approx(math.sqrt(before.at(32) * before.at(64)))
    for _ in range(20):
        times.add(64, 2 * before.at(64))
    assert times.at(64) == pytest.approx(2 * before.at(64), rel=0.1)


def test_a_size_that_is_rarely_measured_keeps_its_place_beside_the_others():
    """Plain decoding is probed a few times per answer, while the load doubles and the draft's passes go on."""
    times, before = PassTimes(PREDICTED, 128), PassTimes(PREDICTED, 128)
    for load in (1.0, 2.0):
        for _ in range(5):
            for _ in range(4):
                times.add(1, 0.4 * load * before.at(1))
            for _ in range(40):
                times.add(32, load * before.at(32))
        assert times.at(1) == pytest.approx(0.4 * load * before.at(1), rel=0.15)


def test_another_shape_is_learned():
    def true(rows: int) -> float:
        return max(0.5, 0.02 * rows)

    times, rng = PassTimes(PREDICTED, 128), random.Random(1)
    for _ in range(2000):
        rows = rng.randint(1, 128)
        times.add(rows, true(rows) * math.exp(rng.gauss(0.0, 0.1)))
    assert [times.at(rows) for rows in (16, 64, 128)] == pytest.approx([0.5, 1.28, 2.56], rel=0.3)


def test_a_preempted_pass_counts_with_all_its_time():
    times = PassTimes(PREDICTED, 128)
    for seconds in (1.0, 1.0, 1.0, 9.0) * 20:
        times.add(1, seconds)
    assert times.at(1) == pytest.approx(3.0, rel=0.15)


def test_old_passes_fade():
    times = PassTimes(PREDICTED, 128)
    for _ in range(100):
        times.add(1, 9.0)
    for _ in range(200):
        times.add(1, 1.0)
    assert times.at(1) == pytest.approx(1.0, rel=0.2)


@given(st.lists(st.tuples(st.floats(0.0, 9.0), st.floats(0.1, 9.0)), min_size=1, max_size=20), st.floats(0.1, 9.0))
def test_a_fading_ratio_is_that_of_weighted_sums(terms: list[tuple[float, float]], prior: float):
    ratio = FadingRatio()
    assert ratio.value(prior) == prior
    for term in terms:
        ratio.add(*term)
    weights = [0.98**age for age in reversed(range(len(terms)))]
    above = sum(weight * term[0] for weight, term in zip(weights, terms, strict=True))
    below = sum(weight * term[1] for weight, term in zip(weights, terms, strict=True))
    assert ratio.value(prior) == pytest.approx(above / below)
