"""Plans for several devices: every budget holds, all layers are dealt, and several are taken where that is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loading import plan_request
from support.machines import MEASURED
from support.planning import UNKNOWN_RATES, specs

from specchat.errors import DoesNotFitError, UnsupportedModelError
from specchat.hardware.machine import LinkRate, Machine, MatmulRate
from specchat.models.catalog.ref import demo_source
from specchat.models.sizes.geometry import layer_sizes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.explain import ExplainedPlan
from specchat.planner.inputs import _at_once
from specchat.planner.memory import kv_bytes
from specchat.planner.rates import Rate, Rates
from specchat.planner.request import DeviceInputs, PlanInputs
from specchat.planner.search import choose_plan, smaller_plan
from specchat.records.model import ModelSource, ModelSpec
from specchat.records.plan import DeviceChoice, Plan
from specchat.units import GIB, MIB

FIRST, SECOND = (Machine(f"cuda:{index}", 8 * GIB, 64 * GIB, fast_bf16=True) for index in range(2))
CPU = Machine("cpu", 64 * GIB, 64 * GIB, fast_bf16=False)
# Cards that compute so fast that links decide.
FAST = replace(
    UNKNOWN_RATES,
    matmul=(MatmulRate(1, 1e12), MatmulRate(512, 2e14)),
    matmul_dtype="bf16",
    dequantize_s={"int4": 1e-12, "int8": 1e-12},
)
TARGET = ModelSource("Qwen/Qwen3-32B", demo_source("target").path)
DRAFT = ModelSource("Qwen/Qwen3-0.6B", demo_source("draft").path)
BOTH = (DeviceChoice("cuda:0"), DeviceChoice("cuda:1"))


def over(link: float) -> Rates:
    """The rates of a card whose link brings some GB/s."""
    return replace(FAST, pinned=Rate(link * 1e9, "measured"))


def chosen(
    *others: DeviceInputs, target: ModelSpec | None = None, draft: bool = True, first: Machine = FIRST, **asked: object
) -> ExplainedPlan:
    request = plan_request(TARGET, DRAFT if draft else None, **{"quant": "int4", "devices": BOTH, **asked})  # type: ignore[arg-type]
    spec = target or known_spec(TARGET.name, "int4")
    small = known_spec(DRAFT.name) if draft else None
    inputs = PlanInputs(first, over(12.5), over(12.5), lambda _: spec, small, others=others)
    return choose_plan(replace(request, lowers_for_speed=False), inputs)


def check(plan: Plan, target: ModelSpec) -> None:
    """Every layer has an owner, sizes add up, and no device exceeds its budget."""
    sizes, owner = layer_sizes(target, plan.work.dtype), plan.owner
    resident = set(plan.placement.resident)
    assert len(owner) == target.num_layers and plan.placement.devices == tuple(each.device for each in plan.devices)
    for number, device in enumerate(plan.devices):
        owned = [index for index, each in enumerate(owner) if each == number]
        items = {item.item: item.bytes for item in device.ledger}
        assert device.num_bytes <= device.vram_bytes, f"{device.device} exceeds its budget"
        assert (device.resident, device.streamed) == (len(resident & set(owned)), len(set(owned) - resident))
        assert items.get("resident layers", 0) == sum(sizes[index] for index in owned if index in resident)
        assert device.streamed_bytes == sum(sizes[index] for index in owned if index not in resident)
        assert bool(items.get("slots")) == (device.streamed > 0)
    caches = sum(item.bytes for each in plan.devices for item in each.ledger if item.item == "KV cache")
    rounding = 2 * MIB * len(plan.devices)  # of each device's buffers
    assert abs(caches - kv_bytes(target, plan.work, plan.work.tree_rows)) <= rounding
    assert plan.ledger == plan.devices[0].ledger and plan.vram_bytes == plan.devices[0].vram_bytes
    assert plan.streamed_bytes_per_step == sum(each.streamed_bytes for each in plan.devices)
    assert not plan.stages


@pytest.mark.parametrize("link", [12.5, 3.0])
def test_two_cards_share_a_model_that_fits_on_neither(link: float):
    found = chosen(DeviceInputs(SECOND, over(link)))
    plan, spec = found.plan, known_spec(TARGET.name, "int4")
    check(plan, spec)
    first, second = plan.devices
    assert first.streamed and second.streamed, "both links are used"
    arrival_s = first.streamed_bytes / first.streamed / (min(12.5, link) * 1e9)
    assert first.link_s == pytest.approx(second.link_s, abs=1.5 * arrival_s), "links end together, up to a layer"
    alone = chosen(devices=())
    assert not alone.plan.devices and alone.plan.owner == (0,) * spec.num_layers
    assert found.prediction.tok_per_s > (2.0 if link > 10 else 1.3) * alone.prediction.tok_per_s
    assert found.choices[0].option == "devices" and found.choices[0].pinned


def test_layers_of_cards_that_hold_everything_are_ranges():
    machines = [replace(each, device_free_bytes=16 * GIB) for each in (FIRST, SECOND)]
    plan = chosen(DeviceInputs(machines[1], over(12.5)), first=machines[0]).plan
    check(plan, known_spec(TARGET.name, "int4"))
    assert not plan.placement.streamed and list(plan.owner) == sorted(plan.owner) and set(plan.owner) == {0, 1}


def test_budgets_of_the_list_hold():
    devices = (DeviceChoice("cuda:0", 6 * GIB), DeviceChoice("cuda:1", 3 * GIB))
    plan = chosen(DeviceInputs(SECOND, over(12.5), 3 * GIB), devices=devices, vram_bytes=6 * GIB).plan
    check(plan, known_spec(TARGET.name, "int4"))
    assert [each.vram_bytes for each in plan.devices] == [6 * GIB, 3 * GIB]


def test_a_cpu_keeps_layers_and_streams_none():
    plan = chosen(DeviceInputs(CPU, UNKNOWN_RATES, 4 * GIB), devices=(*BOTH[:1], DeviceChoice("cpu", 4 * GIB))).plan
    check(plan, known_spec(TARGET.name, "int4"))
    assert plan.devices[1].streamed == 0


def test_auto_takes_several_only_where_they_are_faster():
    both = chosen(DeviceInputs(SECOND, over(12.5)), devices="auto")
    assert [each.device for each in both.plan.devices] == ["cuda:0", "cuda:1"] and not both.choices[0].pinned
    tiny = replace(SECOND, device_free_bytes=1200 * MIB)
    slow = replace(over(0.1), matmul=(MatmulRate(1, 1e9), MatmulRate(512, 1e9)))
    one = chosen(DeviceInputs(tiny, slow), devices="auto")
    assert not one.plan.devices and one.plan.placement.devices == ()
    assert [choice.option for choice in one.choices[:2]] == ["device", "devices"]
    assert one.prediction == chosen(devices=()).prediction


def test_links_count_as_fast_as_they_are_together():
    """Rates of the probe for all GPUs at once come first; a CPU has no such link."""
    measured = replace(MEASURED, at_once=(LinkRate("cuda:0", 9e9), LinkRate("cuda:1", 5e9)))
    others = [DeviceInputs(SECOND, over(12.5), GIB), DeviceInputs(CPU, UNKNOWN_RATES)]
    first, (second, cpu) = _at_once(FIRST, over(12.5), others, measured)
    assert first is not None and (first.host.per_s, second.rates.host.per_s) == (9e9, 5e9)
    assert second.vram_bytes == GIB and cpu == others[1]
    assert _at_once(FIRST, over(12.5), others[1:], measured) == (None, others[1:])
    inputs = PlanInputs(FIRST, over(12.5), over(12.5), lambda _: known_spec(TARGET.name, "int4"), others=(second,))
    request = replace(plan_request(TARGET, None, quant="int4", devices=BOTH), lowers_for_speed=False)
    plan = choose_plan(request, replace(inputs, rates_at_once=first)).plan
    assert [each.link_bytes_per_s for each in plan.devices] == [9e9, 5e9]
    assert plan.devices[0].streamed > plan.devices[1].streamed


def test_a_small_model_stays_on_one_card():
    small = known_spec("Qwen/Qwen3-0.6B")
    assert not chosen(DeviceInputs(SECOND, over(12.5)), target=small, draft=False, devices="auto").plan.devices


def test_a_device_without_room_is_refused_by_name():
    for vram in (64 * MIB, 0):
        with pytest.raises(DoesNotFitError, match="on cuda:1 with --ctx") as refused:
            chosen(DeviceInputs(SECOND, over(12.5), vram))
        assert refused.value.hint is not None and "--devices" in refused.value.hint
    spec = replace(known_spec(TARGET.name, "int4"), shared_params=known_spec(TARGET.name).layer_params[0])
    with pytest.raises(UnsupportedModelError, match="share blocks"):
        chosen(DeviceInputs(SECOND, over(12.5)), target=spec)


def test_a_smaller_plan_has_smaller_budgets_on_every_device():
    found = chosen(DeviceInputs(SECOND, over(12.5))).plan
    spec, small = known_spec(TARGET.name, "int4"), known_spec(DRAFT.name)
    request = replace(plan_request(TARGET, DRAFT, quant="int4", devices=BOTH), lowers_for_speed=False)
    others = (DeviceInputs(SECOND, over(12.5)),)
    inputs = PlanInputs(FIRST, over(12.5), over(12.5), lambda _: spec, small, others=others)
    smaller = smaller_plan(request, inputs, found)
    assert len(smaller.devices) == 2
    assert all(new.num_bytes < old.num_bytes for new, old in zip(smaller.devices, found.devices, strict=True))


@settings(deadline=None, max_examples=60)
@given(spec=specs(), free=st.tuples(st.integers(1, 60), st.integers(1, 60)), slots=st.sampled_from([None, 1, 2, 3]))
def test_plans_of_any_model_stay_within_all_budgets(spec: ModelSpec, free: tuple[int, int], slots: int | None):
    budgets = [each * MIB + 96 * MIB for each in free]
    devices = (DeviceChoice("cuda:0", budgets[0]), DeviceChoice("cuda:1", budgets[1]))
    try:
        found = chosen(
            DeviceInputs(SECOND, over(6.0), budgets[1]),
            target=spec,
            draft=False,
            devices=devices,
            vram_bytes=budgets[0],
            slots=slots,
            dtype="fp32",
        )
    except DoesNotFitError:
        return
    check(found.plan, spec)


def test_a_plan_may_keep_layers_in_a_cpus_memory_beside_pinned_ones():
    """What the CPU computes with counts as host memory, which is not pinned for others then."""
    machine = replace(CPU, device_free_bytes=12 * GIB, ram_available_bytes=12 * GIB)
    first = replace(FIRST, ram_available_bytes=12 * GIB)
    devices = (DeviceChoice("cuda:0"), DeviceChoice("cpu", 6 * GIB))
    plan = chosen(DeviceInputs(machine, UNKNOWN_RATES, 6 * GIB), first=first, devices=devices).plan
    assert plan.host_bytes >= plan.devices[1].num_bytes + sum(
        item.bytes for item in plan.host_ledger if item.item == "pinned layers"
    )
    assert plan.host_bytes <= 12 * GIB
