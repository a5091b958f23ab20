"""Models of other programs on the command line: listed, run in place, and never removed."""

import json

import pytest
from support.stores import point_stores_to, put_into_ollama, save_tiny_gguf
from support.terminal import Terminal


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def home(tmp_path, monkeypatch, gguf):
    """Return a home with a whole and a damaged model of ollama."""
    point_stores_to(monkeypatch, tmp_path)
    put_into_ollama(tmp_path / "ollama", "registry.ollama.ai/library/tiny/3b", gguf)
    put_into_ollama(tmp_path / "ollama", "registry.ollama.ai/library/bad/latest", gguf).write_text("{")
    return tmp_path


def stamps(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", ["ollama:tiny:3b", "tiny:3b"])
def test_a_model_of_ollama_answers(specchat, home, name):
    before = stamps(home / "ollama")
    result = specchat("run", name, "w1 w2", "--base", "--json", "--max-tokens", "3", "--device", "cpu", "--no-save")
    assert result.code == 0, result.err
    assert json.loads(result.out)["model"] == "ollama:tiny:3b"
    assert stamps(home / "ollama") == before


def test_models_are_listed_with_their_origin(specchat, home):
    found = {each["name"]: each for each in json.loads(specchat("models", "--json").out)["models"]}
    assert found["ollama:tiny:3b"]["origin"] == "ollama" and found["ollama:tiny:3b"]["kind"] == "model"
    assert found["ollama:bad"]["kind"] == "other" and "damaged" in found["ollama:bad"]["note"]


def test_models_of_other_programs_are_not_removed(specchat, home):
    result = specchat("models", "rm", "tiny:3b", "--yes")
    assert result.code == 2
    assert "belongs to ollama" in result.err and "ollama rm tiny:3b" in result.err


def test_a_misspelt_name_is_answered_with_those_that_exist(specchat, home):
    result = specchat("run", "ollama:tini:3b", "hi")
    assert result.code == 3 and "ollama:tiny:3b" in result.err


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_list_fits_the_terminal(home, columns):
    environment = {"HF_HUB_CACHE": str(home / "hub"), "SPECCHAT_CACHE_DIR": str(home / "cache")}
    with Terminal("support.fake_cli", "models", columns=columns, environment=environment) as terminal:
        assert terminal.exit_code() == 0
        assert all(word in terminal.screen for word in ("ollama:tiny:3b", "ollama:bad", "in total"))
        assert "its manifest is" in terminal.screen
