"""Tensors and files that text needs no part of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.safetensors import INDEX_FILE, open_checkpoint, weight_files
from specchat.models.checkpoint.text_parts import is_beside_text, shards_beside_text


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("visual.blocks.0.attn.qkv.weight", True),
        ("model.visual.merger.mlp.0.weight", True),
        ("vision_tower.vision_model.encoder.layers.0.layer_norm1.bias", True),
        ("model.embed_audio.embedding_projection.weight", True),
        ("mtp.layers.0.self_attn.q_proj.weight", True),
        ("model.language_model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.0.self_attn.visual.weight", False),  # a language model may call its own parts so
        ("lm_head.weight", False),
        ("somebody.knows.weight", False),
    ],
)
def test_names(key: str, beside: bool):
    assert is_beside_text(key) is beside


def test_only_whole_files_are_left_out():
    weight_map = {"visual.a": "1", "mtp.b": "1", "visual.c": "2", "lm_head.weight": "2", "model.norm.weight": "3"}
    assert shards_beside_text(weight_map) == {"1"}


def test_a_missing_file_of_images_does_not_matter(tmp_path: Path):
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "visual.x": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["model.norm.weight"]
    assert [file.name for file in weight_files(tmp_path)] == ["model-00001-of-00002.safetensors"]
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        open_checkpoint(tmp_path)
