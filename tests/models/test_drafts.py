"""The automatic choice of a draft, with a loopback hub, real tiny checkpoints and the real cache."""

import json
from pathlib import Path

import pytest
from support.fake_hub import FakeHub
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.models import drafts
from specchat.models.catalog.ref import demo_source, parse_model
from specchat.models.drafts import choose_draft, fits, relative_in_cache
from specchat.models.hub.download import Download
from specchat.models.locate import look_up, obtain
from specchat.records.model import ModelSource

TARGET = "meta-llama/Llama-3.3-70B-Instruct"
OFFICIAL, COPY = "meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    return files_of(save(random_model(make_config("llama")), tmp_path_factory.mktemp("small") / "model").path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Return a model of the same vocabulary and ten times the size."""
    config = make_config("llama")
    config.num_hidden_layers = 60
    return save(random_model(config), tmp_path_factory.mktemp("large") / "model")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def choose(text: str, *, offline: bool = False):
    return choose_draft(parse_model(text), offline=offline, warn=pytest.fail)


def cache(hub: FakeHub, name: str, files: dict[str, bytes]) -> ModelSource:
    hub.publish(name, files)
    missing = look_up(parse_model(name), offline=False)
    assert isinstance(missing, Download)
    return obtain(missing)


# ---------------------------------------------------------------- known pairs


@pytest.mark.parametrize("model", ["demo", "shape:llama-8b"])
def test_demo_and_synthetic_models_use_the_embedded_draft(model: str):
    assert choose(model).found == demo_source("draft")


def test_a_known_draft_must_be_downloaded(hub: FakeHub, small):
    hub.publish(OFFICIAL, small)
    found = choose(TARGET).found
    assert isinstance(found, Download)
    assert found.name == OFFICIAL
    assert hub.num_downloads() == 0


def test_a_cached_draft_is_chosen_without_a_request(hub: FakeHub, small):
    hub.publish(OFFICIAL, small)
    cached = cache(hub, COPY, small)
    hub.requests.clear()
    assert choose(TARGET).found == choose(TARGET, offline=True).found == cached
    assert not hub.requests


def test_an_open_copy_replaces_a_gated_draft(hub: FakeHub, small):
    hub.publish(OFFICIAL, small)
    hub.gated.add(OFFICIAL)
    hub.publish(COPY, small)
    found = choose(TARGET).found
    assert isinstance(found, Download)
    assert found.name == COPY


def test_a_draft_of_the_same_publisher_comes_first(hub: FakeHub, small):
    for name in (OFFICIAL, COPY):
        hub.publish(name, small)
    found = choose("unsloth/Llama-3.3-70B-Instruct").found
    assert isinstance(found, Download)
    assert found.name == COPY


def test_the_note_says_why_no_known_draft_is_available(hub: FakeHub):
    choice = choose(TARGET)
    assert choice.found is None
    assert choice.note == f"plain decoding: {COPY} is not on the hub, or is private"
    assert choose(TARGET, offline=True).note == f"plain decoding: {OFFICIAL} is not in the cache"


def test_the_note_says_that_no_draft_is_known(hub: FakeHub):
    assert choose("org/name") == drafts.DraftChoice(None, "plain decoding: no draft known for this model")
    assert not hub.requests


# ---------------------------------------------------------------- relatives


def test_a_small_related_model_in_the_cache_is_found(hub: FakeHub, small, large: ModelSource):
    assert relative_in_cache(large) is None
    relative = cache(hub, "org/small", small)
    assert relative_in_cache(large) == relative
    assert relative_in_cache(relative) is None  # itself, and as large


def test_unrelated_models_are_not_chosen(hub: FakeHub, small, large: ModelSource):
    config = json.loads(small["config.json"])
    cache(hub, "org/other-kind", small | {"config.json": json.dumps(config | {"model_type": "qwen2"}).encode()})
    tokenizer = small["tokenizer.json"].replace(b'"w', b'"v')
    cache(hub, "org/other-words", small | {"tokenizer.json": tokenizer})
    assert relative_in_cache(large) is None


# ---------------------------------------------------------------- vocabularies


def renamed(files: dict[str, bytes], folder: Path, share: float) -> ModelSource:
    """Return a copy of the model with a share of its tokens renamed, counted as in `check_pair`."""
    words = json.loads(files["tokenizer.json"])
    size = 2000
    words["model"]["vocab"] = {f"w{i}": i for i in range(size)}
    renamed = {f"x{i}" if VOCAB <= i < VOCAB + share * size else f"w{i}": i for i in range(size)}
    for name, vocabulary in (("ours", words["model"]["vocab"]), ("theirs", renamed)):
        (folder / name).mkdir()
        words["model"]["vocab"] = vocabulary
        for file, body in (files | {"tokenizer.json": json.dumps(words).encode()}).items():
            (folder / name / file).write_bytes(body)
    return ModelSource("theirs", folder / "theirs")


@pytest.mark.parametrize(("share", "expected"), [(0.0, True), (0.004, True), (0.006, False)])
def test_a_few_renamed_tokens_do_no_harm(small, tmp_path: Path, share: float, expected: bool):
    theirs = renamed(small, tmp_path, share)
    assert fits(ModelSource("ours", tmp_path / "ours"), theirs) is expected
