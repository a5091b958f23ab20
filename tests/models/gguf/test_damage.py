"""Damaged metadata of GGUF files: an error in words, or a folder; never a traceback."""

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_files import save_gguf
from support.hybrids import HYBRIDS, random_hybrid
from support.tiny_models import make_config, random_model

from specchat.errors import SpecchatError
from specchat.models.checkpoint.gguf import open_gguf
from specchat.models.gguf.config import config_values, generation_values
from specchat.models.gguf.folder import model_folder
from specchat.models.gguf.tokenizer import tokenizer_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, int]:
    """A file, and the number of bytes before its first tensor."""
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    save_gguf(random_model(make_config("gemma3")), file)
    return file.read_bytes(), min(tensor.offset for tensor in open_gguf(file).tensors.values())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_ends_in_a_traceback(whole, tmp_path, data):
    content, end = bytearray(whole[0]), whole[1]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(8, end - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.gguf"
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    try:
        folder = model_folder(file)
    except SpecchatError as error:
        assert error.message
    else:
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] > 0


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma3", "phi3", "gpt_oss", "qwen3_moe", "deepseek_v3", "gemma4_moe", "lfm2_moe", "qwen3_5_moe_text"],
)
def test_no_value_ends_in_a_traceback(architecture, tmp_path):
    model = random_hybrid(architecture) if architecture in HYBRIDS else random_model(make_config(architecture))
    save_gguf(model, tmp_path / "x.gguf")
    good = open_gguf(tmp_path / "x.gguf")
    num_refused = 0
    for key in good.metadata:
        for value in (0, 1, 1 << 40, "x", [], [1, 2], ["a"], 1.5, math.nan, math.inf, 1e308, True, None):
            file = dataclasses.replace(good, metadata={**good.metadata, key: value})
            try:
                config_values(file), generation_values(file), tokenizer_files(file)
            except SpecchatError as error:
                num_refused += 1
                assert error.message
    assert num_refused > 50
