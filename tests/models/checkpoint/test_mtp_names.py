"""MTP layers are found by their tensors, in both layouts; a count in config.json alone is no head."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.mtp import find_mtp, layer_names, qwen_name
from specchat.models.checkpoint.safetensors import INDEX_FILE, MTP_FILE, open_checkpoint
from specchat.models.checkpoint.text_parts import shards_beside_text
from specchat.models.sizes.cache import key_of
from specchat.records.model import ModelSource

QWEN = (
    "mtp.fc.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.norm.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "mtp.layers.0.input_layernorm.weight",
)
NUMBERED = (
    "model.layers.4.eh_proj.weight",
    "model.layers.4.enorm.weight",
    "model.layers.4.hnorm.weight",
    "model.layers.4.shared_head.norm.weight",
    "model.layers.4.shared_head.head.weight",
    "model.layers.4.embed_tokens.weight",
    "model.layers.4.self_attn.q_proj.weight",
    "model.layers.4.input_layernorm.weight",
)
OTHERS = ("model.layers.3.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight")
INNER = {
    *("eh_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight"),
    *("self_attn.q_proj.weight", "input_layernorm.weight"),
}
# DSpark's drafter in DeepSeek-V4's files: the same count in config.json, other tensors (vllm, issue 41834).
DSPARK = ("mtp.0.attn.q_proj.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.norm.weight")


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
@pytest.mark.parametrize("keys", [QWEN, NUMBERED], ids=["qwen", "numbered"])
def test_both_layouts_have_the_same_names_inside(keys: tuple[str, ...], prefix: str):
    (found,) = layer_names([*OTHERS, *(prefix + key for key in keys)], 4)
    assert set(found.values()) == INNER
    assert not any("shared_head.head" in key or key in OTHERS for key in found)


@pytest.mark.parametrize(
    ("keys", "first", "second"), [(QWEN, "layers.0", "layers.1"), (NUMBERED, "layers.4", "layers.5")]
)
def test_several_layers_are_found_in_order(keys: tuple[str, ...], first: str, second: str):
    """As far as they are complete and alike; Qwen's share what is outside the layers."""
    more = [key.replace(first, second) for key in keys if first in key]
    alone, both = (layer_names([*OTHERS, *each, *keys], 4) for each in ((), more))
    assert [set(names.values()) for names in both] == [INNER, INNER] and both[:1] == alone
    assert all((second in key) != (first in key) or key in alone[0] for names in both for key in names)
    assert layer_names([*OTHERS, *more[1:], *keys], 4) == alone
    assert layer_names([*OTHERS, *more, f"{more[0]}_scale", *keys], 4) == alone


def test_a_layer_within_a_block_of_its_own_is_found():
    """As in Step 3.7."""
    keys = [re.sub(r"(self_attn|input_layernorm)", r"transformer_block.\1", key) for key in NUMBERED]
    (found,) = layer_names([*OTHERS, *keys], 4)
    assert set(found.values()) == INNER


@pytest.mark.parametrize(
    "keys",
    [
        OTHERS,
        DSPARK,
        QWEN[1:],  # no projection
        [key for key in NUMBERED if "shared_head.norm" not in key],
        [key.replace(".4.", ".5.") for key in NUMBERED],  # of a larger model
    ],
    ids=["none", "DSpark", "no projection", "no norm", "another layer"],
)
def test_other_tensors_are_no_head(keys: tuple[str, ...]):
    assert layer_names(keys, 4) == ()


def test_the_written_layout_is_read_back():
    (found,) = layer_names([qwen_name(name) for name in INNER], 0)
    assert {qwen_name(name): name for name in INNER} == dict(found)


def model_folder(
    folder: Path, config: dict[str, object], keys: tuple[str, ...], file: str = "model.safetensors"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 4, **config}))
    save_file({key: torch.zeros(1) for key in keys}, folder / file)
    return folder


@pytest.mark.parametrize(
    ("config", "keys", "found"),
    [
        ({"num_nextn_predict_layers": 1}, NUMBERED, True),
        ({"text_config": {"mtp_num_hidden_layers": 1, "num_hidden_layers": 4}}, QWEN, True),
        ({"model_type": "qwen3_next"}, QWEN, True),  # whose config.json may leave the count out
        ({"num_nextn_predict_layers": 1}, DSPARK, False),
        ({"num_nextn_predict_layers": 1}, OTHERS, False),  # a quantized copy without the layer
        ({"num_nextn_predict_layers": 0}, NUMBERED, False),
        ({}, NUMBERED, False),
    ],
)
def test_config_and_tensors_decide_together(
    tmp_path: Path, config: dict[str, object], keys: tuple[str, ...], found: bool
):
    assert (find_mtp(model_folder(tmp_path / "model", config, (*OTHERS, *keys))) is not None) == found


def test_a_shard_of_its_own_is_read_for_the_head_alone(tmp_path: Path):
    """As published: an index that names a shard with nothing but the head, which an older download lacks."""
    folder = model_folder(tmp_path, {"mtp_num_hidden_layers": 1}, OTHERS, "a.safetensors")
    model_folder(tmp_path, {"mtp_num_hidden_layers": 1}, QWEN, "b.safetensors")
    weight_map = dict.fromkeys(OTHERS, "a.safetensors") | dict.fromkeys(QWEN, "b.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(folder).tensors) == set(OTHERS)
    part = find_mtp(folder)
    assert part is not None and set(part.names) == set(QWEN)
    assert shards_beside_text(weight_map, with_head=True) == frozenset()
    (folder / "b.safetensors").unlink()
    assert find_mtp(folder) is None


def test_a_damaged_file_of_a_head_does_not_keep_the_model_from_running(tmp_path: Path):
    folder = model_folder(tmp_path, {}, OTHERS, "weights.safetensors")
    (folder / MTP_FILE).write_bytes(b"damaged")
    assert set(open_checkpoint(folder).tensors) == set(OTHERS)
    with pytest.raises(CorruptCheckpointError, match=MTP_FILE):
        find_mtp(folder)


def test_a_new_head_is_described_anew(tmp_path: Path):
    target = ModelSource("target", model_folder(tmp_path, {}, OTHERS))
    keys = set()
    for head in (QWEN, QWEN[:-1]):
        model_folder(tmp_path, {}, head, MTP_FILE)
        keys.add(key_of(replace(target, name="mtp", part="mtp"), "none"))
    assert len(keys) == 2


def test_a_file_beside_the_model_comes_first(tmp_path: Path):
    folder = model_folder(tmp_path, {"num_nextn_predict_layers": 1}, (*OTHERS, *NUMBERED))
    model_folder(tmp_path, {"num_nextn_predict_layers": 1}, QWEN, MTP_FILE)
    part = find_mtp(folder)
    assert part is not None and all(info.file.name == MTP_FILE for info in part.checkpoint.tensors.values())
    assert not part.has_experts
