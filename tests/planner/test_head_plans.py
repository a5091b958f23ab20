"""Plans with an MTP head: chosen by predicted speed among the drafts, counted in the ledger, left out if unreadable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.heads import LAYOUTS, head_of, random_target, save_with_mtp
from support.loading import Quiet, plan_request, yes
from support.planning import UNKNOWN_RATES

from specchat.bench.setup import check_baselines
from specchat.errors import UsageError
from specchat.hardware.machine import Machine, MatmulRate
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import layer_sizes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_plan, smaller_plan
from specchat.planner.statistics import load, record
from specchat.records.generation import Step
from specchat.records.limits import UNREAD_STATES
from specchat.records.model import HEAD_SUFFIXES, ModelSource, ModelSpec, ParamSize
from specchat.units import GIB

GPU = Machine("cuda:0", 8 * GIB, 32 * GIB, fast_bf16=True)
FAST = replace(UNKNOWN_RATES, matmul=(MatmulRate(1, 3e11), MatmulRate(512, 3e13)), matmul_dtype="bf16")
TARGET = ModelSource("Qwen/Qwen3-14B", demo_source("target").path)


def head_like(target: ModelSpec) -> ModelSpec:
    """The sizes of an MTP head of a known target: one layer and its projection, without embeddings."""
    layer = (*target.layer_params[-1], ParamSize(2 * target.hidden_size**2))
    count = sum(size.count for size in layer)
    return replace(
        target,
        name="mtp",
        num_layers=1,
        num_params=count + target.hidden_size,
        num_layer_params=count,
        layer_params=(layer,),
        other_params=(ParamSize(target.hidden_size),),
        kv_shapes=target.kv_shapes[:1],
        lookup_params=0,
        architecture=target.architecture + HEAD_SUFFIXES["mtp"],
    )


def inputs(*, draft: ModelSpec | None = None) -> PlanInputs:
    target = known_spec(TARGET.name)
    return PlanInputs(GPU, FAST, FAST, lambda _: target, draft, heads=(head_like(target),))


def open_request(draft: ModelSource | None = None) -> PlanRequest:
    return plan_request(TARGET, draft, quant="none", retrieval=True, draft_is_open=True, heads=(head_of(TARGET),))


def test_a_head_drafts_where_there_is_no_draft_model():
    explained = choose_plan(open_request(), inputs())
    plan = explained.plan
    assert (plan.draft, plan.sources) == ("mtp", "mtp+retrieval")
    assert plan.expected is not None and plan.expected.tokens_per_step > 3
    choice = next(each for each in explained.choices if each.option == "draft")
    assert (choice.value, choice.pinned) == ("mtp+retrieval", False)
    spec, names = head_like(known_spec(TARGET.name)), {item.item: item.bytes for item in plan.ledger}
    beside = 2 * spec.hidden_size + spec.buffer_bytes  # neither embeddings nor scores
    assert names["draft"] == sum(layer_sizes(spec, "bf16")) + beside
    assert names["draft states"] == 2 * (UNREAD_STATES + 1) * spec.hidden_size
    smaller = smaller_plan(open_request(), replace(inputs(), draft=spec), plan)
    assert smaller.device_bytes < plan.device_bytes


def test_the_faster_of_a_draft_model_and_a_head_is_chosen():
    small, large = known_spec("Qwen/Qwen3-0.6B"), known_spec("Qwen/Qwen3-8B")
    source = ModelSource(small.name, TARGET.path)
    assert choose_plan(open_request(source), inputs(draft=small)).plan.draft == small.name
    assert choose_plan(open_request(source), inputs(draft=large)).plan.draft == "mtp"


def test_a_head_drafts_trees_of_a_fixed_size():
    fixed = plan_request(TARGET, None, quant="none", retrieval=True, tree_budget=16, heads=(head_of(TARGET),))
    plan = choose_plan(fixed, inputs()).plan
    assert (plan.draft, plan.work.tree_budget) == ("mtp", 16)
    without = choose_plan(replace(fixed, heads=()), inputs()).plan
    assert without.draft is None
    assert smaller_plan(fixed, inputs(), without).draft is None


def test_the_precision_of_a_head_is_explained():
    target = known_spec(TARGET.name)
    heads = (head_like(target), replace(head_like(target), quant="int8"))
    choices = choose_plan(open_request(), replace(inputs(), heads=heads)).choices
    assert "draft-quant" in {choice.option for choice in choices}


def test_measured_acceptance_decides_between_heads(tmp_path: Path):
    layer = head_like(known_spec(TARGET.name))
    blocks = replace(layer, name="blocks", architecture=layer.architecture + HEAD_SUFFIXES["dflash"])
    request = replace(open_request(), heads=(head_of(TARGET), ModelSource("blocks", TARGET.path, part="dflash")))
    known = replace(inputs(), heads=(layer, blocks))
    plan = choose_plan(request, known).plan
    assert plan.draft == "blocks"  # by the typical acceptance of its kind
    poor = Step((1,), None, 1, 100, 63, 0, 9, 0.5, 0.1, 0.4, 0.0, 0.0, 0)
    record(tmp_path, plan, 0.0, [poor] * 40)
    assert choose_plan(request, replace(known, statistics=load(tmp_path))).plan.draft == "mtp"


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save_with_mtp(random_target("qwen3"), tmp_path_factory.mktemp("target") / "qwen3", LAYOUTS["qwen3"])


class Warnings(Quiet):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def located(target: ModelSource, draft: str, reporter: Quiet | None = None) -> tuple[ModelRequest, Models]:
    request = ModelRequest(str(target.path), draft)
    return request, locate_models(request, parse_models(request), reporter or Quiet(), yes)


def test_the_word_mtp_takes_the_head_of_the_targets_files(target: ModelSource):
    for draft, sources in (("mtp", "mtp"), ("mtp+retrieval", "mtp+retrieval")):
        request, models = located(target, draft)
        planned = make_plan(request, models, Quiet())
        assert planned.plan.sources == sources
        assert planned.models.draft == head_of(models.target)
        spec = describe(head_of(target))
        assert spec.is_head and spec.num_layers == 1 and len(spec.other_params) == 1


def test_assisted_generation_cannot_use_a_head(target: ModelSource):
    check_baselines(["plain", "assisted"], target, target)
    for draft in (None, head_of(target)):
        with pytest.raises(UsageError, match="draft model"):
            check_baselines(["plain", "assisted"], target, draft)


def test_auto_finds_the_head(target: ModelSource):
    request, models = located(target, "auto")
    assert (models.draft, models.heads) == (None, (head_of(models.target),))
    planned = make_plan(request, models, Quiet())
    assert planned.models.draft == (models.heads[0] if planned.plan.draft == "mtp" else None)
    assert located(target, "none")[1].heads == ()


def test_a_target_without_a_head_says_so(tmp_path: Path, target: ModelSource):
    with pytest.raises(UsageError, match="no MTP layer") as caught:
        located(demo_source("draft"), "mtp")
    assert caught.value.hint is not None and "--draft auto" in caught.value.hint


def test_a_damaged_head_does_not_keep_the_target_from_running(target: ModelSource, tmp_path: Path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in target.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not (key.startswith("mtp.") and "q_proj" in key)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    reporter = Warnings()
    request, models = located(ModelSource("damaged", folder), "auto", reporter)
    planned = make_plan(request, models, reporter)
    assert planned.plan.draft is None
    assert len(reporter.texts) == 1 and "MTP layer" in reporter.texts[0] and "q_proj" in reporter.texts[0]
