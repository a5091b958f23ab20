"""Random bytes and values for everything that is read from files, arguments and requests: only named errors come out.

TEST_EXAMPLES sets the number of examples of each property, and hypothesis keeps those that fail.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faults.saved import ANSWERED, OPENED

from specchat.chat import transcript
from specchat.chat.assignments import parse_assignment
from specchat.chat.settings import parse_value
from specchat.cli.settings import RUN_KEYS, config_file, resolve
from specchat.errors import SpecchatError
from specchat.masking import masked
from specchat.models.catalog.ref import parse_model
from specchat.models.catalog.shape import parse_shape
from specchat.models.checkpoint.generation_config import load_generation_defaults
from specchat.models.checkpoint.gguf import open_gguf
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import open_checkpoint, read_weight_map
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.packs.manifest import read_manifest
from specchat.serve.asked import read_chat, read_completion, read_object
from specchat.serve.errors import ApiError
from specchat.units import parse_size

NAMED = (SpecchatError, ApiError)
_ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400)
_odd = st.sampled_from(_ODD_NUMBERS) | st.floats() | st.text(max_size=8) | st.booleans() | st.none()
VALUES: st.SearchStrategy[Any] = st.recursive(
    _odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.text(st.characters(codec=None, exclude_categories=()), max_size=24)


def fuzz(few: int = 25) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=max(few, int(os.environ.get("TEST_EXAMPLES", "0"))), deadline=None, suppress_health_check=checks
    )


def changes(values: Any, data: st.DataObject) -> Any:
    """A value with one of its parts, at any depth, replaced, dropped or added."""
    if not isinstance(values, dict | list) or not values or data.draw(st.integers(0, 3)) == 0:
        return data.draw(VALUES)
    keys = list(values) if isinstance(values, dict) else range(len(values))
    key = data.draw(st.sampled_from(keys))
    copy: Any = dict(values) if isinstance(values, dict) else list(values)
    if data.draw(st.integers(0, 5)) == 0:
        del copy[key]
    else:
        copy[key] = changes(values[key], data)
    return copy


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Bytes of which some were changed, cut off, or put in twice."""
    place = data.draw(st.integers(0, len(content)))
    piece = data.draw(st.binary(max_size=12))
    kept = content[place + data.draw(st.sampled_from([0, len(piece), 1000])) :]
    return content[:place] + piece + (kept if data.draw(st.booleans()) else b"")


def refused_or_read(read: Callable[[], object]) -> None:
    with suppress(*NAMED):
        read()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]},
}


@fuzz(40)
@given(st.data())
def test_headers(tmp_path: Path, data: st.DataObject):
    text = json.dumps(changes(HEADER, data)).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(32)
    if data.draw(st.booleans()):
        content = damaged(content, data)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused_or_read(lambda: open_checkpoint(tmp_path))


@fuzz()
@given(st.data())
def test_indices(tmp_path: Path, data: st.DataObject):
    file = tmp_path / "model.safetensors.index.json"
    names = data.draw(st.dictionaries(NAMES, NAMES | st.just("x.safetensors"), max_size=3))
    file.write_text(json.dumps(changes({"metadata": {"total_size": 3}, "weight_map": names}, data)))
    refused_or_read(lambda: read_weight_map(file))
    refused_or_read(lambda: open_checkpoint(tmp_path))


@fuzz()
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_json_and_generation_configs(tmp_path: Path, content: bytes):
    (tmp_path / "generation_config.json").write_bytes(content)
    refused_or_read(lambda: read_json(tmp_path / "generation_config.json"))
    refused_or_read(lambda: load_generation_defaults(tmp_path))


@fuzz()
@given(st.data())
def test_generation_values(tmp_path: Path, data: st.DataObject):
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "do_sample": True, "eos_token_id": [2, 3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(changes(values, data)))
    refused_or_read(lambda: load_generation_defaults(tmp_path))


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 2, "content": "<s>", "special": True, "normalized": False}],
    "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


@fuzz(20)
@given(st.data())
def test_tokenizers(tmp_path: Path, data: st.DataObject):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changes(TOKENIZER, data)))
    settings_ = changes({"bos_token": "<s>", "chat_template": "{{ messages }}", "added_tokens_decoder": {}}, data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))

    def read() -> None:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("a b <s> ü"))

    refused_or_read(read)


GGUF = (
    b"GGUF"
    + struct.pack("<IQQ", 3, 1, 2)
    + b"".join(
        [
            struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama",
            struct.pack("<Q", 4) + b"list" + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2),
            struct.pack("<Q", 1) + b"x" + struct.pack("<IQQIQ", 2, 4, 2, 0, 0),
        ]
    )
)


@fuzz(60)
@given(st.data())
def test_gguf_files(tmp_path: Path, data: st.DataObject):
    file = tmp_path / "x.gguf"
    content = GGUF + bytes(-len(GGUF) % 32) + bytes(64)
    file.write_bytes(damaged(content, data))
    refused_or_read(lambda: open_gguf(file))


@fuzz(60)
@given(st.data())
def test_sessions(tmp_path: Path, data: st.DataObject):
    records = [OPENED, ANSWERED, {"type": "drop", "num_exchanges": 1, "reason": "asked", "questions": ["x"]}]
    content = b"".join(json.dumps(changes(each, data)).encode() + b"\n" for each in records)
    if data.draw(st.booleans()):
        content = damaged(content, data)
    file = tmp_path / "fox.jsonl"
    file.write_bytes(content)

    def read() -> None:
        saved = transcript.read(file)
        assert saved.opened and saved.state is not None
        transcript.as_markdown(saved.records)

    refused_or_read(read)
    assert file.read_bytes() == content


@fuzz()
@given(st.data())
def test_manifests(tmp_path: Path, data: st.DataObject):
    (tmp_path / "manifest.json").write_bytes(json.dumps(data.draw(VALUES)).encode()[: data.draw(st.integers(0, 400))])
    with suppress(ValueError):
        refused_or_read(lambda: read_manifest(tmp_path))


@fuzz()
@given(st.data())
def test_settings(tmp_path: Path, data: st.DataObject):
    lines = []
    for key in data.draw(st.lists(st.sampled_from([each.name for each in RUN_KEYS]), unique=True, max_size=4)):
        value = data.draw(st.sampled_from(["3", "-1", "true", "1e999", "nan", "[]", "{a = 1}", "2026-01-01", "9" * 30]))
        lines.append(f"{key} = {value if data.draw(st.booleans()) else json.dumps(data.draw(st.text(max_size=9)))}")
    file = tmp_path / "config.toml"
    file.write_bytes("\n".join(lines).encode() if data.draw(st.booleans()) else data.draw(st.binary(max_size=40)))

    def read() -> None:
        layer, aliases = config_file(str(file))
        resolve(RUN_KEYS, [layer], aliases)

    refused_or_read(read)


@fuzz(60)
@given(NAMES)
def test_sizes_models_and_assignments(text: str):
    def assign() -> None:
        if text.split():  # /set alone lists the settings
            parse_value(*parse_assignment(text))

    for read in (lambda: parse_size(text), lambda: parse_model(text), lambda: parse_shape(text), assign):
        refused_or_read(read)
    refused_or_read(lambda: parse_value("temperature", text))
    assert isinstance(masked(text), str)


CHAT = {
    "model": "m",
    "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}],
    **{"temperature": 0.5, "top_p": 1, "max_tokens": 3, "seed": 1, "stop": ["a"], "stream": True, "n": 1},
}


@fuzz(60)
@given(st.data())
def test_requests(data: st.DataObject):
    body = json.dumps(changes(CHAT, data)).encode()
    if data.draw(st.booleans()):
        body = damaged(body, data)
    refused_or_read(lambda: read_chat(read_object(body)))
    refused_or_read(lambda: read_completion(read_object(body)))


def test_an_error_without_a_name_is_seen():
    with pytest.raises(RecursionError):
        refused_or_read(lambda: json.loads("[" * 100_000))
