"""DFlash heads by their folder: found, described, planned as one pass a tree, and refused for other targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.dflash import save_dflash
from support.dflash2 import save_dflash2
from support.loading import Quiet, plan_request, yes
from support.planning import UNKNOWN_RATES
from support.tiny_models import make_config, random_model, save

from specchat.errors import UnsupportedModelError, UsageError
from specchat.loading.engine import load_engine
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest
from specchat.models.sizes.describe import describe
from specchat.planner.acceptance import BLOCK_ACCEPTANCE
from specchat.planner.cost import CostModel
from specchat.planner.inputs import find_inputs
from specchat.planner.placement import TierSizes
from specchat.planner.search import choose_plan
from specchat.records.model import ModelSource


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(random_model(make_config("llama")), tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return save_dflash(tmp_path / "head").source.path


def located(target: ModelSource, draft: str) -> tuple[ModelRequest, Models]:
    request = ModelRequest(str(target.path), draft)
    return request, locate_models(request, parse_models(request), Quiet(), yes)


def test_a_heads_folder_is_a_draft(target: ModelSource, head: Path):
    request, models = located(target, f"{head}+retrieval")
    assert models.draft is not None and models.draft.part == "dflash"
    spec = describe(models.draft)
    assert spec.is_head and spec.is_block and (spec.num_layers, spec.tapped_width) == (2, 64)
    weights = load_file(head / "model.safetensors")
    assert spec.num_params == sum(value.numel() for value in weights.values())
    planned = make_plan(request, models, Quiet(), as_given=True)
    assert planned.plan.draft == str(head)
    with load_engine(request, planned.models, planned.plan, Quiet()) as engine:
        assert engine.plan.sources == f"{head}+retrieval"


def test_a_dflash2_heads_folder_is_a_draft(target: ModelSource, tmp_path: Path):
    saved = save_dflash2(tmp_path / "second")
    request, models = located(target, str(saved.source.path))
    assert models.draft is not None and models.draft.part == "dflash"
    spec = describe(models.draft)
    assert spec.is_block and spec.num_params == sum(value.numel() for value in saved.tensors.values())
    planned = make_plan(request, models, Quiet(), as_given=True)
    with load_engine(request, planned.models, planned.plan, Quiet()) as engine:
        assert engine.plan.draft == str(saved.source.path)


def test_a_tree_is_one_pass(target: ModelSource, head: Path):
    source = ModelSource("head", head, part="dflash")
    asked = plan_request(target, source, "cpu", ctx=128, dtype="fp32", draft_quant="none")
    plan = choose_plan(asked, find_inputs(asked)).plan
    assert plan.draft == "head" and plan.work.tapped_width == 64
    model = CostModel(describe(target), describe(source), "fp32", "cpu", UNKNOWN_RATES, BLOCK_ACCEPTANCE)
    expected = model.expectation(TierSizes(4), 64)
    assert expected is not None and expected.draft_passes == 1


def test_heads_for_other_targets_are_refused(target: ModelSource, head: Path):
    config = json.loads((head / "config.json").read_text())
    for change, words in (
        ({"num_target_layers": 5}, "a number of layers of 5, not 4"),
        ({"vocab_size": 999}, "a vocabulary of 999, not 211"),
        ({"dflash_config": config["dflash_config"] | {"target_layer_ids": [1, 7]}}, "layers that a model of 4 layers"),
    ):
        (head / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=words):
            located(target, str(head))
    (head / "config.json").write_text(json.dumps(config | {"architectures": ["DSparkDraftModel"]}))
    with pytest.raises(UnsupportedModelError, match="DSpark"):
        located(target, str(head))
