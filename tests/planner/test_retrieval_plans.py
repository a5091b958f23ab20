"""Plans without a draft model: trees come from the text itself where a pass over more rows costs little."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import pytest
from support.loading import plan_request
from support.planning import UNKNOWN_RATES

from specchat.engine.drafting.frequent import FrequentTokens
from specchat.engine.drafting.suffix_index import SuffixIndex
from specchat.hardware.machine import Machine, MatmulRate
from specchat.loading.request import ModelRequest
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.describe import describe
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.explain import ExplainedPlan
from specchat.planner.memory import build_ledger
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan, smaller_plan
from specchat.records.limits import FREQUENT_TOKEN_BYTES, FREQUENT_TOKENS, RETRIEVAL_TOKEN_BYTES
from specchat.records.model import ModelSource, ModelSpec
from specchat.units import GIB, MIB

GPU = Machine("cuda:0", 8 * GIB, 32 * GIB, fast_bf16=True)
CPU = Machine("cpu", 64 * GIB, 64 * GIB, fast_bf16=False)
FAST = replace(UNKNOWN_RATES, matmul=(MatmulRate(1, 3e11), MatmulRate(512, 3e13)), matmul_dtype="bf16")
TARGET = ModelSource("Qwen/Qwen3-14B", demo_source("target").path)


def inputs_for(machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> PlanInputs:
    rates = UNKNOWN_RATES if machine is CPU else FAST
    return PlanInputs(machine, rates, rates, lambda _: target, draft)


def chosen(machine: Machine, **asked: object) -> ExplainedPlan:
    request = plan_request(TARGET, None, **{"quant": "none", **asked})  # type: ignore[arg-type]
    return choose_plan(request, inputs_for(machine, known_spec(TARGET.name), None))


def test_a_streamed_model_without_a_draft_has_trees():
    plain, drafted = (chosen(GPU, retrieval=each, draft_is_open=True) for each in (False, True))
    assert (plain.plan.work.tree_budget, plain.plan.retrieval, plain.plan.sources) == (0, False, "none")
    plan = drafted.plan
    assert (plan.draft, plan.retrieval, plan.sources) == (None, True, "retrieval")
    assert plan.work.tree_budget >= 32 and plan.work.draft_rows == 0
    assert plan.expected is not None and plan.expected.tokens_per_step > 1.3
    assert drafted.prediction.tok_per_s > 1.2 * plain.prediction.tok_per_s
    choice = next(each for each in drafted.choices if each.option == "draft")
    assert (choice.value, choice.pinned) == ("retrieval", False)
    assert choice.alternative is not None and choice.alternative.value == "none"


def test_the_ledger_counts_the_trees_and_the_text():
    plan = chosen(GPU, retrieval=True, draft_is_open=True).plan
    spec = known_spec(TARGET.name)
    without = build_ledger(spec, None, replace(plan.work, tree_budget=0), plan.placement)
    names = {item.item: item.bytes for item in without}
    cache = next(item.bytes for item in plan.ledger if item.item == "KV cache")
    assert cache > names["KV cache"]
    text = next(item.bytes for item in plan.host_ledger if item.item == "text to draft from")
    assert 10 * MIB < text < 64 * MIB
    assert any(item.item == "frequent tokens to draft" for item in plan.host_ledger)


def test_texts_and_counts_take_no_more_memory_than_the_ledger_says():
    """Of texts whose runs are all different, at their most: while tables grow, and while rare tokens are dropped."""
    rng = random.Random(1)
    tokens = [rng.randrange(1000, 200_000) for _ in range(12_000)]
    index, frequent = SuffixIndex(), FrequentTokens(0)
    tracemalloc.start()
    index.append(tokens)
    text = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    begin = tracemalloc.get_traced_memory()[0]
    for token in tokens:
        frequent.count([(token, 1.0)])
    frequent.begin([])
    counts = tracemalloc.get_traced_memory()[1] - begin
    tracemalloc.stop()
    assert text <= RETRIEVAL_TOKEN_BYTES * len(tokens)
    assert 0.5 * FREQUENT_TOKENS * FREQUENT_TOKEN_BYTES <= counts <= FREQUENT_TOKENS * FREQUENT_TOKEN_BYTES


def test_retrieval_asked_for_is_kept_even_if_plain_decoding_is_predicted_to_be_faster():
    asked = chosen(CPU, retrieval=True)
    assert asked.plan.retrieval and asked.plan.work.tree_budget > 0
    choice = next(each for each in asked.choices if each.option == "draft")
    assert (choice.value, choice.pinned) == ("retrieval", True)
    assert chosen(CPU, retrieval=True, tree_budget=7).plan.work.tree_budget == 7


def test_a_smaller_plan_still_drafts_by_retrieval():
    request = plan_request(TARGET, None, quant="none", retrieval=True, draft_is_open=True)
    inputs = inputs_for(GPU, known_spec(TARGET.name), None)
    plan = choose_plan(request, inputs).plan
    smaller = smaller_plan(request, inputs, plan)
    assert smaller.retrieval and smaller.device_bytes < plan.device_bytes


def test_a_draft_model_is_joined_by_retrieval():
    target, draft = demo_source("target"), demo_source("draft")
    for retrieval in (False, True):
        request = plan_request(target, draft, "cpu", retrieval=retrieval)
        plan = choose_plan(request, inputs_for(CPU, describe(target), describe(draft))).plan
        assert plan.sources == ("demo draft+retrieval" if retrieval else "demo draft")


@pytest.mark.parametrize(
    ("draft", "model", "retrieval"),
    [
        ("auto", "auto", True),
        ("none", "none", False),
        ("retrieval", "none", True),
        ("org/x", "org/x", False),
        ("org/x+retrieval", "org/x", True),
        ("retrieval+org/x", "org/x", True),
        ("auto+retrieval", "auto", True),
        ("./a+b", "./a+b", False),
        ("mtp", "mtp", False),
        ("mtp+retrieval", "mtp", True),
    ],
)
def test_words_of_the_draft_option(draft: str, model: str, retrieval: bool):
    request = ModelRequest(draft=draft)
    assert (request.draft_model, request.retrieval) == (model, retrieval)
