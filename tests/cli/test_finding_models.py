"""The models of a run on a loopback hub: loading and planning find the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_hub import FakeHub, serving_here
from support.loading import Quiet, model_request, yes
from support.tiny_models import make_config, random_model, save

from specchat.errors import UnsupportedModelError, UsageError
from specchat.loading.locate import locate_models, parse_models, sketch_models
from specchat.loading.models import Models
from specchat.loading.request import ModelRequest

NO_DRAFT = "plain decoding: no draft known for this model"
LARGE, SMALL = "org/large", "org/small"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving_here(monkeypatch, tmp_path / "hub") as served:
        yield served


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Return two checkpoints of one kind and vocabulary."""
    found = {}
    for name, layers in ((SMALL, 2), (LARGE, 60)):
        config = make_config("llama")
        config.num_hidden_layers = layers
        folder = save(random_model(config), tmp_path_factory.mktemp("checkpoints") / "model").path
        found[name] = {file.name: file.read_bytes() for file in folder.iterdir()}
    return found


def options(model: str = LARGE, **changes) -> ModelRequest:
    return model_request(**{"model": model} | changes)


def locate(asked: ModelRequest, *, agrees: bool = True) -> Models:
    return locate_models(asked, parse_models(asked), Quiet(), lambda _: agrees)


def sketch(asked: ModelRequest, folder: Path) -> Models:
    return sketch_models(asked, parse_models(asked), Quiet(), yes, folder)


def weights_asked_for(hub: FakeHub) -> list[str]:
    """Return the requests for weights, without those for their sizes."""
    return [line for line in hub.requests if line.startswith("GET") and ("/cdn/" in line or ".safetensors" in line)]


def test_unknown_model_has_no_draft_and_a_note(hub: FakeHub, files, tmp_path):
    hub.publish(LARGE, files[LARGE])
    planned = sketch(options(), tmp_path)
    assert planned.draft is None and planned.draft_note == NO_DRAFT
    assert weights_asked_for(hub) == []
    located = locate(options())
    assert located.draft is None and located.draft_note == NO_DRAFT
    assert sketch(options(), tmp_path) == located  # from the cache


def test_unknown_model_uses_a_cached_relative_as_draft(hub: FakeHub, files, tmp_path):
    for name in (SMALL, LARGE):
        hub.publish(name, files[name])
    locate(options(SMALL))
    for found in (locate(options()), sketch(options(), tmp_path)):
        assert found.draft is not None and found.draft.name == SMALL
    for plain in (locate(options(draft="none")), sketch(options(draft="none"), tmp_path)):
        assert plain.draft is None and plain.draft_note == "no draft"


def test_a_known_draft_with_another_vocabulary_is_left_out(hub: FakeHub, files, tmp_path):
    target, draft = "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"
    words = files[SMALL]["tokenizer.json"].replace(b'"w', b'"v')
    hub.publish(target, files[LARGE])
    hub.publish(draft, files[SMALL] | {"tokenizer.json": words})
    assert sketch(options(target), tmp_path).draft is not None  # there are no vocabularies to compare yet
    for found in (locate(options(target)), sketch(options(target), tmp_path)):
        assert found.draft is None and found.draft_note == f"plain decoding: {draft} has another vocabulary"


def test_one_question_covers_both_downloads(hub: FakeHub, files):
    hub.publish("Qwen/Qwen3-8B", files[LARGE])
    hub.publish("Qwen/Qwen3-0.6B", files[SMALL])
    with pytest.raises(UsageError, match=r"Qwen/Qwen3-8B and Qwen/Qwen3-0\.6B"):
        locate(options("Qwen/Qwen3-8B"), agrees=False)
    assert weights_asked_for(hub) == []


def test_unsupported_model_is_refused_before_any_request(hub: FakeHub, tmp_path):
    model = "tiiuae/falcon-mamba-7b-instruct"
    for find in (locate, lambda asked: sketch(asked, tmp_path)):
        with pytest.raises(UnsupportedModelError, match="recurrent"):
            find(options(model))
    assert not hub.requests


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "both directions"),
        ({"quantization_config": {"quant_method": "quip"}}, "quip"),
        ({"model_type": "doge"}, "attention masks in its layers"),
    ],
)
def test_unsupported_configuration_is_refused_before_the_download(hub: FakeHub, files, changes, reason):
    config = json.loads(files[LARGE]["config.json"]) | changes
    hub.publish(LARGE, files[LARGE] | {"config.json": json.dumps(config).encode()})
    with pytest.raises(UnsupportedModelError, match=reason):
        locate(options())
    assert weights_asked_for(hub) == []


@pytest.mark.parametrize("draft", ["mtp+demo", "self+mtp", "auto+demo+retrieval"])
def test_only_retrieval_can_be_added_to_another_drafter(draft):
    with pytest.raises(UsageError, match="more than one drafter"):
        parse_models(options("demo", draft=draft))
    assert parse_models(options("demo", draft=f"{draft.partition('+')[0]}+retrieval")).draft is None
