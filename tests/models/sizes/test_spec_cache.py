"""Cached descriptions of models equal new ones, or are replaced."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_models
from support.spec_digests import COMMAND, RAISE_IT, changed, found_now, read_stored

from specchat.loading.checking import check_model
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes import cache
from specchat.models.sizes.describe import describe
from specchat.models.sizes.inspect import inspect_model
from specchat.records.model import ModelSource


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Use an empty cache folder and an empty memory."""
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_remembered", {})
    monkeypatch.setattr(cache, "_checked", set())
    return tmp_path / "cache" / "specs"


def model(folder: Path, architecture: str = "llama", **changes: int) -> ModelSource:
    config = tiny_models.make_config(architecture)
    config.update(changes)
    config.save_pretrained(folder)
    return ModelSource("tiny", folder)


def forget(monkeypatch):
    monkeypatch.setattr(cache, "_remembered", {})


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gemma3", "deepseek_v3"])
def test_a_loaded_description_equals_the_saved_one(architecture, quant, tmp_path, monkeypatch):
    source = model(tmp_path, architecture)
    made = describe(source, quant)
    assert made == inspect_model(source, quant)
    forget(monkeypatch)
    monkeypatch.setattr("specchat.models.sizes.inspect.inspect_model", None)
    assert describe(source, quant) == made
    assert describe(ModelSource("other name", tmp_path), quant).name == "other name"


def test_the_key_changes_with_the_description(tmp_path):
    source = model(tmp_path / "a")
    keys = [cache.key_of(source, quant) for quant in ("none", "int8")]
    keys.append(cache.key_of(model(tmp_path / "b", num_hidden_layers=3), "none"))
    quantized = tmp_path / "c"
    model(quantized)
    values = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (quantized / "config.json").write_text(json.dumps(values))
    for content in (b"1", b"22"):  # its headers say how large matrices are
        (quantized / "model.safetensors").write_bytes(content)
        keys.append(cache.key_of(ModelSource("c", quantized), "none"))
    assert len(set(keys)) == len(keys) and None not in keys
    assert cache.key_of(model(tmp_path / "d"), "none") == keys[0]
    assert cache.key_of(ModelSource("nothing", tmp_path / "e"), "none") is None


def test_other_versions_of_code_or_libraries_change_the_key(tmp_path, monkeypatch):
    source = model(tmp_path / "model")
    keys = [cache.key_of(source, "none")]
    monkeypatch.setattr(cache, "SPEC_VERSION", cache.SPEC_VERSION + 1)
    keys.append(cache.key_of(source, "none"))
    for name in ("torch", "transformers", "accelerate"):
        versions = {**cache.library_versions(), name: "another"}
        with monkeypatch.context() as patch:
            patch.setattr(cache, "library_versions", lambda versions=versions: versions)
            keys.append(cache.key_of(source, "none"))
    assert len(set(keys)) == len(keys) and None not in keys


def test_changed_descriptions_need_another_version(tmp_path):
    """Otherwise descriptions cached by earlier versions would be used."""
    stored, found = read_stored(), found_now(tmp_path)
    names = changed(stored, found)
    if stored["version"] == found["version"] and stored["libraries"] != found["libraries"] and names:
        pytest.skip(f"other libraries describe {', '.join(names)} otherwise; their versions are in the key")
    assert stored["version"] == found["version"], f"the digests are of another version: {COMMAND}"
    assert not names, RAISE_IT
    assert stored["digests"].keys() == found["digests"].keys(), f"other models are described: {COMMAND}"


@pytest.mark.parametrize("damage", ["cut", "digit", "empty", "other", "absent", "folder"])
def test_damaged_files_are_found_and_replaced(damage, tmp_path, folder, monkeypatch):
    source = model(tmp_path / "model")
    made = describe(source)
    (file,) = folder.iterdir()
    text = file.read_text()
    file.unlink()
    match damage:
        case "cut":
            file.write_text(text[: len(text) // 2])
        case "digit":
            file.write_text(text.replace('"count": 4096', '"count": 4095', 1))
        case "empty":
            file.write_text("")
        case "other":
            file.write_text("[]")
        case "folder":
            file.mkdir()
    forget(monkeypatch)
    assert cache.load(file.stem, "tiny") is None
    assert describe(source) == made
    if damage != "folder":
        assert file.read_text() == text


def test_an_unwritable_cache_is_replaced_by_memory(tmp_path, folder, monkeypatch):
    folder.parent.write_text("a file where the folder would be")
    source = model(tmp_path / "model")
    made = describe(source)
    monkeypatch.setattr("specchat.models.sizes.inspect.inspect_model", None)
    assert describe(source) == made


def test_only_the_newest_files_are_kept(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_FILES", 2)
    made = describe(model(tmp_path / "model"))
    for number in range(4):
        cache.save(f"{number}", made)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_passed_check_is_not_repeated(is_writable, tmp_path, folder, monkeypatch):
    if not is_writable:
        folder.parent.write_text("a file where the folder would be")
    source = model(tmp_path / "model")
    check_model(source)
    monkeypatch.setattr("specchat.engine.selfcheck.check_architecture", None)
    check_model(source)
    if is_writable:
        monkeypatch.setattr(cache, "_checked", set())
        check_model(source)
    with pytest.raises(TypeError):
        check_model(model(tmp_path / "other", num_hidden_layers=3))


def test_a_plan_of_a_known_model_needs_no_torch(tmp_path, monkeypatch):
    """In a cache of its own: the shared one drops its oldest files while other tests describe their models."""
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_remembered", {})
    monkeypatch.setattr(cache, "_checked", set())
    for name in ("target", "draft"):
        describe(demo_source(name))
        check_model(demo_source(name))
    code = (
        "import sys; from specchat.cli.app import run_command_line; "
        "code = run_command_line(('run', 'demo', '--plan', '--device', 'cpu')); "
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"
