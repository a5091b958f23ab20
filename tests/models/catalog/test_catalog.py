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
    ["", " ", "llama", "a/b/c", "org/", "/".join("ab") + "/", "org/na me", "org/na--me", "org/x..y", "org/x.git"],
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
        "https://huggingface.co/org/name/tree/main": "org/name?",
    }.items():
        with pytest.raises(ModelNotFoundError) as caught:
            parse_model(text)
        assert hint in caught.value.hint


@given(st.text(max_size=300))
def test_any_text_is_parsed_or_refused_with_a_hint(text):
    try:
        ref = parse_model(text)
    except SpecchatError as error:
        assert error.hint
        return
    assert ref.text == text
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
