"""A pool's slots hold the experts that a pass was told, whatever passes came before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specchat.engine.experts.batch import ReadThreads
from specchat.engine.experts.guesses import Guess, Guesses
from specchat.engine.experts.pool import ExpertPool, Likely
from specchat.engine.experts.reader import ExpertReader, HostSlots
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


def open_pool(
    path: Path, quota: int, cached: Sequence[int], likely: Likely | None = None
) -> tuple[ExpertPool, torch.Tensor]:
    slab = page_aligned((LAYERS * quota + EXPERTS) * SLOT)
    reader = ExpertReader({layer: extents(path, layer) for layer in range(LAYERS)}, HostSlots(slab, SLOT), cached)
    held = {layer: {"bias": torch.arange(EXPERTS) + 10 * layer} for layer in range(LAYERS)}
    stacks = {"bias": torch.full((LAYERS * quota + EXPERTS,), -1)}
    pool = ExpertPool(range(LAYERS), EXPERTS, quota, EXPERTS, reader, held, stacks, MOST_ROWS, likely)
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
    guesses=st.none() | st.lists(st.none() | rows, min_size=LAYERS, max_size=LAYERS),
)
def test_slots_hold_what_they_are_said_to(
    file: Path,
    passes: list[tuple[int, list[tuple[int, list[list[list[int]]]]]]],
    quota: int,
    cached: tuple[int, ...],
    guesses: list[list[list[int]] | None] | None,
):
    """Whatever is guessed, and whichever layers a pass leaves out."""

    def likely(position: int) -> torch.Tensor | None:
        guess = guesses[position] if guesses else None
        return None if guess is None else torch.tensor(guess)

    pool, slots = open_pool(file, quota, cached, None if guesses is None else likely)
    with closing(pool):
        for num_rows, layers in passes:
            pool.begin(num_rows)
            for layer, chunks in sorted(layers, key=lambda visit: visit[0]):
                pool._num_rows = num_rows if num_rows > MOST_ROWS else sum(map(len, chunks))
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


def visit(pool: ExpertPool, layer: int, ids: Sequence[int]) -> None:
    list(pool.fetch(layer, torch.tensor([ids]))[1])


def test_guesses_are_counted(file: Path):
    """A guess is useful if its layer uses the expert; the read of a wrong one may be taken back before it begins."""
    pool, slots = open_pool(file, 1, (), lambda position: torch.tensor([[0, 1, 2, 3, 4]]))
    with closing(pool):
        pool.begin(1)
        visit(pool, 0, [5])
        pool._source.drain()
        check(pool, slots, 1, torch.tensor([[2, 3, 5]]))
        visit(pool, 2, [0])
        counters = pool.counters()
        assert (counters.expert_hits, counters.expert_misses) == (0, 5)
        assert (counters.useful_guesses, counters.useless_guesses) == (3, 2), "the least sure guess is not read"
        pool.begin(1)
        visit(pool, 1, [2, 3])
        assert pool.counters().expert_hits, "a guess that was used stays as other experts do"


def test_reads_that_a_layer_waits_for_are_not_taken_back(file: Path):
    """All threads are busy, so no read has begun when the guesses beside a used one are released."""
    guesses, gate = Guesses(8), threading.Event()
    with closing(ReadThreads(1)) as threads:
        threads.begin([lambda: gate.wait(10) and None])
        done: list[int] = []
        batches = [threads.begin([partial(done.append, number)]) for number in range(2)]
        for batch, slots in zip(batches, ([2, 3], [5]), strict=True):
            guesses.add(Guess(1, np.array(slots), batch))
        (used,) = guesses.take(1, np.array([3]))
        assert used.slots.tolist() == [3] and sorted(guesses.release().tolist()) == [2, 5]
        assert guesses.is_taken.nonzero()[0].tolist() == [2], "its read has not ended"
        gate.set()
        used.batch.wait()
        guesses.settle(wait=True)
    assert done == [0] and not guesses.is_taken.any()
    assert (guesses.useful, guesses.useless) == (1, 1)


def test_useful_guesses_become_the_layers_own(file: Path):
    """What a layer uses again and again stays, although shared slots are given away in every pass."""
    pool, _ = open_pool(file, 2, (), lambda position: torch.tensor([[0, 1]]))
    with closing(pool):
        for others in range(4):
            pool.begin(1)
            visit(pool, 0, [others, 5])
            visit(pool, 1, [0, 1])
            visit(pool, 2, [2 + others % 2, 4, 5])
        before = pool.counters()
        pool.begin(1)
        visit(pool, 1, [0, 1])
        assert pool.counters().expert_hits == before.expert_hits + 2


def test_layers_are_read_ahead_of_prompts(file: Path):
    """In as many slots as stay free if the layer in progress uses all of its experts; each expert is read once."""
    pool, slots = open_pool(file, 2, (), lambda position: pytest.fail("a prompt asks no router"))
    everything = torch.arange(EXPERTS).view(-1, 2)
    with closing(pool):
        for _ in range(2):
            before = pool.counters()
            pool.begin(100)
            for layer in range(LAYERS):
                for chunk in everything:
                    check(pool, slots, layer, chunk[None])
            after = pool.counters()
        used = after.expert_hits - before.expert_hits + after.expert_misses - before.expert_misses
        assert used == LAYERS * EXPERTS and after.expert_misses - before.expert_misses == LAYERS * (EXPERTS - 2)
        assert after.useful_guesses > 0 == after.useless_guesses


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
