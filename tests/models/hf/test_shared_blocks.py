"""Blocks that several layers share are read once, under any of the names by which checkpoints store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hybrids import random_hybrid
from support.tiny_models import save

from specchat.errors import CorruptCheckpointError
from specchat.models.weights.open import open_weights
from specchat.records.model import ModelSource

FIRST, LAST = "layers.1.shared_transformer.", "layers.4.shared_transformer."
BLOCK = "model.shared_blocks.0."


@pytest.fixture(scope="module")
def model() -> Any:
    return random_hybrid("zamba2")


@pytest.fixture
def source(model: Any, tmp_path: Path) -> ModelSource:
    return save(model, tmp_path / "zamba2")


def read_outside(source: ModelSource) -> dict[str, torch.Tensor]:
    """Return the parameters outside the layers."""
    with open_weights(source, "fp32", "none") as weights:
        weights.reader.read_rest(torch.device("cpu"))
        return {name: p for name, p in weights.skeleton.model.named_parameters() if not p.is_meta}


def stored_as(source: ModelSource, *names: str) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors, with those of the shared block once under each name."""
    stored = load_file(source.path / "model.safetensors")
    block = {key: stored.pop(key) for key in list(stored) if FIRST in key}
    return stored | {key.replace(FIRST, name): tensor.clone() for name in names for key, tensor in block.items()}


@pytest.mark.parametrize("names", [(FIRST,), (LAST,), (FIRST, LAST)], ids=["first", "last", "both"])
def test_a_block_is_read_under_the_name_of_any_layer(model: Any, source: ModelSource, names: tuple[str, ...]):
    save_file(stored_as(source, *names), source.path / "model.safetensors")
    found = read_outside(source)
    block = dict(model.model.layers[1].shared_transformer.named_parameters())
    assert {name for name in found if name.startswith(BLOCK)} == {f"{BLOCK}{name}" for name in block}
    assert all(torch.equal(found[f"{BLOCK}{name}"], parameter) for name, parameter in block.items())


def test_a_missing_tensor_of_a_block_is_named(source: ModelSource):
    tensors = stored_as(source, FIRST)
    del tensors[f"model.{FIRST}self_attn.q_proj.weight"]
    save_file(tensors, source.path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"shared_blocks\.0\.self_attn\.q_proj\.weight' is missing"):
        read_outside(source)


def test_copies_of_a_block_that_differ_are_refused(source: ModelSource):
    tensors = stored_as(source, FIRST, LAST)
    tensors[f"model.{LAST}self_attn.q_proj.weight"] += 1
    save_file(tensors, source.path / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="differ, but both layers share one block"):
        read_outside(source)
