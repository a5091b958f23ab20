"""Scans over trees equal the recurrence itself, one row at a time along its path."""

from __future__ import annotations

import random

import pytest
import torch
from support.recurrent import (
    SHAPES,
    check_pass,
    layout_of,
    make_cache,
    make_layer,
    make_row,
    random_parents,
    run_layer,
)

KINDS = tuple(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_one_pass_over_prompt_and_tree(kind: str, seed: int):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer = make_layer(kind, seed)
    num_linear, num_nodes = rng.randrange(1, 90), rng.choice([0, 1, 7, 40, 150])
    cache = make_cache([kind], tree_rows=num_nodes)
    parents = random_parents(num_nodes, rng)
    rows = [make_row(layer.shape, generator) for _ in range(num_linear + num_nodes)]
    layout = layout_of(0, num_linear, parents)
    cache.begin(layout)
    found = run_layer(cache.layers[0], layer, layout, rows, chunk_rows=rng.choice([1, 7, 16, 1000]))
    check_pass(layer, found, [], rows[:num_linear], rows[num_linear:], parents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_tree_that_grows_over_passes(kind: str, seed: int):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer = make_layer(kind, seed)
    cache = make_cache([kind, kind], grows=True)  # another layer of the same shape runs in between
    parents = random_parents(40, rng)
    prompt = [make_row(layer.shape, generator) for _ in range(9)]
    tree = [make_row(layer.shape, generator) for _ in parents]
    layout = layout_of(0, len(prompt), ())
    cache.begin(layout)
    for state in cache.layers:
        run_layer(state, layer, layout, prompt, chunk_rows=4)
    grown = 0
    while grown < len(tree):
        new = min(rng.randrange(1, 12), len(tree) - grown)
        layout = layout_of(len(prompt), 0, parents[: grown + new], num_earlier=grown)
        cache.begin(layout)
        other = [make_row(layer.shape, generator) for _ in range(new)]
        found = run_layer(cache.layers[0], layer, layout, tree[grown : grown + new], chunk_rows=5)
        run_layer(cache.layers[1], layer, layout, other, chunk_rows=5)
        grown += new
        check_pass(layer, found, prompt, [], tree[:grown], parents[:grown])


@pytest.mark.parametrize("kind", ["gdn", "kda", "mamba2"])
def test_repeated_keys_and_extreme_decays_stay_exact(kind: str):
    generator = torch.Generator().manual_seed(0)
    layer = make_layer(kind, 0)
    rows = [make_row(layer.shape, generator) for _ in range(100)]
    for index, row in enumerate(rows):
        row.k.copy_(rows[0].k)  # the inverse of the system grows with every repetition
        row.g.fill_(-200.0 if index % 9 == 0 else -1e-6)
    parents = random_parents(60, random.Random(1))
    cache = make_cache([kind], tree_rows=60)
    layout = layout_of(0, 40, parents)
    cache.begin(layout)
    found = run_layer(cache.layers[0], layer, layout, rows, chunk_rows=1000)
    check_pass(layer, found, [], rows[:40], rows[40:], parents)
