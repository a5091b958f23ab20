"""Values of config.json: no real configuration is refused, and refusals name the value at fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from support.tiny_models import ARCHITECTURES, SPECIAL, make_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from specchat.errors import CorruptCheckpointError
from specchat.models.hf import config_values
from specchat.models.hf.refusals import CANNOT_BUILD

FILE = Path("config.json")


def written(config: Any) -> dict[str, Any]:
    values = json.loads(config.to_json_string(use_diff=False))
    return values | {"model_type": config.model_type}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SPECIAL])
def test_configurations_are_those_of_transformers(architecture: str, tmp_path: Path):
    config = make_config(architecture)
    config.save_pretrained(tmp_path)
    theirs = hf.AutoConfig.from_pretrained(tmp_path)
    ours = config_values.make_config(FILE, json.loads((tmp_path / "config.json").read_text()))
    assert type(ours) is type(theirs)
    assert ours.to_dict() == theirs.to_dict() | {"_name_or_path": ""}
    assert config_values.why_not_built(ours) == CANNOT_BUILD


@pytest.mark.slow
def test_no_type_is_refused_with_its_own_defaults():
    num_types = 0
    for kind in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            values = written(hf.CONFIG_MAPPING[kind]())
        except Exception:  # noqa: BLE001  types without defaults
            continue
        config_values.make_config(FILE, values)
        num_types += 1
    assert num_types > 200


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 3.5}, r"hidden_size is 3\.5, which transformers does not accept"),
        ({"layer_types": ["round_attention"] * 4}, r'layer_types is \["round_attention", .*, which transformers'),
        ({"hidden_size": 0}, "hidden_size is 0, but must be at least 1"),
        ({"head_dim": 1 << 25}, "head_dim is 33554432, but must be at most 16,777,216"),
        ({"num_experts": 10**6}, "num_experts is 1000000, but must be at most 16,384"),
        ({"max_position_embeddings": 1 << 50}, "max_position_embeddings is 1125899906842624, but must be at most"),
    ],
)
def test_the_value_at_fault_is_named(values: dict[str, Any], words: str):
    with pytest.raises(CorruptCheckpointError, match=rf"config\.json: {words}"):
        config_values.make_config(FILE, written(make_config("qwen3_moe")) | values)


def test_sizes_of_other_parts_are_not_checked():
    others = {"vision_config": {"hidden_size": -1}, "quantization_config": {"group_size": -1}}
    values = written(make_config("llama")) | others
    config_values.make_config(FILE, values)
    with pytest.raises(CorruptCheckpointError, match="hidden_size is -1"):
        config_values.make_config(FILE, values | {"text_config": {"hidden_size": -1}})
