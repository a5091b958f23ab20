"""The KV cache equals a plain list of rows, and a fresh prefill on real models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.attention import RowLayout
from specchat.engine.kv_cache import TreeCache
from specchat.engine.model import TreeModel
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.limits import padded_rows
from specchat.records.model import KvShape, ModelSource

CPU = torch.device("cpu")
SHAPES = (KvShape(2, 3, 5), KvShape(1, 4, 1))  # layers may differ, keys from values too
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


def check_rows(cache: TreeCache, rows: list[int]) -> None:
    assert cache.length == len(rows)
    for layer, kv in enumerate(cache.layers):
        assert kv.length == len(rows)
        if rows:
            keys, values = rows_of(rows, layer)
            assert torch.equal(kv.keys[:, :, : len(rows)], keys)
            assert torch.equal(kv.values[:, :, : len(rows)], values)
        # what lies behind takes part in products with weight 0
        assert torch.isfinite(kv.keys).all() and torch.isfinite(kv.values).all()


@given(data=st.data(), operations=st.lists(st.sampled_from(["append", "path", "rows", "truncate"]), max_size=25))
@settings(deadline=None, max_examples=100)
def test_cache_is_a_list_of_rows(data: st.DataObject, operations: list[str]):
    cache = TreeCache(SHAPES, CAPACITY, torch.float32, CPU)
    buffers = [kv.keys.data_ptr() for kv in cache.layers]
    nbytes, held, num_made = cache.nbytes, list[int](), 0
    for operation in operations:
        if operation == "append":
            count = data.draw(st.integers(0, cache.capacity - len(held)))
            new = list(range(num_made, num_made + count))
            num_made, held = num_made + count, held + new
            if new:
                append(cache, new, len(held))
        elif operation == "truncate":
            held = held[: data.draw(st.integers(0, len(held)))]
            cache.truncate(len(held))
        else:
            base = data.draw(st.integers(0, len(held)))
            behind = list(range(base, len(held)))
            rows = data.draw(st.lists(st.sampled_from(behind), unique=True)) if behind else []
            if operation == "path":  # as trees give it: ascending
                rows.sort()
            cache.keep(base, rows)
            held = held[:base] + [held[row] for row in rows]
        check_rows(cache, held)
    assert cache.nbytes == nbytes and buffers == [kv.keys.data_ptr() for kv in cache.layers]


def append(cache: TreeCache, new: list[int], length: int) -> None:
    for layer, kv in enumerate(cache.layers):
        keys, values = kv.append(*rows_of(new, layer))
        assert keys.shape[2] == values.shape[2] == padded_rows(length)
        assert keys.data_ptr() == kv.keys.data_ptr() and values.data_ptr() == kv.values.data_ptr()


def test_cache_bytes_are_the_sum_of_padded_rows():
    assert [padded_rows(n) for n in (0, 1, 15, 16, 17)] == [0, 16, 16, 16, 32]
    cache = TreeCache(SHAPES, 17, torch.float16, CPU)
    assert cache.capacity == 32
    assert cache.nbytes == 32 * 2 * sum(shape.numbers_per_row for shape in SHAPES)
    with pytest.raises(AssertionError):
        append(cache, list(range(33)), 33)


def test_truncate_drops_rows_of_a_cancelled_pass():
    """A cancelled pass leaves more rows in the first layers than in the others."""
    cache = TreeCache(SHAPES, CAPACITY, torch.float32, CPU)
    append(cache, [0, 1, 2], 3)
    cache.layers[0].append(*rows_of([3, 4], 0))
    cache.truncate(3)
    check_rows(cache, [0, 1, 2])


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
    begin = model.cache.length
    root = begin + len(pending) - 1
    positions = [*range(begin, begin + len(pending)), *(root + depth for depth in tree.depths)]
    layout = RowLayout(begin, len(pending), tree.ancestors, torch.tensor(positions))
    model.forward([*pending, *tree.tokens], layout)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Float32 rounding differs with the batch shape; a wrong or misplaced row is off by about 1."""
    return torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)), rtol=0)


def check_like_fresh(model: TreeModel, tokens: list[int], source: ModelSource, rng: random.Random) -> None:
    """Check that every layer's rows and the next scores equal those of one plain prefill."""
    fresh = load(source)
    fresh.append(tokens)
    assert model.cache.length == len(tokens)
    for ours, theirs in zip(model.cache.layers, fresh.cache.layers, strict=True):
        for name in ("keys", "values"):
            rows: Any = [getattr(kv, name)[:, :, : len(tokens)] for kv in (ours, theirs)]
            assert close(*rows), name
    following = [rng.randint(3, VOCAB - 1) for _ in range(3)]
    ours, theirs = (each.logits(each.append(following)) for each in (model, fresh))
    assert close(ours, theirs)
    model.cache.truncate(len(tokens))


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
        model.cache.keep(first, [first + node for node in path])
        tokens = tokens + pending + [tree.tokens[node] for node in path]
        check_like_fresh(model, tokens, source, rng)
        if step == 2:
            tokens = tokens[: len(tokens) - 4]
            model.cache.truncate(len(tokens))
            check_like_fresh(model, tokens, source, rng)
    assert len(tokens) > 20
