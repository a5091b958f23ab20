"""A pool's slots hold the experts that a pass was told, whatever passes came before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specchat.engine.experts.pool import ExpertPool
from specchat.engine.experts.reader import ExpertReader
from specchat.engine.streaming.slots import page_aligned
from specchat.errors import CorruptCheckpointError
from specchat.models.weights.experts import Extent

LAYERS, EXPERTS, SLOT, PART = 3, 6, 4096, 700
MOST_ROWS = 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of each expert in two parts, at odd places: those of its second part come first."""
    path = tmp_path_factory.mktemp("slots") / "experts"
    numbers = np.arange(LAYERS * EXPERTS, dtype=np.uint8).repeat(PART)
    path.write_bytes(b"odd" + (numbers + 100).tobytes() + numbers.tobytes())
    return path


def extents(path: Path, layer: int) -> list[tuple[Extent, ...]]:
    second, first = 3, 3 + LAYERS * EXPERTS * PART
    places = [(layer * EXPERTS + expert) * PART for expert in range(EXPERTS)]
    return [(Extent(path, first + at, 0, PART), Extent(path, second + at, PART, PART)) for at in places]


def open_pool(path: Path, quota: int, cached: Sequence[int]) -> tuple[ExpertPool, torch.Tensor]:
    slab = page_aligned((LAYERS * quota + EXPERTS) * SLOT)
    reader = ExpertReader({layer: extents(path, layer) for layer in range(LAYERS)}, slab, SLOT, cached)
    held = {layer: {"bias": torch.arange(EXPERTS) + 10 * layer} for layer in range(LAYERS)}
    stacks = {"bias": torch.full((LAYERS * quota + EXPERTS,), -1)}
    pool = ExpertPool(range(LAYERS), EXPERTS, quota, EXPERTS, reader, held, stacks, MOST_ROWS)
    return pool, slab.view(-1, SLOT)


def check(pool: ExpertPool, slots: torch.Tensor, layer: int, ids: torch.Tensor) -> None:
    """Fetch experts, and compare the contents of their slots when they are said to be there."""
    found, arriving = pool.fetch(layer, ids)
    expert_of = dict(zip(found.flatten().tolist(), ids.flatten().tolist(), strict=True))
    came: list[int] = []
    for group in arriving:
        for slot in group:
            number = layer * EXPERTS + expert_of[slot]
            assert slots[slot, :PART].eq(number).all() and slots[slot, PART : 2 * PART].eq(number + 100).all()
            assert pool._stacks["bias"][slot] == 10 * layer + expert_of[slot]
        came += group
    assert sorted(came) == sorted({slot for slot in expert_of if slot != pool.num_slots})
    assert (found == pool.num_slots).equal(ids == EXPERTS)


rows = st.lists(st.lists(st.integers(0, EXPERTS), min_size=2, max_size=2), min_size=1, max_size=6)
visits = st.lists(st.tuples(st.integers(0, LAYERS - 1), st.lists(rows, min_size=1, max_size=3)), max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    passes=st.lists(st.tuples(st.sampled_from([1, 100]), visits), max_size=4),
    quota=st.integers(0, EXPERTS),
    cached=st.sampled_from([(), (0,), (0, 1, 2)]),
)
def test_slots_hold_what_they_are_said_to(
    file: Path, passes: list[tuple[int, list[tuple[int, list[list[list[int]]]]]]], quota: int, cached: tuple[int, ...]
):
    pool, slots = open_pool(file, quota, cached)
    with closing(pool):
        for num_rows, layers in passes:
            pool.begin(num_rows)
            for layer, chunks in sorted(layers, key=lambda visit: visit[0]):
                for chunk in chunks:
                    check(pool, slots, layer, torch.tensor(chunk))


def reads_of(pool: ExpertPool, ids: Sequence[int]) -> int:
    """The experts that a pass over one layer reads, in chunks of two experts."""
    before = pool.counters().expert_misses
    for first in range(0, len(ids), 2):
        _, arriving = pool.fetch(0, torch.tensor([ids[first : first + 2]]))
        list(arriving)
    return pool.counters().expert_misses - before


def test_prompts_read_each_expert_once_and_change_nothing(file: Path):
    pool, _ = open_pool(file, 2, ())
    everything = [*range(EXPERTS), *range(EXPERTS)]
    with closing(pool):
        for _ in range(3):  # a tree's experts stay
            pool.begin(1)
            reads_of(pool, [4, 5])
        for _ in range(2):
            pool.begin(100)
            assert reads_of(pool, everything) <= EXPERTS - 2
        pool.begin(1)
        assert reads_of(pool, [4, 5]) == 0


@pytest.fixture
def cut_file(file: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cut"
    path.write_bytes(file.read_bytes()[: -PART * EXPERTS])
    yield path


def test_experts_that_cannot_be_read_are_not_in_slots(cut_file: Path):
    pool, slots = open_pool(cut_file, 2, ())
    with closing(pool):
        pool.begin(1)
        check(pool, slots, 0, torch.tensor([[0, 1]]))
        _, arriving = pool.fetch(LAYERS - 1, torch.tensor([[0, 1]]))
        with pytest.raises(CorruptCheckpointError, match="truncated"):
            list(arriving)
        pool.restart()
        pool.begin(1)
        with pytest.raises(CorruptCheckpointError, match="truncated"):  # and not taken for there
            list(pool.fetch(LAYERS - 1, torch.tensor([[0, 1]]))[1])
        pool.restart()
        check(pool, slots, 0, torch.tensor([[0, 1]]))
