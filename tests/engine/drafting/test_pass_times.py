"""What passes take, learned while they are made: held against slower ways to say the same."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specchat.engine.drafting.pass_times import PassTimes, _smoothed, never_falling

EXPECTED = ((1, 1.0), (65, 2.0))
columns = st.lists(st.tuples(st.floats(0.1, 10.0), st.floats(0.1, 16.0)), min_size=1, max_size=12)


def test_it_starts_from_what_is_expected():
    times = PassTimes(EXPECTED, 128)
    assert [times.at(rows) for rows in (1, 33, 65, 129)] == pytest.approx([1.0, 1.5, 2.0, 3.0])


def test_one_pass_corrects_all_sizes_alike():
    times, before = PassTimes(EXPECTED, 128), PassTimes(EXPECTED, 128)
    times.add(20, 3 * before.at(20))
    times.learn()
    assert [times.at(rows) / before.at(rows) for rows in (1, 20, 100)] == pytest.approx([3.0] * 3)


def test_any_shape_that_never_falls_is_learned():
    def true(rows: int) -> float:
        return max(0.5, 0.02 * rows)

    times, rng = PassTimes(EXPECTED, 128), random.Random(1)
    for _ in range(400):
        rows = rng.randint(1, 128)
        times.add(rows, true(rows) * math.exp(rng.gauss(0.0, 0.1)))
    times.learn()
    assert all(times.at(rows) == pytest.approx(true(rows), rel=0.15) for rows in range(1, 129))


def test_what_was_long_ago_is_forgotten():
    times = PassTimes(EXPECTED, 128)
    for _ in range(20):
        times.add(96, 9.0)
    assert times.measured == (96, 96)
    for _ in range(400):
        times.add(4, 1.0)
    times.learn()
    assert times.measured == (4, 4)
    assert times.at(96) < 3.0


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0.01, 100.0)), min_size=1, max_size=40))
def test_more_rows_never_take_less(passes: list[tuple[int, float]]):
    times = PassTimes(EXPECTED, 100)
    for rows, seconds in passes:
        times.add(rows, seconds)
    times.learn()
    learned = [times.at(rows) for rows in range(1, 100)]
    assert learned == pytest.approx(sorted(learned))


@given(columns, st.floats(0.01, 9.0))
def test_the_smoothed_are_the_least_squares(columns: list[tuple[float, float]], stiffness: float):
    values, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*columns, strict=True))
    changes = torch.eye(len(columns), dtype=torch.float64).diff(dim=0)
    normal = torch.diag(weights) + stiffness * changes.T @ changes
    assert _smoothed(values.tolist(), weights.tolist(), stiffness) == pytest.approx(
        torch.linalg.solve(normal, weights * values).tolist()
    )


@given(columns)
def test_thenever_falling_are_the_nearest(columns: list[tuple[float, float]]):
    heights, weights = zip(*columns, strict=True)

    def mean(begin: int, end: int) -> float:
        products = zip(heights[begin:end], weights[begin:end], strict=True)
        return sum(height * weight for height, weight in products) / sum(weights[begin:end])

    count = len(columns)
    best = [
        max(min(mean(begin, end) for end in range(place + 1, count + 1)) for begin in range(place + 1))
        for place in range(count)
    ]
    assert never_falling(heights, weights) == pytest.approx(best)
