"""Experts of pre-quantized checkpoints and GGUF files pass through a pool with the bits of whole layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp4 import mxfp4, nvfp4
from support.gguf_files import save_gguf
from support.loading import load_model, prepare
from support.moe import NUM_EXPERTS, make_moe_config, passes
from support.quantized import USUAL, awq, block_fp8, bnb4, compressed, gptq, save_quantized
from support.streamed import silent, tiny_packs
from support.tiny_models import random_model

from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import read_bytes
from specchat.models.weights.experts import ExpertLayout, expert_extents, pooled_experts
from specchat.models.weights.open import open_weights
from specchat.records.model import ModelSource
from specchat.records.plan import ExpertSlots

SLOTS = ExpertSlots(quota=3, shared=NUM_EXPERTS)
KINDS: dict[str, Callable[[], Any]] = {
    "gptq": gptq,
    "awq": awq,
    "nf4": lambda: bnb4(dtype=torch.float32),
    "fp8": lambda: block_fp8((32, 32)),
    "compressed": lambda: compressed("pack-quantized", group=32, sym=False),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
}


def check(source: ModelSource, *, is_packed: bool) -> None:
    """Compare passes over whole layers with passes that read single experts, and the sizes that are planned for."""
    pack = prepare(source, "fp32", progress=silent, warn=silent, by_experts=True)
    assert (pack is not None) == is_packed
    settings = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 33, "pack": pack}
    with closing(load_model(source, **settings)) as model:
        expected = list(passes(model, (8, 33)))
    with closing(load_model(source, **settings, experts=SLOTS)) as model:
        found, counters = list(passes(model, (8, 33))), model.streamer.counters()
    assert all(map(torch.equal, expected, found))
    spec = describe(source)
    assert spec.experts is not None
    num_read = counters.expert_misses + counters.useless_guesses
    assert counters.num_bytes == num_read * read_bytes(spec.experts, "fp32") > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", ["Q8_0", "Q4_0"])
def test_gguf_stacks_are_read_as_they_lie(tmp_path: Path, block: str):
    model = random_model(make_moe_config("qwen3_moe"))
    with tiny_packs(tmp_path):
        check(save_gguf(model, tmp_path / "model.gguf", block), is_packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts_share_slots(tmp_path: Path, kind: str, architecture: str):
    pair = save_quantized(random_model(make_moe_config(architecture)), tmp_path, KINDS[kind](), skip=USUAL)
    with tiny_packs(tmp_path), open_weights(pair.quantized, "fp32", "none") as weights:
        layers = pooled_experts(weights.skeleton)
        is_packed = expert_extents(weights.reader, layers[0], ExpertLayout.of(layers[0])) is None
        check(pair.quantized, is_packed=is_packed)


def test_a_pack_of_a_gguf_holds_what_the_file_holds(tmp_path: Path):
    """Rows of gate and up alternate in gpt-oss, so its experts are packed; its embeddings are in blocks."""
    source = save_gguf(random_model(make_moe_config("gpt_oss")), tmp_path / "model.gguf", "Q8_0")
    settings = {"cache_rows": 64, "chunk_rows": 16}
    with tiny_packs(tmp_path):
        pack = prepare(source, "fp32", progress=silent, warn=silent, by_experts=True)
        assert pack is not None
        with closing(load_model(source, **settings)) as model:
            expected = list(passes(model, (8,)))
        with closing(load_model(source, **settings, pack=pack, experts=SLOTS)) as model:
            assert all(map(torch.equal, expected, passes(model, (8,))))
