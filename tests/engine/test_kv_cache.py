"""The KV cache equals a plain list of rows, and a fresh prefill on real models."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.kv_cache import LayerKv, TreeCache
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.tree import ROOT, TokenTree
from specchat.records import kv_slabs
from specchat.records.kv_slabs import allocated_bytes, slabs_of
from specchat.records.limits import padded_rows
from specchat.records.model import KvShape, ModelSource
from specchat.units import MIB

CPU = torch.device("cpu")
# Layers may differ, keys from values too.
SHAPES = (KvShape(2, 3, 5), KvShape(1, 4, 1), KvShape(2, 3, 5), KvShape(1, 4, 4), KvShape(1, 4, 4))
CAPACITY = 40


def fill_row(row: int, layer: int, heads: int, dim: int, sign: int) -> torch.Tensor:
    """Return values that differ for every row, layer, head and dim: [heads, dim]."""
    return sign * (1000.0 * row + 100 * layer + torch.arange(heads * dim).view(heads, dim))


def rows_of(rows: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [1, heads, rows, dim] of the named rows."""
    shape = SHAPES[layer]
    keys = [fill_row(row, layer, shape.heads, shape.key_dim, 1) for row in rows]
    values = [fill_row(row, layer, shape.heads, shape.value_dim, -1) for row in rows]
    return torch.stack(keys, 1)[None], torch.stack(values, 1)[None]


def check_rows(cache: TreeCache, seats: list[list[int]]) -> None:
    assert cache.lengths == [len(rows) for rows in seats]
    for layer, kv in enumerate(cache.layers):
        assert kv.lengths == cache.lengths
        for seat, rows in enumerate(seats):
            if rows:
                keys, values = rows_of(rows, layer)
                begin = seat * cache.capacity
                assert torch.equal(kv.keys[:, :, begin : begin + len(rows)], keys)
                assert torch.equal(kv.values[:, :, begin : begin + len(rows)], values)
        # what lies behind takes part in products with weight 0
        assert torch.isfinite(kv.keys).all() and torch.isfinite(kv.values).all()


def shared_up_to(num_bytes: int) -> AbstractContextManager[Any]:
    """A scope in which layers share buffers of a CPU up to a size, as those of a GPU do."""
    return mock.patch.dict(kv_slabs._MOST_SHARED_BYTES, cpu=num_bytes)


@given(
    data=st.data(),
    num_seats=st.integers(1, 3),
    operations=st.lists(st.sampled_from(["append", "path", "rows", "truncate", "wipe", "resize"]), max_size=25),
    shared_bytes=st.sampled_from([0, 16000, 1 << 20]),
)
@settings(deadline=None, max_examples=100)
def test_each_seat_is_a_list_of_rows(data: st.DataObject, num_seats: int, operations: list[str], shared_bytes: int):
    with shared_up_to(shared_bytes):
        cache = TreeCache(SHAPES, CAPACITY, torch.float32, CPU, num_seats)
    num_buffers = len({kv.keys.untyped_storage().data_ptr() for kv in cache.layers})
    assert shared_bytes or num_buffers == len(SHAPES)
    assert shared_bytes < 1 << 20 or num_buffers == 3
    buffers = [kv.keys.data_ptr() for kv in cache.layers]
    nbytes, seats, num_made = cache.nbytes, [list[int]() for _ in range(num_seats)], 0
    grows = "resize" in operations
    for operation in operations:
        seat = data.draw(st.integers(0, num_seats - 1))
        held = seats[seat]
        if operation == "append":
            new = {}
            for each in data.draw(st.permutations(range(num_seats))):
                count = data.draw(st.integers(0, cache.capacity - len(seats[each])))
                new[each] = list(range(num_made, num_made + count))
                num_made += count
            append(cache, new, data.draw(st.integers(1, 50)))
            for each, rows in new.items():
                seats[each] += rows
        elif operation in ("truncate", "wipe"):
            del held[data.draw(st.integers(0, len(held))) :]
            cache.truncate(seat, len(held)) if operation == "truncate" else cache.wipe(seat, len(held))
            if operation == "wipe":
                rows = slice(seat * cache.capacity + len(held), (seat + 1) * cache.capacity)
                assert not any(each[:, :, rows].any() for kv in cache.layers for each in (kv.keys, kv.values))
        elif operation == "resize":
            capacity = data.draw(st.integers(max(map(len, seats)), 2 * CAPACITY))
            with shared_up_to(shared_bytes):
                cache.resize(capacity)
            assert cache.nbytes * padded_rows(CAPACITY) == nbytes * padded_rows(capacity)
        else:
            base = data.draw(st.integers(0, len(held)))
            behind = list(range(base, len(held)))
            rows = data.draw(st.lists(st.sampled_from(behind), unique=True)) if behind else []
            if operation == "path":  # as trees give it: ascending
                rows.sort()
            cache.keep(seat, base, rows)
            seats[seat] = held[:base] + [held[row] for row in rows]
        check_rows(cache, seats)
    assert grows or (cache.nbytes == nbytes and buffers == [kv.keys.data_ptr() for kv in cache.layers])


def append(cache: TreeCache, new: dict[int, list[int]], chunk_rows: int = 50) -> None:
    """Append rows to seats in chunks that may end within a seat's rows, as a pass does, layer by layer."""
    parts = {seat: rows for seat, rows in new.items() if rows}
    if not parts:
        return
    lengths, flat = cache.lengths, [row for rows in parts.values() for row in rows]
    for layer, kv in enumerate(cache.layers):
        layout = PassLayout((seat, linear_layout(lengths[seat], len(rows), CPU)) for seat, rows in parts.items())
        for begin in range(0, len(flat), chunk_rows):
            end = min(begin + chunk_rows, len(flat))
            layout.select(begin, end)
            keys, values = kv.append(layout, *rows_of(flat[begin:end], layer))
            lowest, highest = min(parts), max(parts)
            assert keys.shape[2] == (highest - lowest) * cache.capacity + padded_rows(kv.lengths[highest])
            assert keys.shape[2] == values.shape[2]
            assert torch.equal(keys, kv.keys[:, :, lowest * cache.capacity :][:, :, : keys.shape[2]])
            assert keys.untyped_storage().data_ptr() == kv.keys.untyped_storage().data_ptr()


def test_cache_bytes_are_the_sum_of_padded_rows():
    assert [padded_rows(n) for n in (0, 1, 15, 16, 17)] == [0, 16, 16, 16, 32]
    for seats in (1, 3):
        cache = TreeCache(SHAPES, 17, torch.float16, CPU, seats)
        assert cache.capacity == 32
        assert cache.nbytes == seats * 32 * 2 * sum(shape.numbers_per_row for shape in SHAPES)
        with pytest.raises(AssertionError):
            append(cache, {0: list(range(33))})


def test_buffers_of_a_gpu_are_shared_and_rounded():
    shapes = (*(KvShape(8, 128, 128),) * 40, KvShape(0, 128, 128), *(KvShape(1, 576, 512),) * 3)
    rows, layer_bytes = 8208, 8208 * 8 * 256 * 2  # 32.1 MiB, so three of them in a buffer
    slabs = slabs_of(shapes, rows, 2, "cuda")
    assert sorted(index for slab in slabs for index in slab) == list(range(len(shapes)))
    assert [len(slab) for slab in slabs] == [*[3] * 13, 1, 1, 3]
    assert slabs_of(shapes, rows, 2, "cpu") == [[index] for index in range(len(shapes))]
    rest = 3 * rows * (576 + 512) * 2
    assert allocated_bytes(shapes, rows, 2, "cpu") == 40 * layer_bytes + rest
    rounded = allocated_bytes(shapes, rows, 2, "cuda")
    assert rounded == (13 * 98 + 34 + 28 + 26) * MIB and rounded > 40 * layer_bytes + rest


def test_truncate_drops_rows_of_a_cancelled_pass():
    """A cancelled pass leaves more rows in the first layers than in the others."""
    cache = TreeCache(SHAPES, CAPACITY, torch.float32, CPU, 2)
    append(cache, {0: [0, 1, 2], 1: [3]})
    layout = PassLayout([(0, linear_layout(3, 2, CPU)), (1, linear_layout(1, 1, CPU))])
    layout.select(0, 3)
    cache.layers[0].append(layout, *rows_of([4, 5, 6], 0))
    assert [cache.truncate(0, 3), cache.truncate(1, 1)] == [3, 1]
    check_rows(cache, [[0, 1, 2], [3]])


def test_all_layers_go_back_to_a_length_that_each_one_reaches():
    """Layers with snapshots of a state go back to a snapshot before the given length."""
    cache = TreeCache(SHAPES, CAPACITY, torch.float32, CPU, 2)
    append(cache, {0: list(range(20)), 1: [90, 91]})
    cache.layers += [Snapshots(0, 6, 10), Snapshots(0, 6, 12)]
    assert cache.truncate(0, 17) == 6
    del cache.layers[-2:]
    check_rows(cache, [list(range(6)), [90, 91]])


class Snapshots(LayerKv):
    """A layer's cache that only goes back to some lengths."""

    def __init__(self, *lengths: int) -> None:
        super().__init__(2)
        self._reachable = lengths

    def truncate(self, seat: int, length: int) -> int:
        return super().truncate(seat, max(each for each in self._reachable if each <= length))


# --- on real models --------------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "mistral", "gemma3")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    model = random_model(make_config(request.param))
    return save(model, tmp_path_factory.mktemp("kept") / request.param)


def load(source: ModelSource) -> TreeModel:
    return load_model(
        source, dtype=torch.float32, device=CPU, resident=None, num_slots=0, cache_rows=160, chunk_rows=512
    )


def random_tree(rng: random.Random, num_nodes: int) -> TokenTree:
    parents = [rng.randint(max(ROOT, node - 6), node - 1) for node in range(num_nodes)]  # deep rather than wide
    return TokenTree(tuple(rng.randint(3, VOCAB - 1) for _ in parents), tuple(parents))


def random_path(rng: random.Random, tree: TokenTree) -> list[int]:
    node, path = rng.randint(ROOT, len(tree) - 1), []
    while node != ROOT:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]


def forward_tree(model: TreeModel, pending: list[int], tree: TokenTree) -> None:
    (begin,) = model.cache.lengths
    root = begin + len(pending) - 1
    positions = [*range(begin, begin + len(pending)), *(root + depth for depth in tree.depths)]
    layout = RowLayout(begin, len(pending), tree.ancestors, torch.tensor(positions))
    model.forward([*pending, *tree.tokens], PassLayout.single(layout))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Float32 rounding differs with the batch shape; a wrong or misplaced row is off by about 1."""
    return torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)), rtol=0)


def check_like_fresh(model: TreeModel, tokens: list[int], source: ModelSource, rng: random.Random) -> None:
    """Check that every layer's rows and the next scores equal those of one plain prefill."""
    fresh = load(source)
    fresh.append(tokens)
    assert model.cache.lengths == [len(tokens)]
    for ours, theirs in zip(model.cache.layers, fresh.cache.layers, strict=True):
        for name in ("keys", "values"):
            rows: Any = [getattr(kv, name)[:, :, : len(tokens)] for kv in (ours, theirs)]
            assert close(*rows), name
    following = [rng.randint(3, VOCAB - 1) for _ in range(3)]
    ours, theirs = (each.logits(each.append(following)) for each in (model, fresh))
    assert close(ours, theirs)
    model.cache.truncate(0, len(tokens))


def test_cache_after_keep_equals_a_fresh_prefill(source: ModelSource):
    """Keep several trees longer than the window, with truncations in between."""
    model, tokens = load(source), []
    rng = random.Random(4)
    for step in range(5):
        pending = random_prompt(9 if step == 0 else 1 + step % 3, VOCAB, seed=step)
        tree = random_tree(rng, 25)
        forward_tree(model, pending, tree)
        first = len(tokens) + len(pending)
        path = random_path(rng, tree)
        model.cache.keep(0, first, [first + node for node in path])
        tokens = tokens + pending + [tree.tokens[node] for node in path]
        check_like_fresh(model, tokens, source, rng)
        if step == 2:
            tokens = tokens[: len(tokens) - 4]
            model.cache.truncate(0, len(tokens))
            check_like_fresh(model, tokens, source, rng)
    assert len(tokens) > 20
