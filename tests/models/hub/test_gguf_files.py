"""GGUF files by name: in a folder, by path, and on the hub by their quantization."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.fake_hub import FakeHub
from support.gguf_files import save_gguf
from support.locating import locate
from support.tiny_models import make_config, random_model

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotCachedError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
)
from specchat.loading.sketches import refuse_by_configuration
from specchat.models.catalog.ref import demo_source, parse_model
from specchat.models.checkpoint.gguf import listed_files
from specchat.models.gguf.folder import model_folder
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.hub import headers
from specchat.models.hub.download import Download
from specchat.models.locate import look_up, sketch_weights, tokenizer_folder
from specchat.models.sizes.describe import describe
from specchat.records.model import ModelSource

KINDS = {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "BF16": "BF16"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """A tiny model in several quantizations, by file name."""
    folder = tmp_path_factory.mktemp("gguf")
    model = random_model(make_config("llama"))
    for name, kind in KINDS.items():
        save_gguf(model, folder / f"tiny-{name}.gguf", kind)
    return {file.name: file.read_bytes() for file in folder.glob("*.gguf")}


def ask(text: str, **options) -> ModelSource:
    return locate(parse_model(text), **{"offline": False, "confirm": lambda _: True, "warn": pytest.fail} | options)


def file_of(source: ModelSource) -> str:
    files = listed_files(source.path)
    assert files is not None
    return files[0].name


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_file_or_the_folder_of_one_is_a_model(contents, tmp_path, monkeypatch):
    file = tmp_path / "tiny.GGUF"
    file.write_bytes(contents["tiny-Q4_0.gguf"])
    for text in (str(file), str(tmp_path)):
        source = ask(text)
        assert (source.name, file_of(source)) == (text, "tiny.GGUF")
        assert json.loads((source.path / "config.json").read_text())["model_type"] == "llama"
    monkeypatch.chdir(tmp_path)
    assert file_of(ask("tiny.GGUF")) == "tiny.GGUF"


def test_a_file_may_have_any_name(contents, tmp_path):
    blob = tmp_path / "sha256-0123456789abcdef"  # as in ollama's store
    blob.write_bytes(contents["tiny-Q4_0.gguf"])
    assert file_of(ask(str(blob))) == blob.name
    blob.write_bytes(b"GGML" + contents["tiny-Q4_0.gguf"][4:])
    with pytest.raises(ModelNotFoundError, match="is a file, not a model's folder"):
        ask(str(blob))


def test_several_files_are_listed_with_sizes(contents, tmp_path):
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"not looked at")
    with pytest.raises(ModelNotFoundError, match=r"tiny-BF16\.gguf \(.*KiB\), tiny-Q4_0\.gguf") as caught:
        ask(str(tmp_path))
    assert "mmproj" not in caught.value.message
    assert str(tmp_path / "tiny-BF16.gguf") in str(caught.value.hint)


def test_a_folder_changes_with_its_file(contents, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(contents["tiny-Q4_0.gguf"])
    first = model_folder(file)
    assert model_folder(file) == first
    file.write_bytes(contents["tiny-Q8_0.gguf"])
    assert model_folder(file) != first


def test_architectures_without_an_entry_are_refused_by_name(contents, tmp_path):
    data = contents["tiny-Q4_0.gguf"].replace(b"llama", b"lumma")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match="architecture 'lumma'") as caught:
        ask(str(tmp_path / "x.gguf"))
    assert "qwen3" in str(caught.value.hint)


def test_another_tokenizer_replaces_the_one_in_the_file(contents, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(contents["tiny-Q4_0.gguf"])
    own, other = look_up(parse_model(str(file)), offline=True), demo_source("target").path
    found = look_up(
        parse_model(str(file)), offline=True, tokenizer=tokenizer_folder(parse_model(str(other)), offline=True)
    )
    assert isinstance(own, ModelSource) and isinstance(found, ModelSource)
    theirs = load_tokenizer(other)
    assert load_tokenizer(found.path).vocabulary() == theirs.vocabulary() != load_tokenizer(own.path).vocabulary()
    with pytest.raises(UsageError, match="is for GGUF files"):
        look_up(parse_model("demo"), offline=True, tokenizer=other)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_quantization_is_downloaded_by_name(hub: FakeHub, contents):
    hub.publish("org/tiny-GGUF", {**contents, "mmproj-F16.gguf": b"x", "README.md": b"x", "config.json": b"{}"})
    source = ask("org/tiny-GGUF:q8_0")
    assert file_of(source) == "tiny-Q8_0.gguf"
    assert hub.weight_bytes == len(contents["tiny-Q8_0.gguf"])
    assert ask("org/tiny-GGUF:Q8_0", confirm=pytest.fail).path == source.path
    assert ask("org/tiny-GGUF:Q8_0", offline=True).path == source.path
    with pytest.raises(ModelNotCachedError):
        ask("org/tiny-GGUF:Q4_0", offline=True)


@pytest.mark.parametrize(("text", "problem"), [("", "several quantizations"), (":Q2_K", "no quantization 'Q2_K'")])
def test_quantizations_are_listed_with_sizes(text, problem, hub: FakeHub, contents):
    hub.publish("org/tiny-GGUF", contents)
    with pytest.raises(ModelNotFoundError, match=problem) as caught:
        ask(f"org/tiny-GGUF{text}")
    listed = caught.value.message
    assert listed.index("Q4_0 (") < listed.index("Q8_0 (") < listed.index("BF16 (")
    assert caught.value.hint == "choose one: org/tiny-GGUF:Q4_0"


@pytest.mark.parametrize("step", [1000, 1 << 20], ids=["many steps", "one step"])
def test_a_header_gives_the_sizes_of_the_model(step, hub: FakeHub, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "_STEP", step)
    hub.publish("org/tiny-GGUF", contents)
    missing = look_up(parse_model("org/tiny-GGUF:Q8_0"), offline=False)
    assert isinstance(missing, Download)
    found = describe(sketch_weights(missing, tmp_path))
    fetched, size = hub.weight_bytes, len(contents["tiny-Q8_0.gguf"])
    assert fetched < size / 2 if step == 1000 else fetched == size
    assert found == describe(ask("org/tiny-GGUF:Q8_0"))


def test_files_that_cannot_run_are_refused_before_the_download(hub: FakeHub, contents, monkeypatch):
    monkeypatch.setattr(headers, "_STEP", 1000)
    file = contents["tiny-Q8_0.gguf"]
    hub.publish("org/odd-GGUF", {"odd-Q8_0.gguf": file.replace(b"llama", b"odder")})
    hub.publish("org/torn-GGUF", {"torn-Q8_0.gguf": file[: len(file) // 2]})
    for name, kind, words in (("odd", UnsupportedModelError, "odder"), ("torn", CorruptCheckpointError, "truncated")):
        missing = look_up(parse_model(f"org/{name}-GGUF"), offline=False)
        assert isinstance(missing, Download)
        with pytest.raises(kind, match=words):
            refuse_by_configuration(missing)
    assert hub.weight_bytes < len(file)


def test_the_only_quantization_needs_no_name(hub: FakeHub, contents):
    hub.publish("org/one-GGUF", {"tiny-Q4_0.gguf": contents["tiny-Q4_0.gguf"]})
    assert file_of(ask("org/one-GGUF")) == "tiny-Q4_0.gguf"


def test_sets_of_split_files_in_folders_are_one_quantization(hub: FakeHub, tmp_path):
    import gguf

    model = random_model(make_config("llama"))
    save_gguf(model, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x-Q6_K.gguf", "llama", split_max_tensors=20)
    for name, field in reader.fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            value, types = field.contents(), [kind.value for kind in field.types]
            if types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, value)
            else:
                writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = {f"Q6_K/{file.name}": file.read_bytes() for file in tmp_path.glob("x-*.gguf")}
    assert len(files) > 1
    hub.publish("org/split-GGUF", {**files, "y-Q2_K.gguf": b"x"})
    source = ask("org/split-GGUF:Q6_K")
    listed = listed_files(source.path)
    assert listed is not None and len(listed) == len(files)


def test_tokenizers_are_downloaded_for_gguf_files(hub: FakeHub, contents, tmp_path):
    other = demo_source("target").path
    words = {name: (other / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    hub.publish("org/original", {**words, "model.safetensors": b"never fetched"})
    folder = tokenizer_folder(parse_model("org/original"), offline=False)
    (tmp_path / "x.gguf").write_bytes(contents["tiny-Q4_0.gguf"])
    found = look_up(parse_model(str(tmp_path / "x.gguf")), offline=True, tokenizer=folder)
    assert isinstance(found, ModelSource)
    assert load_tokenizer(found.path).vocabulary() == load_tokenizer(other).vocabulary()
    assert not any("model.safetensors" in line for line in hub.requests if line.startswith("GET"))


def test_names_that_are_no_tokenizers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not a folder or a hub id"):
        tokenizer_folder(parse_model("demo"), offline=True)
    with pytest.raises(ModelNotFoundError, match="no tokenizer files"):
        tokenizer_folder(parse_model(str(tmp_path)), offline=True)


def test_paths_may_be_spelt_with_a_home(contents, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(contents["tiny-Q4_0.gguf"])
    assert file_of(ask("~/x.gguf")) == "x.gguf"
    assert Path(ask("~/x.gguf").name).name == "x.gguf"
