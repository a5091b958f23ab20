"""Experts that pass through a pool give the bits of experts that are all resident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load_model
from support.moe import ARCHITECTURES, NUM_EXPERTS, passes, save_moe

from specchat.records.model import ModelSource
from specchat.records.plan import ExpertSlots

CHUNK_ROWS, TREE = 16, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Models:
    """Tiny checkpoints, and what their passes compute with all experts resident; made on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str], tuple[ModelSource, list[torch.Tensor]]] = {}

    def get(self, architecture: str, dtype: str) -> tuple[ModelSource, list[torch.Tensor]]:
        if (architecture, dtype) not in self._made:
            source = save_moe(architecture, self._root / f"{architecture}-{dtype}", DTYPES[dtype])
            self._made[architecture, dtype] = source, self.run(source, dtype)[0]
        return self._made[architecture, dtype]

    @staticmethod
    def run(source: ModelSource, dtype: str, **settings: Any) -> tuple[list[torch.Tensor], Any]:
        """Return the hidden states of all passes, and the streamer."""
        given = {"cache_rows": 256, "dtype": DTYPES[dtype], "chunk_rows": CHUNK_ROWS, "tree_budget": TREE}
        with closing(load_model(source, **given, **settings)) as model:
            return list(passes(model)), model.streamer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    yield Models(tmp_path_factory.mktemp("experts"))


def check(models: Models, architecture: str, dtype: str, slots: ExpertSlots, **settings: Any) -> None:
    source, expected = models.get(architecture, dtype)
    found, pool = models.run(source, dtype, experts=slots, **settings)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    counters = pool.counters()
    assert counters.expert_misses and counters.num_bytes


QUICK = [("gpt_oss", "fp32"), ("deepseek_v3", "bf16"), ("gemma4_moe", "bf16")]


@pytest.mark.parametrize(("architecture", "dtype"), QUICK)
def test_passes_have_the_same_bits(models: Models, architecture: str, dtype: str):
    check(models, architecture, dtype, ExpertSlots(quota=4, shared=NUM_EXPERTS))


@pytest.mark.slow
@pytest.mark.parametrize("in_ram", [(), (0, 1, 2, 3, 4, 5)], ids=["disk", "page-cache"])
@pytest.mark.parametrize("quota", [0, 1, 6, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_have_the_same_bits_in_every_pool(
    models: Models, architecture: str, dtype: str, quota: int, in_ram: tuple[int, ...]
):
    check(models, architecture, dtype, ExpertSlots(quota, NUM_EXPERTS), in_ram=in_ram)
