"""Damaged metadata of GGUF files: an error in words, or a folder; never a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_files import save_gguf
from support.tiny_models import make_config, random_model

from specchat.errors import SpecchatError
from specchat.models.checkpoint.gguf import open_gguf
from specchat.models.gguf.folder import model_folder


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
