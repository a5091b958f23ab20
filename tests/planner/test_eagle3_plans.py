"""EAGLE-3 heads by their folder: found, described, planned with their taps in the ledger, and refused for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.eagle3 import KINDS, save_eagle3
from support.loading import Quiet, plan_request, yes
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.errors import PickledCheckpointError, UnsupportedModelError, UsageError
from specchat.loading.engine import load_engine
from specchat.loading.locate import locate_models, parse_models, sketch_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest
from specchat.models.sizes.describe import describe
from specchat.planner.inputs import find_inputs
from specchat.planner.search import choose_plan
from specchat.records.model import ModelSource


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(random_model(make_config("llama")), tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return save_eagle3(64, tmp_path / "head", KINDS["specforge"]).source.path


def located(target: ModelSource, draft: str) -> tuple[ModelRequest, Models]:
    request = ModelRequest(str(target.path), draft)
    return request, locate_models(request, parse_models(request), Quiet(), yes)


@pytest.mark.parametrize("kind", ["speculators", pytest.param("3.1", marks=pytest.mark.slow)])
def test_a_heads_folder_is_a_draft(target: ModelSource, tmp_path: Path, kind: str):
    folder = save_eagle3(64, tmp_path / "head", KINDS[kind]).source.path
    request, models = located(target, f"{folder}+retrieval")
    assert models.draft is not None and models.draft.part == "eagle3"
    planned = make_plan(request, models, Quiet())
    assert planned.plan.draft is None or planned.plan.draft == str(folder)
    spec, weights = describe(models.draft), load_file(folder / "model.safetensors")
    used = [value for name, value in weights.items() if name not in ("d2t", "t2d")]
    assert spec.is_head and spec.num_params == sum(value.numel() for value in used)
    assert (spec.num_layers, spec.tapped_width) == (1, KINDS[kind].width)
    assert spec.buffer_bytes >= 8 * KINDS[kind].num_tokens


def test_the_ledger_counts_what_taps_keep(target: ModelSource, head: Path):
    source = ModelSource("head", head, part="eagle3")
    asked = plan_request(target, source, "cpu", tree_budget=16, ctx=128, dtype="fp32", draft_quant="none")
    plan = choose_plan(asked, find_inputs(asked)).plan
    assert plan.draft == "head" and plan.work.tapped_width == 64
    items = {item.item: item.bytes for item in plan.ledger}
    assert items["hidden rows"] == 4 * (64 + 64) * (plan.work.prompt_rows + 16)
    without = replace(plan.work, tapped_width=0)
    assert plan.work.prompt_rows == without.prompt_rows


def test_a_plan_with_a_head_loads(target: ModelSource, head: Path):
    request, models = located(target, str(head))
    planned = make_plan(replace(request, draft=str(head)), models, Quiet(), as_given=True)
    with load_engine(request, planned.models, planned.plan, Quiet()) as engine:
        assert engine.plan.draft == str(head)


def test_heads_for_other_targets_are_refused(target: ModelSource, tmp_path: Path, head: Path):
    wide = save_eagle3(96, tmp_path / "wide", replace(KINDS["speculators"], own_embeddings=True)).source.path
    with pytest.raises(UsageError, match="states of width 96, not 64"):
        located(target, str(wide))
    deep = save_eagle3(64, tmp_path / "deep", replace(KINDS["specforge"], layers=(2, 14, 25))).source.path
    with pytest.raises(UsageError, match="layers that a model of 4 layers"):
        located(target, str(deep))
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    with pytest.raises(UsageError, match="a vocabulary of 212, not 211"):
        located(target, str(head))


def test_pickled_heads_are_refused(target: ModelSource, head: Path, tmp_path: Path):
    (head / "model.safetensors").rename(head / "pytorch_model.bin")
    for find in (located, lambda *names: sketched(*names, tmp_path)):
        with pytest.raises(PickledCheckpointError):
            find(target, str(head))


def sketched(target: ModelSource, draft: str, folder: Path) -> Models:
    request = ModelRequest(str(target.path), draft)
    return sketch_models(request, parse_models(request), Quiet(), yes, folder)


def test_a_plan_without_loading_knows_the_head(target: ModelSource, head: Path, tmp_path: Path):
    models = sketched(target, str(head), tmp_path)
    assert models.draft is not None and models.draft.part == "eagle3"


def test_heads_of_several_layers_are_refused(target: ModelSource, head: Path):
    file = head / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layers.1.mlp.up_proj.weight": tensors["fc.weight"].clone()}, file, {"format": "pt"})
    request, models = located(target, str(head))
    with pytest.raises(UnsupportedModelError, match="several layers"):
        make_plan(request, models, Quiet())
