"""Random bytes and values for everything that is read from files, arguments and requests: only named errors come out.

`pytest -n0 -s -m soak tests/faults/test_fuzzing.py` goes on for TEST_MINUTES with each target, 10
by default, and prints the seeds. TEST_SEED repeats a run; hypothesis keeps the inputs that fail.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support import fake_engine
from support.faults.saved import ANSWERED, OPENED
from support.mutations import damage, mutations, use, write_models

from specchat.chat import transcript
from specchat.chat.assignments import parse_assignment
from specchat.chat.session import ChatSession
from specchat.chat.settings import parse_value
from specchat.chat.state import Opened
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
from specchat.records.generation import Sampling
from specchat.serve.asked import read_chat, read_completion, read_object
from specchat.serve.errors import ApiError
from specchat.ui.chat_view import ChatView
from specchat.ui.commands import COMMANDS
from specchat.ui.console import AnswerStream, Talk
from specchat.ui.desk import Chat
from specchat.ui.loading import BackgroundLoad
from specchat.ui.repl import Repl
from specchat.units import parse_size

NAMED = (SpecchatError, ApiError)
_ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400)
_odd = st.sampled_from(_ODD_NUMBERS) | st.floats() | st.text(max_size=8) | st.booleans() | st.none()
VALUES: st.SearchStrategy[Any] = st.recursive(
    _odd, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = st.text(st.characters(codec=None, exclude_categories=()), max_size=24)


Target = Callable[[Path, st.DataObject], None]
TARGETS: dict[str, Target] = {}


def target(check: Target) -> Target:
    TARGETS[check.__name__] = check
    return check


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


@target
def headers(tmp_path: Path, data: st.DataObject) -> None:
    text = json.dumps(changes(HEADER, data)).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(32)
    if data.draw(st.booleans()):
        content = damaged(content, data)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused_or_read(lambda: open_checkpoint(tmp_path))


@target
def indices(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors.index.json"
    names = data.draw(st.dictionaries(NAMES, NAMES | st.just("x.safetensors"), max_size=3))
    file.write_text(json.dumps(changes({"metadata": {"total_size": 3}, "weight_map": names}, data)))
    refused_or_read(lambda: read_weight_map(file))
    refused_or_read(lambda: open_checkpoint(tmp_path))


@target
def json_and_generation_configs(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
    (tmp_path / "generation_config.json").write_bytes(content)
    refused_or_read(lambda: read_json(tmp_path / "generation_config.json"))
    refused_or_read(lambda: load_generation_defaults(tmp_path))


@target
def generation_values(tmp_path: Path, data: st.DataObject) -> None:
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


@target
def tokenizers(tmp_path: Path, data: st.DataObject) -> None:
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


@target
def gguf_files(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "x.gguf"
    content = GGUF + bytes(-len(GGUF) % 32) + bytes(64)
    file.write_bytes(damaged(content, data))
    refused_or_read(lambda: open_gguf(file))


@target
def sessions(tmp_path: Path, data: st.DataObject) -> None:
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


@target
def manifests(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "manifest.json").write_bytes(json.dumps(data.draw(VALUES)).encode()[: data.draw(st.integers(0, 400))])
    with suppress(ValueError):
        refused_or_read(lambda: read_manifest(tmp_path))


@target
def config_files(tmp_path: Path, data: st.DataObject) -> None:
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


@target
def sizes_models_and_assignments(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(NAMES)

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


@target
def requests(tmp_path: Path, data: st.DataObject) -> None:
    body = json.dumps(changes(CHAT, data)).encode()
    if data.draw(st.booleans()):
        body = damaged(body, data)
    refused_or_read(lambda: read_chat(read_object(body)))
    refused_or_read(lambda: read_completion(read_object(body)))


class Typed:
    """A prompt at which these lines are typed, and then Ctrl-D."""

    trouble = None

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def read(self, restored: str, **_: Any) -> str:
        if not self._lines:
            raise EOFError
        return restored[:3] + self._lines.pop(0)

    def confirms(self, question: str) -> bool:
        return not question


COMMAND_NAMES = st.sampled_from([name for command in COMMANDS for name in command.names]) | NAMES
# Nothing is written outside of the folder of the test.
ARGUMENTS = st.sampled_from(["notes.txt", "notes.md", "notes.jsonl", ".", "none", "on", "7", "seed=7", "stop="]) | (
    NAMES.map(lambda text: text.translate({ord("/"): ":", ord("~"): "-"}))
)


@target
def slash_commands(tmp_path: Path, data: st.DataObject) -> None:
    commands = st.tuples(COMMAND_NAMES, ARGUMENTS).map(lambda parts: f"/{parts[0]} {parts[1]}")
    lines = data.draw(st.lists(commands | st.just("Hello") | NAMES, min_size=1, max_size=5))
    for name in ("notes.txt", "notes.md", "notes.jsonl"):
        (tmp_path / name).write_bytes(damaged(b"# Chat\n\n## User\n\nHi\n\n## Assistant\n\nHello\n", data))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    transcript_ = transcript.Transcript(None)

    def load(_: object) -> ChatSession:
        transcript_(Opened({}, None, Sampling(), None, None))
        engine, tokenizer = fake_engine.FakeEngine(["Hi."] * 9), fake_engine.TOKENIZER
        return ChatSession(engine, tokenizer, sampling=Sampling(), stop_ids=frozenset(), journal=transcript_)

    with chdir(tmp_path):
        loading = BackgroundLoad(load)
        loading.start()
        chat = Chat(loading, transcript_, lambda session: session.settings())
        Repl(chat, ChatView(AnswerStream(screen), Talk(screen)), Typed(lines)).run()
    assert screen.buffer.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_models(folder := tmp_path_factory.mktemp("models"))
    return folder


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_only_named_errors_come_out(name: str, tmp_path: Path, data: st.DataObject):
    TARGETS[name](tmp_path, data)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*TARGETS, "damaged_models"])
def test_only_named_errors_come_out_for_minutes(name: str, tmp_path: Path, models: Path):
    def damaged_models(tmp_path: Path, data: st.DataObject) -> None:
        mutation = data.draw(mutations())
        shutil.copytree(models / mutation.model, tmp_path / "model")
        try:
            damage(tmp_path / "model" / mutation.file, mutation)
            use(tmp_path / "model")
        finally:
            shutil.rmtree(tmp_path / "model")

    check, num_inputs = TARGETS.get(name, damaged_models), 0

    def count(data: st.DataObject) -> None:
        nonlocal num_inputs
        num_inputs += 1
        check(tmp_path, data)

    first = number = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    end = time.monotonic() + 60 * float(os.environ.get("TEST_MINUTES", "10"))
    print(f"\nTEST_SEED={first} {name}", flush=True)
    while time.monotonic() < end:
        run = given(data=st.data())(count)
        seed(number)(settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))(run))()
        number += 1
    print(f"TEST_SEED={first} to {number - 1}: {num_inputs:,} inputs")


def test_an_error_without_a_name_is_seen():
    with pytest.raises(RecursionError):
        refused_or_read(lambda: json.loads("[" * 100_000))
