"""Predicted pass times against a slow event simulation, and invariants of all predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loading import asking, plan_request
from support.machines import CUDA_TORCH, GIB, MEASURED, hardware, read_machine

from specchat.hardware.machine import Gpu, GpuSurvey, Machine, MatmulRate, PcieLink
from specchat.models.catalog.ref import demo_source
from specchat.planner.acceptance import TYPICAL_ACCEPTANCE, Acceptance
from specchat.planner.cost import CostModel, draft_batches
from specchat.planner.explain import ExplainedPlan
from specchat.planner.link_queue import LinkQueue
from specchat.planner.memory import build_ledger, bytes_beside_layers
from specchat.planner.placement import TierSizes, interleaved
from specchat.planner.rates import Rate, Rates, rates_of
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_plan
from specchat.records.limits import draft_width
from specchat.records.model import KvShape, ModelSource, ModelSpec, ParamSize
from specchat.records.plan import Placement, Workload

TARGET = demo_source("target")
DRAFT = demo_source("draft")


def model(
    name: str, *, layers: int, hidden: int, mlp: int, vocab: int, quant: str = "none", experts: int = 1, active: int = 1
) -> ModelSpec:
    """Return the sizes of a Llama-like model, with bytes by quantization format."""
    heads = hidden // 128
    layer = 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * mlp * experts
    item_bytes, share = {"none": (None, 1.0), "int8": (1, 1.016), "int4": (1, 0.516)}[quant]
    return ModelSpec(
        name=name,
        architecture="AnyForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        mlp_size=mlp * active,
        num_heads=heads,
        max_positions=32_768,
        dtype="bf16",
        num_params=layers * layer + 2 * vocab * hidden,
        num_layer_params=layers * layer,
        layer_params=((ParamSize(round(layer * share), item_bytes), ParamSize(2 * hidden)),) * layers,
        other_params=(ParamSize(vocab * hidden), ParamSize(vocab * hidden)),
        buffer_bytes=0,
        kv_shapes=(KvShape(8, 128, 128),) * layers,
        quant=quant,
    )


def small(quant: str = "none") -> ModelSpec:
    return model("8b", layers=32, hidden=4096, mlp=14336, vocab=128_256, quant=quant)


def large(quant: str = "none") -> ModelSpec:
    return model("70b", layers=80, hidden=8192, mlp=28672, vocab=128_256, quant=quant)


DRAFT_SPEC = model("1b", layers=16, hidden=2048, mlp=8192, vocab=128_256)


def card(vram_gib: int, capability: str | None = "8.9", gen: int | None = 4, width: int | None = 16) -> Gpu:
    total = vram_gib * GIB
    return Gpu("a card", "GPU-1", total, total - GIB // 2, capability, "550", PcieLink(gen, width, gen, width))


def with_card(gpu: Gpu, ram_gib: int = 64) -> tuple[Machine, Rates]:
    total = gpu.vram_total_bytes
    free_ram = (ram_gib - 4) * GIB
    machine = Machine("cuda:0", gpu.vram_free_bytes, free_ram, True, total + ram_gib * GIB, total)
    return machine, rates_of(hardware(GpuSurvey((gpu,))), machine)


def asked(**changes: object) -> PlanRequest:
    source = ModelSource("any", TARGET.path)
    return plan_request(source, DRAFT, **{"draft_is_open": True, **changes})  # type: ignore[arg-type]


# --- a pass, event by event ------------------------------------------------------------------------------------------


def simulated(queue: LinkQueue, layer_s: float, outside_s: float) -> float:
    """Simulate every slot fill and layer in order; return the seconds of the 12th pass."""
    resident = set(interleaved(queue.num_layers - queue.num_linked, queue.num_layers))
    released = [0.0] * max(queue.slots, 1)  # time when each slot was last released
    link_free, now, pass_s, count = 0.0, 0.0, 0.0, 0
    waiting: list[float] = []  # end times of slot fills
    for _ in range(12):
        now += outside_s
        begin = now
        for layer in range(queue.num_layers):
            if layer not in resident:
                slot = count % queue.slots
                link_free = max(link_free, released[slot]) + queue.arrival_s
                waiting.append(link_free)
                now = max(now, waiting[-1])
                count += 1
            now += layer_s
            if layer not in resident:
                released[slot] = now
        pass_s = now - begin
    return pass_s


@given(
    num_layers=st.integers(6, 80),
    share=st.floats(0, 1),
    arrival_s=st.floats(1e-3, 0.1),
    layer_s=st.floats(1e-3, 0.1),
    outside_s=st.floats(0, 1),
    slots=st.integers(2, 4),
)
@settings(deadline=None, max_examples=300)
def test_pass_time_matches_an_event_simulation(
    num_layers: int, share: float, arrival_s: float, layer_s: float, outside_s: float, slots: int
):
    """Predict within 10%, plus the time of one layer at either end."""
    num_linked = max(round(share * num_layers), slots + 1)
    queue = LinkQueue(num_layers, num_linked, arrival_s, slots)
    predicted = max(queue.computed_s(layer_s, outside_s), queue.linked_s(layer_s, outside_s))
    truth = simulated(queue, layer_s, outside_s)
    assert predicted == pytest.approx(truth, rel=0.1, abs=2 * max(arrival_s, layer_s))


def test_pass_time_of_ten_streamed_layers():
    """Each layer takes 0.1 s to arrive and 0.01 s to compute; two slots fill in the 0.5 s outside the pass."""
    queue = LinkQueue(10, 10, 0.1, 2)
    assert queue.linked_s(0.01, 0.5) == pytest.approx(10 * 0.1 - 2 * 0.1 + 0.01)
    assert queue.computed_s(0.01, 0.5) == pytest.approx(10 * 0.01)
    assert LinkQueue(10, 0, 0.0, 0).computed_s(0.01, 0.5) == pytest.approx(0.1)


def test_the_slower_of_disk_and_bus_limits_a_pass():
    """On a GPU, all streamed bytes cross the bus, and some also the disk link, concurrently."""
    machine, rates = with_card(card(8))
    assert (rates.host.per_s, rates.disk.per_s) == (25.6e9, 2.5e9)
    cost = CostModel(small(), None, "bf16", machine.device, rates, TYPICAL_ACCEPTANCE)
    layer = 436 << 20
    in_ram = cost.predict(TierSizes(32, 20, 0, 20 * layer, 0, 2), 0, adaptive=True)
    assert in_ram.link_s == pytest.approx(20 * layer / 25.6e9)
    mixed = cost.predict(TierSizes(32, 10, 10, 10 * layer, 10 * layer, 2), 0, adaptive=True)
    assert mixed.link_s == pytest.approx(10 * layer / 2.5e9) and mixed.bound == "link"
    on_cpu = CostModel(small(), None, "bf16", "cpu", rates, TYPICAL_ACCEPTANCE)
    assert on_cpu.predict(TierSizes(32, 20, 0, 20 * layer, 0, 2), 0, adaptive=True).link_s == 0.0


# --- what does not depend on the link --------------------------------------------------------------------------------


@given(nodes=st.integers(1, 2000))
def test_accepted_length_grows_with_diminishing_returns(nodes: int):
    before, here, after = (TYPICAL_ACCEPTANCE.tokens_per_step(n) for n in (nodes - 1, nodes, nodes + 1))
    assert 1.0 <= before < here < after and after - here <= here - before + 1e-9
    assert here <= 1 + nodes


def test_few_rows_compute_only_the_experts_they_use():
    machine, rates = with_card(card(24))
    sparse = model("moe", layers=48, hidden=2048, mlp=768, vocab=151_936, experts=128, active=8)
    dense = replace(sparse, mlp_size=768 * 128)
    few, many = (
        [
            CostModel(spec, DRAFT_SPEC, "bf16", machine.device, rates, TYPICAL_ACCEPTANCE)
            .predict(TierSizes(48, 0, 0, 0, 0, 0), nodes, adaptive=False)
            .compute_s
            for spec in (sparse, dense)
        ]
        for nodes in (1, 512)
    )
    assert few[0] < 0.3 * few[1] and many[0] > 3 * few[0]


def test_draft_batches_match_counts_of_the_demo():
    """Counted draft passes by tree size: 3.9, 7.8, 16, 22 and 25, including one for the context."""
    counted = {4: 2.9, 16: 6.8, 64: 15, 128: 21, 256: 24}
    for nodes, batches in counted.items():
        assert draft_batches(nodes) == pytest.approx(batches, rel=0.15)


@given(nodes=st.integers(1, 100_000))
def test_one_draft_pass_can_expand_a_whole_level(nodes: int):
    """All draft rows of a tree, dropped ones included, fit in the predicted number of passes."""
    assert draft_batches(nodes) >= 1.4 * nodes / draft_width(nodes)


def test_a_cpu_adds_fixed_costs_per_layer_and_per_draft_batch():
    """Measured matmul rates include neither cost; on a GPU there is neither. Its wider passes cost nothing here."""
    on_cpu = replace(MEASURED, device="cpu")
    machine = Machine("cpu", 64 * GIB, 64 * GIB, fast_bf16=True)
    typical, measured = (rates_of(hardware(GpuSurvey(())), machine, each) for each in (None, on_cpu))
    gpu, gpu_rates = with_card(card(24))
    assert typical.layer_s == measured.layer_s > 2 * gpu_rates.layer_s

    free_rows = replace(typical, matmul=tuple(replace(each, flop_per_s=each.rows * 1e11) for each in typical.matmul))

    def draft_s(device: str, num_on_disk: int) -> float:
        cost = CostModel(small(), DRAFT_SPEC, "bf16", device, free_rows, TYPICAL_ACCEPTANCE)
        placement = TierSizes(32, 0, num_on_disk, 0, num_on_disk << 28, 2)
        return cost.predict(placement, 64, adaptive=False).draft_s

    assert draft_s("cpu", 10) > draft_s("cpu", 0) > draft_s(gpu.device, 0) == draft_s(gpu.device, 10)


def test_many_rows_are_never_slower_than_several_times_fewer_rows():
    machine = Machine("cpu", 64 * GIB, 60 * GIB, 60 * GIB)
    disturbed = (MatmulRate(256, 1e11), MatmulRate(1, 2e10), MatmulRate(64, 3e11), MatmulRate(512, 4e11))
    rates = rates_of(hardware(GpuSurvey(())), machine, replace(MEASURED, device="cpu", matmul=disturbed))
    assert [(each.rows, each.flop_per_s) for each in rates.matmul] == [(1, 2e10), (64, 3e11), (256, 3e11), (512, 4e11)]


def test_only_resident_layers_are_predicted_at_the_rates_of_packed_matrices():
    found = read_machine("desktop-none-avx512bf16-64gb")
    rates = rates_of(found.hardware, found.machine)
    packed = replace(rates, packed=tuple(replace(rate, flop_per_s=3 * rate.flop_per_s) for rate in rates.matmul))

    def compute_s(rates: Rates, quant: str, **tiers: int) -> float:
        model = CostModel(small(quant), None, "bf16", "cpu", rates, TYPICAL_ACCEPTANCE)
        return model.predict(TierSizes(32, **tiers), 0, adaptive=False).compute_s

    streamed = {"num_on_disk": 32, "disk_bytes": 14 * GIB, "slots": 3}
    half = {"num_on_disk": 16, "disk_bytes": 7 * GIB, "slots": 3}
    before_s = compute_s(rates, "none")
    assert compute_s(packed, "none", **streamed) == compute_s(rates, "none", **streamed) == before_s
    assert compute_s(packed, "none") < 0.5 * before_s
    assert compute_s(packed, "none", **half) == pytest.approx((compute_s(packed, "none") + before_s) / 2)
    # Quantized matrices are only packed where they are kept dequantized.
    assert compute_s(packed, "int8") == compute_s(rates, "int8")
    assert compute_s(packed, "int8", num_expanded=32) < 0.5 * compute_s(rates, "int8", num_expanded=32)


def test_reads_slow_down_a_cpu_that_computes():
    """A pass that waits for its computing takes longer by the time of the reads, shared by all cores."""
    found = read_machine("desktop-none-avx512bf16-64gb")
    rates = replace(rates_of(found.hardware, found.machine), disk=Rate(1e12, "typical"))
    free = replace(rates, reading_s=0.0)
    streamed = TierSizes(32, num_on_disk=32, disk_bytes=14 * GIB, slots=3)
    slow_s, fast_s = (
        CostModel(small(), None, "bf16", "cpu", each, TYPICAL_ACCEPTANCE).predict(streamed, 0, adaptive=False).pass_s
        for each in (rates, free)
    )
    assert slow_s - fast_s == pytest.approx(14 * GIB * rates.reading_s)
    assert rates.reading_s * found.hardware.cpu.cores == pytest.approx(1.1e-10)


# --- plans -----------------------------------------------------------------------------------------------------------


def chosen(request: PlanRequest, machine: Machine, rates: Rates, target=large, draft=DRAFT_SPEC) -> ExplainedPlan:
    return choose_plan(request, PlanInputs(machine, rates, rates, target, draft))


def faster(rates: Rates, link: float, disk: float, compute: float) -> Rates:
    """Multiply the rates of the link, the disk and compute."""

    def times(rate: Rate, factor: float) -> Rate:
        return replace(rate, per_s=rate.per_s * factor)

    return replace(
        rates,
        disk=times(rates.disk, disk),
        pinned=None if rates.pinned is None else times(rates.pinned, link),
        pageable=times(rates.pageable, link),
        memory=times(rates.memory, compute),
        matmul=tuple(replace(rate, flop_per_s=rate.flop_per_s * compute) for rate in rates.matmul),
        dequantize_s={quant: seconds / compute for quant, seconds in rates.dequantize_s.items()},
        layer_s=rates.layer_s / compute,
    )


FACTORS = st.floats(1, 20)


@given(
    vram=st.integers(11 * GIB, 40 * GIB),
    more=st.integers(0, 10 * GIB),
    ram=st.integers(0, 60 * GIB),
    factors=st.tuples(FACTORS, FACTORS, FACTORS),
    quant=st.sampled_from(["none", "int8", "int4"]),
    device=st.sampled_from(["cuda:0", "cpu"]),
    budget=st.sampled_from([None, 64]),
)
@settings(deadline=None, max_examples=60)
def test_more_memory_or_faster_hardware_is_never_predicted_slower(vram, more, ram, factors, quant, device, budget):
    """Compare memory, links, disk and compute at the same model, precision and context."""
    machine, rates = with_card(card(24))
    machine = replace(machine, device=device)
    request = asked(vram_bytes=vram, ram_bytes=ram, quant=quant, ctx=2048, tree_budget=budget)
    little = chosen(request, machine, rates)
    much = chosen(asking(request, vram_bytes=vram + more), machine, faster(rates, *factors))
    assert much.prediction.tok_per_s >= little.prediction.tok_per_s * (1 - 1e-9)


def test_a_fitting_target_is_not_streamed_and_a_useless_draft_is_dropped():
    machine, rates = with_card(card(24))
    assert not chosen(asked(), machine, rates, small).plan.placement.streamed
    hopeless = PlanInputs(machine, rates, rates, small, DRAFT_SPEC, Acceptance(0.01, 1.0, "measured"))
    plain = choose_plan(asked(), hopeless)
    assert plain.plan.draft is None and plain.plan.work.tree_budget == 0 and plain.prediction.tokens_per_step == 1
    choice = next(each for each in plain.choices if each.option == "draft")
    assert choice.alternative is not None and choice.alternative.value == "1b"
    assert choice.alternative.tok_per_s < plain.prediction.tok_per_s
    kept = choose_plan(asked(draft_is_open=False), hopeless)
    assert kept.plan.draft == "1b" and "draft" in kept.pinned


def test_a_draft_that_does_not_fit_is_quantized():
    """The draft's precision never changes the text, so only speed decides; with enough memory it stays unquantized."""
    lower = tuple(
        model("1b", layers=16, hidden=2048, mlp=8192, vocab=128_256, quant=quant) for quant in ("int8", "int4")
    )
    machine, rates = with_card(card(8))

    def plan(drafts: tuple[ModelSpec, ...], **changes: object) -> ExplainedPlan:
        request = asked(**{"quant": "int4", "ctx": 512, "vram_bytes": 15 * GIB // 2, **changes})
        return choose_plan(request, PlanInputs(machine, rates, rates, large, DRAFT_SPEC, lower_drafts=drafts))

    assert plan(()).plan.draft is None, "the unquantized draft does not fit"
    chosen_here = plan(lower)
    assert chosen_here.plan.draft == "1b" and chosen_here.plan.draft_quant in ("int8", "int4")
    assert chosen_here.prediction.tok_per_s > 3 * plan(()).prediction.tok_per_s
    (choice,) = (each for each in chosen_here.choices if each.option == "draft-quant")
    assert choice.value == chosen_here.plan.draft_quant and not choice.pinned
    with_room = plan(lower, vram_bytes=100 * GIB)
    assert not with_room.plan.placement.streamed and with_room.plan.draft_quant == "none", (
        "quantizing would gain nothing"
    )


def test_the_precision_depends_on_total_memory_not_on_free_memory():
    def quant(vram_gib: int, target=small, **changes: object) -> str:
        machine, rates = with_card(card(vram_gib))
        plans = [
            choose_plan(asked(), PlanInputs(here, quick, rates, target, DRAFT_SPEC)).plan
            for here in (machine, replace(machine, device_free_bytes=machine.device_free_bytes - 2 * GIB))
            for quick in (rates, faster(rates, 20, 20, 20))
        ]
        (found,) = {plan.quant for plan in plans}
        assert {plan.lowered_from for plan in plans} == {None if found == "none" else "bf16"}
        return found

    assert quant(24) == "none", "it fits"
    assert quant(16) == "int8", "it does not fit, and half the bytes stream twice as fast"
    assert quant(24, large) == "int8"
    machine, rates = with_card(card(24), ram_gib=16)
    assert chosen(asked(), machine, rates).plan.quant == "int4", "int8 exceeds all memory"
    slow = faster(rates, 1, 1, 1e-3)  # computing takes so long that bytes do not matter
    unhurried = choose_plan(asked(), PlanInputs(replace(machine, total_bytes=200 * GIB), slow, slow, large, DRAFT_SPEC))
    assert unhurried.plan.quant == "none"


PINS = {
    "ctx": 1024,
    "tree-budget": 48,
    "slots": 4,
    "quant": "int4",
    "vram": 20 * GIB,
    "dtype": "fp16",
    "device": "cuda:0",
}


@pytest.mark.parametrize("option", PINS)
def test_user_settings_are_kept_and_marked_as_pinned(option: str):
    machine, rates = with_card(card(24))
    field = {"vram": "vram_bytes", "tree-budget": "tree_budget"}.get(option, option)
    found = chosen(asked(**{field: PINS[option]}), machine, rates)
    assert found.pinned == (option,)
    plan, value = found.plan, PINS[option]
    held = {
        "ctx": plan.work.ctx,
        "tree-budget": plan.work.tree_budget,
        "slots": plan.placement.slots,
        "quant": plan.quant,
        "vram": plan.vram_bytes,
        "dtype": plan.work.dtype,
        "device": plan.work.device,
    }
    assert held[option] == value
    assert plan.adaptive == (option != "tree-budget")
    assert chosen(asked(**{field: PINS[option]}), machine, rates) == found, "the same request gives the same plan"


def test_rates_name_their_basis():
    survey = GpuSurvey((card(24),))
    machine, typical = with_card(card(24))
    assert (typical.host.basis, typical.compute_basis, typical.disk.basis) == ("typical", "typical", "guessed")
    measured = rates_of(hardware(survey, torch=CUDA_TORCH), machine, MEASURED)
    assert (measured.host, measured.disk) == (Rate(25e9, "measured"), Rate(3e9, "measured"))
    assert measured.matmul == MEASURED.matmul and measured.compute_basis == "measured"
    unpinned = rates_of(hardware(survey), machine, replace(MEASURED, pinning_works=False))
    assert unpinned.host == Rate(6e9, "measured")
    _, unknown = with_card(card(24, None, None, None))
    assert (unknown.host.basis, unknown.compute_basis) == ("guessed", "guessed")
    widths = [
        with_card(card(24, gen=gen, width=width))[1].host.per_s for gen, width in ((3, 8), (3, 16), (4, 16), (5, 16))
    ]
    assert widths == sorted(widths) and widths[-1] == 8 * widths[0]


def test_rates_are_those_of_the_card_that_cuda_means():
    """The driver numbers cards by slot, CUDA by speed or as CUDA_VISIBLE_DEVICES says."""
    slow, fast = replace(card(8, gen=3, width=8), uuid="GPU-slow"), replace(card(24), uuid="GPU-fast")
    found = hardware(GpuSurvey((slow, fast)))
    machine, _ = with_card(fast)
    by_uuid = rates_of(found, replace(machine, gpu_uuid="GPU-fast"))
    by_number = rates_of(found, replace(machine, gpu_uuid="MIG-another"))
    assert by_uuid == with_card(fast)[1]
    assert by_number.host == with_card(slow)[1].host


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_adaptive_trees_start_from_the_prediction(device: str):
    machine, rates = with_card(card(24))
    machine = replace(machine, device=device)
    found = chosen(asked(draft_is_open=False, vram_bytes=20 * GIB), machine, rates)
    prediction, expected = found.prediction, found.plan.expected
    assert expected is not None
    assert (expected.tree_nodes, expected.tokens_per_step) == (prediction.tree_nodes, prediction.tokens_per_step)
    passes, batches = dict(expected.pass_s), dict(expected.draft_s)
    assert passes[1 + prediction.tree_nodes] == pytest.approx(prediction.pass_s - prediction.draft_s)
    least, most = min(batches.values()), max(batches.values())
    assert least <= 1.1 * prediction.draft_s / expected.draft_passes <= 1.2 * most
    assert list(passes) == sorted(passes) and max(passes) == 1 + max(found.plan.work.tree_budget, 512)
    pinned = chosen(asked(tree_budget=64), machine, rates)
    assert pinned.plan.expected is None


# --- answers that share a pass ---------------------------------------------------------------------------------------


def test_more_answers_bring_more_while_layers_stream():
    """Each seat takes a context of memory from the resident layers; speeds are those of all answers together."""
    machine, rates = with_card(card(24))
    found = [chosen(asked(ctx=1024, tree_budget=64, seats=seats), machine, rates) for seats in (1, 4, 10)]
    speeds = [each.prediction.tok_per_s for each in found]
    assert speeds == sorted(speeds) and speeds[2] > 2 * speeds[0]
    caches = [next(item.bytes for item in each.plan.ledger if item.item == "KV cache") for each in found]
    assert caches == pytest.approx([caches[0], 4 * caches[0], 10 * caches[0]], rel=0.01)  # blocks are rounded up
    resident = [len(each.plan.placement.resident) for each in found]
    assert resident == sorted(resident, reverse=True)
    assert [each.plan.work.seats for each in found] == [1, 4, 10]
    assert all(each.plan.device_bytes <= each.plan.vram_bytes for each in found)


def test_the_expectation_is_that_of_a_full_pass():
    machine, rates = with_card(card(24))
    expected = chosen(asked(ctx=1024, seats=10), machine, rates).plan.expected
    assert expected is not None and expected.num_sequences == 10
    assert expected.pass_s[0][0] == 10 and expected.tokens_per_step > 10


@pytest.mark.parametrize("seats", [1, 3, 10])
@pytest.mark.parametrize("host_embeddings", [False, True])
def test_the_quick_sum_is_that_of_the_ledger(seats: int, host_embeddings: bool):
    for tree_budget, ctx in ((0, 512), (64, 1024), (256, 8192)):
        draft = DRAFT_SPEC if tree_budget else None
        work = Workload("cuda:0", "bf16", ctx, tree_budget, 2 * tree_budget, 512, host_embeddings=host_embeddings)
        work = replace(work, seats=seats)
        ledger = build_ledger(small(), draft, work, Placement(32, (0, 1), slots=2))
        apart = sum(item.bytes for item in ledger if item.item not in ("resident layers", "slots"))
        assert bytes_beside_layers(small(), draft, work) == apart
