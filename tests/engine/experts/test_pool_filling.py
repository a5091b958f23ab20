"""A pool begins with the experts that earlier passes used most, and tells which ones a pass used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from support.loading import load_model
from support.moe import NUM_EXPERTS, passes, save_moe

from specchat.records.plan import ExpertSlots

QUOTA = 4


def shares(favourites: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Shares of passes that used each expert: most of them the layer's favourites, few the others."""
    return tuple(tuple(0.9 if each in own else 0.01 for each in range(NUM_EXPERTS)) for own in favourites)


def test_the_most_used_experts_are_there_at_first_and_stay(tmp_path: Path):
    source = save_moe("qwen3_moe", tmp_path / "model")
    settings = {"cache_rows": 256, "dtype": torch.float32, "chunk_rows": 16, "tree_budget": 64}
    with closing(load_model(source, **settings)) as model:
        expected, num_layers = list(passes(model, (8,))), len(model.skeleton.layers)
    favourites = [[(layer + 3 * each) % NUM_EXPERTS for each in range(QUOTA)] for layer in range(num_layers)]
    slots = ExpertSlots(QUOTA, NUM_EXPERTS, shares(favourites))
    with closing(load_model(source, **settings, experts=slots)) as model:
        pool = model.streamer
        ids = torch.tensor([own[:2] for own in favourites])
        assert pool.counters().expert_misses == 0
        for layer in range(num_layers):
            pool.begin(1)
            list(pool.fetch(layer, ids[layer : layer + 1])[1])
        counters = pool.counters()
        assert (counters.expert_hits, counters.expert_misses) == (2 * num_layers, 0)
        pool.begin(1)
        list(pool.fetch(0, torch.tensor([[each for each in range(NUM_EXPERTS) if each not in favourites[0]][:4]]))[1])
        list(pool.fetch(0, torch.tensor([favourites[0]]))[1])
        assert pool.counters().expert_misses == 4, "one use drives out no expert that half of the passes used"
    with closing(load_model(source, **settings, experts=slots)) as model:
        assert all(map(torch.equal, expected, passes(model, (8,))))


def test_passes_tell_which_experts_they_used(tmp_path: Path):
    source = save_moe("qwen3_moe", tmp_path / "model")
    with closing(load_model(source, cache_rows=64, tree_budget=8, experts=ExpertSlots(2, NUM_EXPERTS))) as model:
        pool, num_layers = model.streamer, len(model.skeleton.layers)
        model.append(list(range(5, 25)))
        assert pool.experts_used() == b"", "a prompt says nothing about trees"
        before = pool.counters()
        model.append([5, 6])
        after = pool.counters()
        used = np.unpackbits(np.frombuffer(pool.experts_used(), np.uint8)).reshape(num_layers, NUM_EXPERTS)
        num_used = after.expert_hits + after.expert_misses - before.expert_hits - before.expert_misses
        assert used.sum() == num_used and (used.sum(1) >= 4).all()
    with closing(load_model(source, cache_rows=64, tree_budget=8)) as model:
        model.append([5, 6])
        assert model.streamer.experts_used() == b""
