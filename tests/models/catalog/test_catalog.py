"""The forms of MODEL, and hints for invalid ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specchat.errors import ModelNotFoundError, SpecchatError, UsageError
from specchat.models.catalog.ref import ModelRef, demo_source, known_draft, parse_model
from specchat.models.catalog.shape import parse_shape
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.locate import look_up


def test_demo_is_parsed():
    assert parse_model("demo") == ModelRef("demo", "demo")


@pytest.mark.parametrize("text", [".", "..", "./x", "../x/y", "/x", "./org/name@v1"])
def test_folders_are_parsed(text):
    assert parse_model(text) == ModelRef(text, "folder", path=Path(text))


def test_home_is_expanded_in_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse_model("~/models/x").path == Path("/somewhere/models/x")
    assert parse_model("~").path == Path("/somewhere")
    with pytest.raises(ModelNotFoundError):
        parse_model("~no-such-user-here/x")


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/12", "org/name", "refs/pr/12"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@" + "0a" * 20, "org/name", "0a" * 20),
    ],
)
def test_hub_ids_are_parsed(text, repo_id, revision):
    assert parse_model(text) == ModelRef(text, "hub", repo_id=repo_id, revision=revision)


@pytest.mark.parametrize("revision", ["", "..", "../../x", "a/../b", "/etc/x", "-x", "a b", "a//b"])
def test_invalid_revisions_are_refused(revision):
    with pytest.raises(ModelNotFoundError):
        parse_model(f"org/name@{revision}")


@pytest.mark.parametrize("text", ["shape:llama-70b", "shape:llama-70b,layers=8", "shape:hidden=2048,layers=16"])
def test_shapes_are_parsed(text):
    assert parse_model(text) == ModelRef(text, "shape", shape=parse_shape(text.removeprefix("shape:")))


@pytest.mark.parametrize("text", ["shape:llama-71b", "shape:hidden=64,layers=2", "shape:"])
def test_unknown_shapes_are_refused(text):
    with pytest.raises(UsageError):
        parse_model(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "hello", "a/b/c", "org/", "/".join("ab") + "/", "org/na me", "org/na--me", "org/x..y", "org/x.git"],
)
def test_other_texts_are_refused_with_the_forms(text):
    with pytest.raises(ModelNotFoundError) as caught:
        parse_model(text)
    assert "demo" in caught.value.hint
    assert "org/name" in caught.value.hint


def test_hints_suggest_the_likeliest_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    for text, hint in {
        "llama": "./llama",
        "DEMO": "demo?",
    }.items():
        with pytest.raises(ModelNotFoundError) as caught:
            parse_model(text)
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "hub_id"),
    [
        ("hf.co/org/name", "org/name"),
        ("hf.co/org/name@v1.0", "org/name@v1.0"),
        ("huggingface.co/org/name/", "org/name"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("http://www.huggingface.co/org/name?library=transformers#usage", "org/name"),
        ("https://hf.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name/tree/v1.0/", "org/name@v1.0"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F12", "org/name@refs/pr/12"),
    ],
)
def test_addresses_of_the_hub_are_hub_ids(text, hub_id):
    assert parse_model(text) == parse_model(hub_id)
    assert parse_model(text).text == hub_id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://huggingface.co/org/name/blob/main/config.json", "did you mean org/name?"),
        ("https://huggingface.co/org/name/resolve/v2/model.safetensors", "did you mean org/name@v2?"),
        ("https://huggingface.co/org/name/discussions", "did you mean org/name?"),
        ("https://huggingface.co/org/name/tree/main/onnx", "did you mean org/name?"),
        ("https://huggingface.co/datasets/org/name", "data set"),
        ("https://example.com/org/name", "not an address of the hub"),
        ("hf.co/qwen3-8b", "did you mean Qwen/Qwen3-8B?"),
        ("hf.co/", "org/name"),
        ("https://hf.co/org/name/tree/..", "revision"),
    ],
)
def test_other_addresses_are_refused(text, words):
    with pytest.raises(ModelNotFoundError) as caught:
        parse_model(text)
    assert words in f"{caught.value.message} {caught.value.hint}"


def hint_for(text, *names_here):
    with pytest.raises(ModelNotFoundError) as caught:
        parse_model(text, lambda: names_here)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value.hint


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("gpt-oss-20b", "unsloth/gpt-oss-20b-BF16"),
        ("llama3.2", "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama3:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen2.5:7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("phi4", "microsoft/phi-4"),
        ("gemma3:270m", "google/gemma-3-270m-it"),
        ("mistral-small3.1", "mistralai/Mistral-Small-24B-Instruct-2501"),  # the nearest release
        ("qwn3-8b", "Qwen/Qwen3-8B"),  # misspelt
        ("dmeo", "demo"),
    ],
)
def test_short_names_are_answered_with_models(text, first):
    assert hint_for(text).removeprefix("did you mean ").startswith((f"{first}?", f"{first},", f"{first} or "))


def test_aliases_and_cached_models_are_suggested_first():
    assert hint_for("llama3.2", "me/llama-3.2-tuned", "work").startswith("did you mean me/llama-3.2-tuned, ")
    assert hint_for("wrok", "work") == "did you mean work?"
    assert hint_for("Qwen3-8B", "me/Qwen3-8B@v2") == "did you mean me/Qwen3-8B@v2 or Qwen/Qwen3-8B?"
    assert hint_for("mine", "me/qwen") == hint_for("mine")


def test_prompts_are_recognised():
    for text in ("Tell me a story", "what is\n3/4 of 8?", "word " * 1000):
        assert hint_for(text) == "usage: specchat run MODEL [PROMPT]"
    with pytest.raises(ModelNotFoundError, match="'Tell me a story' looks like a prompt"):
        parse_model("Tell me a story")


def test_a_missing_path_is_named_for_what_it_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral.gguf").write_bytes(b"GGUF")
    (tmp_path / "small-model").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for text, what, hint in (
        ("./mistrall.gguf", "file mistrall.gguf does not exist", "did you mean ./mistral.gguf?"),
        ("./smal-model", "folder smal-model does not exist", "did you mean ./small-model?"),
        (f"{tmp_path}/smal-model", "folder .* does not exist", f"did you mean {tmp_path}/small-model?"),
        ("./notes", "folder notes does not exist", "check the path; a hub id has the form org/name, without ./"),
        ("./no/such/x.gguf", "file no/such/x.gguf does not exist", "there is no folder no/such either"),
        ("/dev/null", "/dev/null is neither a folder nor a file", "MODEL is demo, "),
    ):
        with pytest.raises(ModelNotFoundError, match=what) as caught:
            look_up(parse_model(text), offline=True)
        assert caught.value.hint.startswith(hint)


def test_a_file_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / "x" / name).write_text("{}")
        assert hint_for(f"x/{name}") == "did you mean its folder, ./x?"
        for folder in ("./x", tmp_path / "x"):
            with pytest.raises(ModelNotFoundError, match="is a file") as caught:
                look_up(parse_model(f"{folder}/{name}"), offline=True)
            assert caught.value.hint == f"did you mean its folder, {folder}?"
    assert parse_model("x/absent.json").kind == "hub"


@given(st.text(max_size=300) | st.text("/.:@-huggingfaceco 8b", max_size=40))
def test_any_text_is_parsed_or_refused_with_a_hint(text):
    try:
        ref = parse_model(text)
    except SpecchatError as error:
        assert error.hint
        return
    assert ref.text == text or text.endswith(ref.text)  # without the hub's host
    assert (ref.path is not None) == (ref.kind == "folder")
    assert (ref.repo_id is not None) == (ref.kind == "hub")
    assert (ref.shape is not None) == (ref.kind == "shape")


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_demo_pair_is_complete(role):
    source = demo_source(role)
    assert source.is_toy
    assert source.revision is None
    assert open_checkpoint(source.path).tensors


def test_demo_and_shapes_have_the_demo_draft():
    assert known_draft(parse_model("demo")) == demo_source("draft")
    assert known_draft(parse_model("shape:llama-8b")) == demo_source("draft")
    assert known_draft(parse_model("org/name")) is None
    assert known_draft(parse_model("./x")) is None


def test_locating_imports_no_torch_or_hub():
    code = "import sys, specchat.models.locate; assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
