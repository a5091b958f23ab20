"""Assistants of Gemma 4 by their folder: found, described, planned without a cache, and refused for other targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.assistants import save_assistant
from support.loading import Quiet, yes
from support.tiny_models import make_config, random_model, save

from specchat.errors import UsageError
from specchat.loading.engine import load_engine
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest
from specchat.models.sizes.describe import describe
from specchat.planner.memory import build_ledger
from specchat.records.model import ModelSource


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(random_model(make_config("gemma4_shared")), tmp_path_factory.mktemp("target") / "gemma4")


def located(target: ModelSource, draft: Path) -> tuple[ModelRequest, Models]:
    request = ModelRequest(str(target.path), f"{draft}+retrieval")
    return request, locate_models(request, parse_models(request), Quiet(), yes)


def test_an_assistants_folder_is_a_draft(target: ModelSource, tmp_path: Path):
    head = save_assistant(tmp_path / "head").source.path
    request, models = located(target, head)
    assert models.draft is not None and models.draft.part == "assistant"
    spec = describe(models.draft)
    assert spec.is_head and spec.is_assistant and not spec.is_block
    assert (spec.num_layers, spec.tapped_width, spec.target_size, spec.kv_numbers_per_row) == (2, 0, 64, 0)
    weights = load_file(head / "model.safetensors")
    assert spec.num_params == sum(value.numel() for name, value in weights.items() if "layer_scalar" not in name)
    planned = make_plan(request, models, Quiet(), as_given=True)
    plan = planned.plan
    assert plan.draft == str(head) and plan.work.tapped_width == 0
    items = {item.item for item in build_ledger(describe(target), spec, plan.work, plan.placement)}
    assert "draft" in items and "draft KV cache" not in items
    with load_engine(request, planned.models, planned.plan, Quiet()) as engine:
        assert engine.plan.sources == f"{head}+retrieval"


def test_assistants_for_other_targets_are_refused(target: ModelSource, tmp_path: Path):
    head = save_assistant(tmp_path / "head").source.path
    llama = save(random_model(make_config("llama")), tmp_path / "llama")
    with pytest.raises(UsageError, match="keys of a layer of sliding attention, which the model lacks"):
        located(llama, head)
    config = json.loads((head / "config.json").read_text())
    text = config["text_config"]
    for change, words in (
        ({"text_config": text | {"num_attention_heads": 3}}, "2 heads of keys with 3 heads of its own"),
        ({"backbone_hidden_size": 96}, "states of width 96, not 64"),
        ({"text_config": text | {"vocab_size": 999}}, "a vocabulary of 999, not 211"),
        ({"text_config": text | {"per_layer_config": {"1": {"head_dim": 64}}}}, "keys of width 64, not 32"),
    ):
        (head / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=words):
            located(target, head)
