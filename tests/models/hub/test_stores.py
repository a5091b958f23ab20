"""Models in the stores of other programs: found by name, and never changed."""

import json
import os
import shutil

import pytest
from support.stores import MODEL, point_stores_to, put_into_ollama, save_tiny_gguf
from support.tiny_models import make_config, random_model, save

from specchat.errors import ModelNotFoundError, UsageError
from specchat.models.catalog.ref import parse_model
from specchat.models.hub.stores import listed_name, runnable_names, stored_models
from specchat.models.locate import look_up
from specchat.models.packs.installed import find_installed, installed_named
from specchat.records.model import ModelSource

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def stores(tmp_path, monkeypatch, gguf):
    """Return a home with a model in each store."""
    point_stores_to(monkeypatch, tmp_path)
    ollama = tmp_path / "ollama"
    for name in (f"{LIBRARY}/llama3.2/3b", f"{LIBRARY}/tiny/latest", "registry.ollama.ai/me/own/v1"):
        put_into_ollama(ollama, name, gguf)
    put_into_ollama(ollama, "hf.co/org/name/Q4_K_M", gguf)
    (tmp_path / "llama.cpp").mkdir()
    shutil.copyfile(gguf, tmp_path / "llama.cpp" / "org_tiny.gguf")
    shutil.copyfile(gguf, tmp_path / "llama.cpp" / "mmproj-tiny.gguf")
    for repo, files in (("one", ["x-Q4_0.gguf"]), ("two", ["x-Q4_0.gguf", "x-Q8_0.gguf"])):
        folder = tmp_path / ".lmstudio" / "models" / "pub" / repo
        folder.mkdir(parents=True)
        for file in files:
            shutil.copyfile(gguf, folder / file)
    return tmp_path


NAMES = [
    "llama.cpp:org_tiny",
    "lmstudio:pub/one",
    "lmstudio:pub/two:Q4_0",
    "lmstudio:pub/two:Q8_0",
    "ollama:hf.co/org/name:Q4_K_M",
    "ollama:llama3.2:3b",
    "ollama:me/own:v1",
    "ollama:tiny",
]


def found(name):
    source = look_up(parse_model(name, listed_name=listed_name), offline=True)
    assert isinstance(source, ModelSource)
    return source


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_all_are_listed_and_found_in_place(stores):
    before = snapshot(stores)
    assert runnable_names() == NAMES
    for name in NAMES:
        source = found(name)
        assert source.name == name
        listed = json.loads((source.path / "gguf_files.json").read_text())["files"]
        assert [file.startswith(str(stores)) for file in listed] == [True]
    assert snapshot(stores) == before


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llama3.2:3b", "ollama:llama3.2:3b"),
        ("ollama:LLAMA3.2:3B", "ollama:llama3.2:3b"),
        ("tiny", "ollama:tiny"),
        ("ollama:tiny:latest", "ollama:tiny"),
        ("lmstudio:pub/one:Q4_0", "lmstudio:pub/one"),
    ],
)
def test_short_names_are_found(stores, typed, name):
    assert found(typed).name == name


@pytest.mark.parametrize("typed", ["ollama:nosuch", "lmstudio:pub/two", "nosuch", "ollama:"])
def test_unknown_names_are_refused(stores, typed):
    with pytest.raises(ModelNotFoundError):
        found(typed)


def test_hub_ids_are_not_taken_from_stores(stores):
    assert parse_model("me/own:v1", listed_name=listed_name).kind == "hub"


def damaged(folder, gguf, kind):
    """Damage the only model of a folder, and return the words that tell about it."""
    manifest = put_into_ollama(folder, f"{LIBRARY}/bad/latest", gguf)
    [blob] = (folder / "blobs").iterdir()
    match kind:
        case "no json":
            manifest.write_text("{")
            return "manifest is damaged"
        case "other json":
            manifest.write_text('{"layers": 3}')
            return "manifest is damaged"
        case "pipe":
            manifest.unlink()
            os.mkfifo(manifest)
            return "manifest is damaged"
        case "no model":
            manifest.write_text('{"layers": []}')
            return "names no GGUF file"
        case "path":
            layer = {"mediaType": MODEL, "digest": "sha256:../../../etc/passwd"}
            manifest.write_text(json.dumps({"layers": [layer]}))
            return "names no GGUF file"
        case "two models":
            put_into_ollama(folder, f"{LIBRARY}/bad/latest", gguf, layers=(MODEL, MODEL))
            return "several files"
        case "adapter":
            put_into_ollama(folder, f"{LIBRARY}/bad/latest", gguf, layers=(MODEL, MODEL.replace("model", "adapter")))
            return "LoRA adapter"
        case "no blob":
            blob.unlink()
            return "file is missing"
        case "pipe blob":
            blob.unlink()
            os.mkfifo(blob)
            return "file is missing"
    blob.write_bytes(b"GGML" + bytes(100))
    return "not a GGUF file"


KINDS = [
    "no json",
    "other json",
    "pipe",
    "no model",
    "path",
    "two models",
    "adapter",
    "no blob",
    "pipe blob",
    "no gguf",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_entries_are_listed_with_a_word(tmp_path, monkeypatch, gguf, kind):
    point_stores_to(monkeypatch, tmp_path)
    words = damaged(tmp_path / "ollama", gguf, kind)
    [entry] = stored_models()
    assert (entry.name, runnable_names()) == ("ollama:bad", [])
    assert words in entry.problem
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        found("ollama:bad")


def test_a_folder_of_safetensors_runs_and_mlx_is_named(stores):
    folder = stores / ".lmstudio" / "models" / "pub"
    save(random_model(make_config("llama")), folder / "plain")
    shutil.copytree(folder / "plain", folder / "mlx")
    config = json.loads((folder / "mlx" / "config.json").read_text())
    (folder / "mlx" / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    assert found("lmstudio:pub/plain").path == folder / "plain"
    assert {each.name: each.problem for each in stored_models()}["lmstudio:pub/mlx"].startswith("in MLX's format")


def test_lm_studio_may_keep_models_elsewhere(stores, gguf, tmp_path):
    for name, setting in (("moved", "settings"), ("home", "pointer")):
        folder = tmp_path / name / "models" / "pub" / name
        folder.mkdir(parents=True)
        shutil.copyfile(gguf, folder / "x.gguf")
        if setting == "settings":
            text = json.dumps({"downloadsFolder": str(tmp_path / name / "models")})
            (stores / ".lmstudio" / "settings.json").write_text(text)
        else:
            (stores / ".lmstudio-home-pointer").write_text(f"{tmp_path / name}\n")
    assert {"lmstudio:pub/moved", "lmstudio:pub/home"} < set(runnable_names())


def test_incomplete_sets_are_named(stores, gguf):
    shutil.copyfile(gguf, stores / "llama.cpp" / "big-00001-of-00002.gguf")
    problems = {each.name: each.problem for each in stored_models()}
    assert problems["llama.cpp:big-00001-of-00002"] == "a file of its set is missing"


def test_ollamas_models_cannot_be_removed(stores):
    listed = {each.name: each for each in find_installed()}
    assert listed["ollama:llama3.2:3b"].origin == "ollama"
    for name in ("ollama:llama3.2:3b", "llama3.2:3b", "lmstudio:pub/one", "llama.cpp:org_tiny"):
        with pytest.raises(UsageError, match="whose files specchat never changes") as refused:
            installed_named(name)
        assert refused.value.hint.startswith("remove it there: ")
    with pytest.raises(UsageError) as refused:
        installed_named("llama3.2:3b")
    assert refused.value.hint == "remove it there: ollama rm llama3.2:3b"


def test_gguf_of_the_hub_is_listed_by_its_quantization(stores, gguf):
    commit = "a" * 40
    snapshot = stores / "hub" / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    shutil.copyfile(gguf, snapshot / "x-Q8_0.gguf")
    [entry] = [each for each in find_installed() if each.origin == "hub"]
    assert (entry.name, entry.kind, entry.note) == ("org/name", "model", "GGUF: Q8_0")
    assert found("org/name:Q8_0").name == "org/name:Q8_0"
