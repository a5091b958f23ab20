"""Plans with the target's own low-bit copy: memory of the streamed layers' copies, speed, and targets without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.loading import Quiet, plan_request
from support.planning import UNKNOWN_RATES

from specchat.errors import UsageError
from specchat.hardware.machine import Machine, MatmulRate
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest
from specchat.models.catalog.ref import demo_source
from specchat.models.drafts import copy_of
from specchat.models.sizes.describe import as_copy
from specchat.models.sizes.geometry import layer_sizes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.explain import ExplainedPlan
from specchat.planner.memory import build_ledger
from specchat.planner.placement import PlacementOptions, interleaved
from specchat.planner.rates import Rate, Rates
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan, smaller_plan
from specchat.records.model import ModelSource
from specchat.records.plan import Plan, PlanChoices
from specchat.units import GIB, MIB

GPU = Machine("cuda:0", 14 * GIB, 32 * GIB, fast_bf16=True)
FAST = replace(UNKNOWN_RATES, matmul=(MatmulRate(1, 3e11), MatmulRate(512, 3e13)), matmul_dtype="bf16")
TARGET = ModelSource("Qwen/Qwen3-14B", demo_source("target").path)
COPY = replace(TARGET, name="self", part="self")


def inputs(target: str = TARGET.name) -> PlanInputs:
    copies = [as_copy(known_spec(target, quant), "self") for quant in ("int8", "int4")]
    return PlanInputs(
        GPU, FAST, FAST, lambda quant: known_spec(target, quant), copies[0], lower_drafts=tuple(copies[1:])
    )


def planned(**asked: object) -> Plan:
    return choose_plan(plan_request(TARGET, COPY, **{"quant": "none", **asked}), inputs()).plan


def test_a_copy_takes_memory_from_resident_layers_and_none_outside_the_layers():
    plan = planned()
    names = {item.item: item.bytes for item in plan.ledger}
    low = layer_sizes(as_copy(known_spec(TARGET.name, "int4"), "self"), "bf16")
    assert (plan.draft, plan.draft_quant, plan.sources) == ("self", "int4", "self")
    assert names["draft"] == sum(low[index] for index in plan.placement.streamed)
    assert "draft KV cache" not in names and plan.work.shares_cache
    assert plan.device_bytes <= plan.vram_bytes
    # with one resident layer more, and its copy less, the plan would not fit
    spec, more = known_spec(TARGET.name), interleaved(len(plan.placement.resident) + 1, 40)
    larger = replace(plan.placement, resident=more)
    copy = as_copy(known_spec(TARGET.name, "int4"), "self")
    assert sum(each.bytes for each in build_ledger(spec, copy, plan.work, larger)) > plan.vram_bytes
    smaller = smaller_plan(plan_request(TARGET, COPY, quant="none"), inputs(), plan)
    assert smaller.device_bytes < plan.device_bytes and smaller.draft == "self"


@pytest.mark.parametrize("retrieval", [False, True])
def test_a_target_that_does_not_stream_has_no_copy(retrieval: bool):
    """Each draft pass would cost as much as a pass of the target, so the copy cannot be faster."""
    request = plan_request(TARGET, COPY, quant="none", vram_bytes=100 * GIB, retrieval=retrieval)
    found = choose_plan(request, inputs())
    assert not found.plan.placement.streamed and found.plan.draft is None
    assert found.plan.retrieval == retrieval
    (choice,) = (each for each in found.choices if each.option == "draft")
    assert choice.value == ("retrieval" if retrieval else "none") and choice.alternative is not None
    assert (choice.why, choice.pinned) == ("no layer is streamed, so none is copied", False)
    assert choice.alternative.value == ("self+retrieval" if retrieval else "self")
    assert choice.alternative.tok_per_s < found.prediction.tok_per_s


def test_trees_of_a_copy_take_rows_of_the_targets_cache():
    plan = planned(tree_budget=64)
    work, spec = plan.work, known_spec(TARGET.name)
    assert work.tree_rows == work.draft_rows == 128
    kv = next(item.bytes for item in plan.ledger if item.item == "KV cache")
    assert 0 <= kv - (work.ctx + 128) * spec.kv_numbers_per_row * 2 < 2 * MIB * spec.num_layers  # blocks of 2 MiB


def test_splits_count_copies_of_streamed_layers():
    """Against a count of every split."""
    sizes, copies = (100, 100, 60, 100, 100, 80), (30, 25, 20, 30, 25, 20)
    options = PlacementOptions(sizes, (2,), copies)
    for budget in range(300, 600, 7):
        fitting = [
            count
            for count in (0, 1, 2, 3, 6)
            if sum(sizes[i] if i in interleaved(count, 6) else copies[i] for i in range(6))
            + 2 * (count < 6) * max((sizes[i] for i in range(6) if i not in interleaved(count, 6)), default=0)
            <= budget
        ]
        found = [split.num_resident for _, split in options.split([budget])]
        assert found == ([max(fitting)] if fitting else [])


def test_the_text_of_a_lower_target_has_a_lower_copy():
    plan = planned(quant="int8")
    assert (plan.quant, plan.draft_quant) == ("int8", "int4")
    with pytest.raises(UsageError, match=r"lower precision than .* has \(int4\)"):
        planned(quant="int4")


def test_recurrent_targets_have_no_copy():
    request = plan_request(TARGET, COPY, quant="none")
    with pytest.raises(UsageError, match="recurrent"):
        choose_plan(request, inputs("Qwen/Qwen3.6-35B-A3B"))


def chosen(draft: str | None, free_disk_bytes: int) -> str | None:
    small = None if draft is None else known_spec(draft)
    facts = PlanInputs(
        GPU, FAST, FAST, lambda quant: known_spec(TARGET.name, quant), small, free_disk_bytes=free_disk_bytes
    )
    source = None if draft is None else ModelSource(draft, TARGET.path)
    request = plan_request(TARGET, source, quant="none", retrieval=True, draft_is_open=True, copy=COPY)
    return choose_plan(request, facts).plan.draft


def test_a_copy_is_chosen_where_it_is_much_faster_and_the_disk_has_room():
    """With the rates of this test, a copy's passes cost more than those of a small draft model."""
    assert chosen(None, 100 * GIB) == "self"
    assert chosen(None, GIB) is None
    assert chosen("Qwen/Qwen3-0.6B", 100 * GIB) == "Qwen/Qwen3-0.6B"


def explained(
    machine: Machine, rates: Rates, copy: ModelSource | None, draft: ModelSource | None = None
) -> ExplainedPlan:
    given = as_copy(known_spec(TARGET.name, "int4"), "self") if draft is not None else None
    facts = PlanInputs(
        machine, rates, rates, lambda quant: known_spec(TARGET.name, quant), given, free_disk_bytes=100 * GIB
    )
    return choose_plan(
        plan_request(TARGET, draft, quant="none", retrieval=True, draft_is_open=copy is not None, copy=copy), facts
    )


def test_a_gpu_over_a_slow_link_takes_the_copy_for_its_speed():
    """A golden plan: 1.8 times as fast as with retrieval alone, and the reason is the tokens per pass."""
    found = explained(GPU, FAST, COPY)
    (choice,) = (each for each in found.choices if each.option == "draft")
    assert (found.plan.draft, found.plan.draft_quant, choice.value) == ("self", "int4", "self+retrieval")
    assert choice.why == "11.6 tokens per pass instead of 1" and not choice.pinned
    assert choice.alternative is not None and choice.alternative.value == "retrieval"
    assert found.prediction.tok_per_s == pytest.approx(1.8 * choice.alternative.tok_per_s, rel=0.02)


def test_a_copy_that_does_not_fit_is_named_as_the_reason():
    cpu = Machine("cpu", 14 * GIB, 14 * GIB, fast_bf16=False)
    found = explained(cpu, UNKNOWN_RATES, None, draft=COPY)
    (choice,) = (each for each in found.choices if each.option == "draft")
    assert found.plan.draft is None and found.plan.placement.streamed
    assert choice.why == "its copy does not fit beside it"


def test_a_measured_copy_has_a_lower_precision_without_a_word():
    """A measurement keeps other drafts as they are stored; a copy is stored nowhere."""
    target = demo_source("target")
    copy = copy_of(target)
    request = ModelRequest("demo", "self", PlanChoices(device="cpu", vram_bytes=30 * MIB, ctx=256, dtype="fp32"))
    plan = make_plan(request, Models(target, copy, ""), Quiet(), as_given=True).plan
    assert (plan.draft, plan.draft_quant) in {("self", "int4"), ("self", "int8")}


# Two cores with bf16: a copy's matrices take as long to multiply as the target's, and some time to dequantize.
CPU = Machine("cpu", 24 * GIB, 24 * GIB, fast_bf16=True)
CORES = replace(
    UNKNOWN_RATES,
    matmul=(MatmulRate(1, 2.4e10), MatmulRate(16, 3.8e11), MatmulRate(512, 4e11)),
    matmul_dtype="bf16",
    dequantize_s={"int8": 1.55e-10, "int4": 6e-11, "int3": 2.9e-10},
    layer_s=650e-6,
)


@pytest.mark.parametrize(("disk", "draft", "ratio"), [(1e9, "self", 2.36), (2.5e9, "self", 1.44), (7e9, None, 1.06)])
def test_a_cpu_takes_the_copy_only_where_passes_wait_for_the_disk(disk: float, draft: str | None, ratio: float):
    """Golden plans: passes of the copy cost as much as the target's, so a fast disk leaves nothing to win."""
    found = explained(CPU, replace(CORES, disk=Rate(disk, "measured")), COPY)
    (choice,) = (each for each in found.choices if each.option == "draft")
    assert found.plan.draft == draft and found.plan.placement.streamed
    assert choice.alternative is not None
    assert found.prediction.tok_per_s == pytest.approx(ratio * choice.alternative.tok_per_s, rel=0.05)


def test_drafting_by_a_copy_is_charged_pass_by_pass():
    """Every level of the tree dequantizes and multiplies all copied layers, and multiplies the resident ones."""
    found = explained(CPU, replace(CORES, disk=Rate(1e9, "measured")), COPY)
    spec, plan = known_spec(TARGET.name), found.plan
    weights = spec.num_layer_params + spec.vocab_size * spec.hidden_size
    copied = len(plan.placement.streamed) * spec.num_layer_params / spec.num_layers
    one_pass = weights * 2 / 2.4e10 + copied * 6e-11
    passes = found.prediction.tokens_per_step - 1  # a chain that is nearly always right: each accepted node is a level
    assert found.prediction.draft_s >= passes * one_pass
    assert found.prediction.draft_s <= 1.5 * (passes + 1) * one_pass
