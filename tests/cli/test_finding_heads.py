"""Heads that are found without a flag: those of the catalog on a loopback hub, and those in the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.dflash import save_dflash
from support.eagle3 import KINDS, save_eagle3
from support.fake_hub import FakeHub, serving_here
from support.loading import Quiet, model_request, yes
from support.tiny_models import make_config, random_model, save

from specchat.errors import UsageError
from specchat.loading.locate import locate_models, parse_models, sketch_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan

TARGET, SMALL = "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"
EAGLE, BLOCKS = "RedHatAI/Qwen3-8B-speculator.eagle3", "z-lab/Qwen3-8B-DFlash-b16"
LAYERS = 40  # drafts pay for a target of many layers
WIDE = replace(KINDS["speculators"], own_embeddings=True)
BASE_TAG = f"base_model:finetune:{TARGET}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving_here(monkeypatch, tmp_path / "hub") as served:
        yield served


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Return a target, a small model of its vocabulary, and heads of two kinds."""
    folder = tmp_path_factory.mktemp("models")
    config = make_config("llama")
    config.num_hidden_layers = LAYERS
    large = save(random_model(config), folder / "large").path
    config.num_hidden_layers = 1
    small = save(random_model(config), folder / "small").path
    heads = {EAGLE: save_eagle3(64, folder / "eagle", KINDS["speculators"]), BLOCKS: save_dflash(folder / "blocks")}
    written = heads[BLOCKS].source.path / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"num_target_layers": LAYERS}))
    found = {TARGET: large, SMALL: small} | {name: head.source.path for name, head in heads.items()}
    return {name: {file.name: file.read_bytes() for file in path.iterdir()} for name, path in found.items()}


def locate(model: str = TARGET, *, asked: list[str] | None = None, **changes) -> Models:
    """Find the models; every question is answered by yes."""

    def ask(question: str) -> bool:
        if asked is not None:
            asked.append(question)
        return True

    request = model_request(**{"model": model} | changes)
    return locate_models(request, parse_models(request), Quiet(), ask)


def names(models: Models) -> list[str]:
    return [head.name for head in models.heads]


def publish(hub: FakeHub, files: dict[str, dict[str, bytes]], *models: str) -> None:
    for name in models:
        hub.publish(name, files[name])


def test_the_catalogs_head_is_in_the_one_question(hub: FakeHub, files):
    publish(hub, files, TARGET, EAGLE)
    asked: list[str] = []
    models = locate(asked=asked)
    assert len(asked) == 1 and f"{EAGLE} (" in asked[0] and ", an EAGLE-3 head)" in asked[0]
    assert (names(models), models.draft, models.heads[0].part) == ([EAGLE], None, "eagle3")
    planned = make_plan(model_request(model=TARGET, tree_budget=16), models, Quiet())
    assert planned.plan.draft == EAGLE and planned.models.draft == models.heads[0]
    hub.requests.clear()
    assert locate(offline=True).heads == models.heads and not hub.requests
    assert locate(draft="none").heads == () == locate(draft="retrieval").heads


@pytest.mark.slow
def test_no_weights_are_downloaded_without_a_yes(hub: FakeHub, files):
    publish(hub, files, TARGET, EAGLE)
    request = model_request(model=TARGET)
    with pytest.raises(UsageError, match=EAGLE):
        locate_models(request, parse_models(request), Quiet(), lambda _: False)
    assert hub.weight_bytes < len(files[EAGLE]["model.safetensors"])  # headers


@pytest.mark.slow
def test_the_draft_that_the_plan_uses_is_asked_for(hub: FakeHub, files):
    publish(hub, files, TARGET, SMALL, EAGLE, BLOCKS)
    models = locate()
    drafts = [draft.name for draft in (models.draft, *models.heads) if draft is not None]
    assert len(drafts) == 1


@pytest.mark.slow
def test_a_slow_draft_model_is_left_out_for_a_head(hub: FakeHub, files):
    hub.publish(SMALL, files[TARGET])
    publish(hub, files, TARGET, BLOCKS)
    models = locate()
    assert (models.draft, names(models)) == (None, [BLOCKS])


@pytest.mark.slow
def test_a_draft_in_the_cache_comes_before_a_head_on_the_hub(hub: FakeHub, files):
    publish(hub, files, TARGET, SMALL)
    locate()
    publish(hub, files, EAGLE)
    hub.requests.clear()
    models = locate()
    assert models.draft is not None and names(models) == []
    assert not any("RedHatAI" in line for line in hub.requests)
    locate(EAGLE, draft="none")  # now the head is there, too
    models = locate()
    assert models.draft is not None and names(models) == [EAGLE]


def test_fine_tunes_have_the_heads_of_their_base(hub: FakeHub, files):
    card = f"---\nbase_model:\n- {TARGET}\n---\n".encode()
    hub.publish("someone/tuned", files[TARGET] | {"README.md": card})
    hub.publish("someone/other", files[TARGET])
    hub.tags["someone/tuned"] = ["text-generation", BASE_TAG]
    publish(hub, files, EAGLE)
    assert names(locate("someone/other")) == []
    asked: list[str] = []
    assert names(locate("someone/tuned", asked=asked)) == [EAGLE] and len(asked) == 1
    assert names(locate("someone/tuned", offline=True)) == [EAGLE]


@pytest.mark.slow
def test_cached_heads_that_fit_are_found(hub: FakeHub, files, tmp_path: Path):
    publish(hub, files, EAGLE)
    wide = save_eagle3(96, tmp_path / "wide", WIDE).source.path
    hub.publish("org/wide", {file.name: file.read_bytes() for file in wide.iterdir()})
    hub.publish("org/target", files[TARGET])
    for name in (EAGLE, "org/wide", "org/target"):
        locate(name, draft="none")
    assert names(locate("org/target")) == [EAGLE]
    hub.publish("org/blocks", files[BLOCKS])
    locate("org/blocks", draft="none")
    assert sorted(names(locate("org/target"))) == sorted([EAGLE, "org/blocks"])


@pytest.mark.slow
def test_a_head_that_does_not_fit_is_not_downloaded(hub: FakeHub, files, tmp_path: Path):
    wide = save_eagle3(96, tmp_path / "wide", WIDE).source.path
    publish(hub, files, TARGET)
    hub.publish(EAGLE, {file.name: file.read_bytes() for file in wide.iterdir()})
    asked: list[str] = []
    assert names(locate(asked=asked)) == [] and EAGLE not in asked[0]


@pytest.mark.slow
def test_a_plan_without_a_download_knows_the_head(hub: FakeHub, files, tmp_path: Path):
    publish(hub, files, TARGET, EAGLE)
    request = model_request(model=TARGET)
    models = sketch_models(request, parse_models(request), Quiet(), yes, tmp_path)
    assert names(models) == [EAGLE] and models.heads[0].headers_only
