"""States that keep paths, go back and are cancelled equal states that read the same text at once."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch
from support.recurrent import (
    SHAPES,
    Layer,
    Row,
    check_pass,
    layout_of,
    make_cache,
    make_layer,
    make_row,
    path_to,
    random_parents,
    run_layer,
)

from specchat.engine.recurrent.cache import RecurrentCache
from specchat.engine.recurrent.restore import cheapest, marks_of_prompt
from specchat.engine.tree import ROOT

KINDS = ("gdn", "conv", "kda", "mamba2", "mamba1")
Rows = list[list[Row]]  # by layer


@dataclass
class Text:
    """A text in a cache of several layers, and the rows that it consists of, by layer."""

    cache: RecurrentCache
    layers: list[Layer]
    rng: random.Random
    generator: torch.Generator
    rows: Rows = field(default_factory=list)
    chunk_rows: int = 7
    num_reread: int = 0

    @classmethod
    def of(cls, seed: int, **kwargs: int) -> Text:
        rng = random.Random(seed)
        layers = [make_layer(kind, seed) for kind in KINDS]
        cache = make_cache(KINDS, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        return cls(cache, layers, rng, generator, [[] for _ in layers], rng.choice([3, 7, 64]))

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def make(self, count: int) -> Rows:
        return [[make_row(layer.shape, self.generator) for _ in range(count)] for layer in self.layers]

    def run(self, linear: Rows, tree: Rows, parents: tuple[int, ...], num_layers: int | None = None) -> None:
        """A pass over all layers, or over the first ones before it is cancelled."""
        layout = layout_of(self.length, len(linear[0]), parents)
        self.cache.begin(layout)
        for index, layer in enumerate(self.layers[:num_layers]):
            new = linear[index] + tree[index]
            found = run_layer(self.cache.layers[index], layer, layout, new, self.chunk_rows)
            check_pass(layer, found, self.rows[index], linear[index], tree[index], parents)
        if num_layers is None:
            self.cache.end()

    def read(self, count: int) -> None:
        new = self.make(count)
        self.run(new, self.make(0), ())
        self.rows = [old + rows for old, rows in zip(self.rows, new, strict=True)]
        self.cache.keep(0, self.length, [])

    def step(self, cancel: bool = False) -> None:
        """A pass over some rows and a tree, of which a path is kept, or which is cancelled."""
        parents = random_parents(self.rng.randrange(1, 40), self.rng)
        linear, tree = self.make(self.rng.randrange(1, 5)), self.make(len(parents))
        if cancel:
            before = self.length
            self.run(linear, tree, parents, self.rng.randrange(len(self.layers)))
            assert self.cache.truncate(0, before) == before
            return
        self.run(linear, tree, parents)
        node = self.rng.randrange(ROOT, len(parents))
        path = path_to(parents, node)
        self.rows = [old + rows for old, rows in zip(self.rows, linear, strict=True)]
        self.cache.keep(0, self.length, [self.length + node for node in path])
        self.rows = [old + [rows[n] for n in path] for old, rows in zip(self.rows, tree, strict=True)]
        assert self.cache.lengths[0] == self.length

    def go_back(self, length: int) -> int:
        reached = self.cache.truncate(0, length)
        assert 0 <= reached <= length
        self.rows = [rows[:reached] for rows in self.rows]
        assert self.cache.lengths[0] == self.length
        return length - reached


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations_equals_a_fresh_run(seed: int):
    text = Text.of(seed)
    for _ in range(14):
        match text.rng.choice(["read", "step", "step", "cancel", "back", "save", "cut"]):
            case "read":
                end = text.length + text.rng.randrange(1, 30)
                text.cache.mark(0, marks_of_prompt(text.length, end, [text.rng.randrange(end)]))
                text.read(end - text.length)
            case "step":
                text.step()
            case "cancel":
                text.step(cancel=True)
            case "back":
                text.go_back(text.rng.randrange(text.length + 1))
            case "save":
                text.cache.save(0)
            case "cut":
                text.go_back(max(text.length - text.rng.randrange(4), 0))
    text.read(2)  # compares the states behind the last operation, too


def test_the_last_path_can_be_cut_anywhere():
    for cut in range(5):
        text = Text.of(3, num_points=0)
        text.read(6)
        linear, tree = text.make(2), text.make(4)
        text.run(linear, tree, (ROOT, 0, 1, 2))
        text.rows = [old + new for old, new in zip(text.rows, linear, strict=True)]
        text.cache.keep(0, 8, [8, 9, 10, 11])
        text.rows = [old + new for old, new in zip(text.rows, tree, strict=True)]
        assert text.go_back(12 - cut) == 0
        assert text.go_back(8) == 0  # and again
        text.read(3)


def test_a_cancelled_pass_goes_back_for_free_and_keeps_older_points():
    text = Text.of(1)
    text.read(5)
    text.cache.save(0)
    text.read(4)
    text.step(cancel=True)
    assert text.cache.seats[0].points.lengths == [5]
    assert text.go_back(7) == 2
    text.read(1)


def test_points_are_at_the_marks_of_the_pass_that_reads_them():
    text = Text.of(2, num_points=3)
    text.cache.mark(0, (3, 9, 30))
    text.read(12)
    assert text.cache.seats[0].points.lengths == [3, 9]
    for length, reread in ((10, 1), (4, 1), (2, 2)):
        assert text.go_back(length) == reread
        text.read(2)


def test_a_cancelled_pass_leaves_no_points():
    text = Text.of(2)
    text.read(5)
    text.cache.mark(0, (7,))
    text.run(text.make(4), text.make(0), (), num_layers=2)
    text.cache.truncate(0, 5)
    assert text.cache.seats[0].points.lengths == []
    text.read(4)


def test_points_use_their_buffers_again():
    text = Text.of(4, num_points=3)
    for _ in range(6):
        text.read(3)
        text.cache.save(0)
    held = text.cache.seats[0].points
    assert len(held.lengths) == 3 and held.lengths[-1] == 18
    assert held.nbytes == 3 * sum(layer.shape.state_bytes(4) for layer in text.layers)
    text.go_back(0)
    text.read(2)
    text.cache.save(0)
    assert held.nbytes == 3 * sum(layer.shape.state_bytes(4) for layer in text.layers)


def test_bytes_are_those_of_the_shapes():
    cache = make_cache(KINDS, tree_rows=8)
    shapes = [SHAPES[kind] for kind in KINDS]
    per_layer = sum(2 * shape.state_bytes(4) + shape.rate_bytes() + 8 * shape.stash_bytes(4) for shape in shapes)
    assert cache.nbytes == per_layer + 8 * sum(shape.update_bytes() for shape in shapes)


def test_thinned_points_stay_dense_near_the_end():
    points: list[int] = []
    for end in range(1, 4001):
        if end % 20 == 0:
            points = [*points, end]
            if len(points) > 12:
                points.remove(cheapest(points, end))
    gaps = [b - a for a, b in itertools.pairwise(points)]
    assert gaps == sorted(gaps, reverse=True) and points[-1] == 4000
    for cut in range(1, 3900):  # rows read again never exceed the distance from the end by much
        below = max((point for point in points if point <= cut), default=0)
        assert cut - below <= (4000 - cut) + 40


def test_marks_of_a_prompt_double_their_distance():
    assert marks_of_prompt(0, 5000) == (903, 2951, 3975, 4487, 4999)
    assert marks_of_prompt(4000, 5000, [4990, 17]) == (4487, 4990, 4999)
    assert marks_of_prompt(10, 11) == ()
