"""What crosses with experts that pass through a pool: precisions and quantization, sizes of pools, what fills them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.loading import load_model, prepare
from support.moe import ARCHITECTURES, NUM_EXPERTS, make_moe_config, passes
from support.streamed import silent, tiny_packs
from support.tiny_models import random_model, save

from specchat.models.sizes.describe import describe
from specchat.records.plan import ExpertSlots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TREES = (1, 8, 64)


def pools(num_layers: int) -> list[ExpertSlots]:
    """Pools of one to four times the experts of a layer: empty ones, and one that is filled with any experts."""
    most = 3 * NUM_EXPERTS // num_layers
    any_uses = tuple(
        tuple((7 * expert + layer) % NUM_EXPERTS / NUM_EXPERTS for expert in range(NUM_EXPERTS))
        for layer in range(num_layers)
    )
    return [
        ExpertSlots(0, NUM_EXPERTS),
        ExpertSlots(1, NUM_EXPERTS),
        ExpertSlots(most // 2, NUM_EXPERTS, any_uses),
        ExpertSlots(most, NUM_EXPERTS),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pool_gives_the_bits_of_whole_layers(architecture: str, dtype: str, quant: str, tmp_path: Path):
    source = save(random_model(make_moe_config(architecture)).to(DTYPES[dtype]), tmp_path / "model")
    settings = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64, "dtype": DTYPES[dtype], "quant": quant}
    spec = describe(source)
    assert spec.experts is not None
    with tiny_packs(tmp_path):
        settings["pack"] = prepare(source, dtype, quant, progress=silent, warn=silent, by_experts=True)
        with closing(load_model(source, **settings)) as model:
            expected = list(passes(model, TREES))
        for slots in pools(len(spec.experts.layers)):
            with closing(load_model(source, **settings, experts=slots)) as model:
                found, counters = list(passes(model, TREES)), model.streamer.counters()
            assert all(map(torch.equal, expected, found)), slots
            assert counters.expert_misses
