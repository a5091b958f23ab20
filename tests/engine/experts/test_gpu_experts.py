"""A pool of experts on a pretended GPU: the bits and the text of the CPU, and what a layer may ask of a GPU.

test_gpu_order.py checks the order of queued work.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import make_plan, random_prompt, write
from support.fp4 import mxfp4, nvfp4
from support.gguf_files import save_gguf
from support.interrupts import CancelAt
from support.loading import asking, load_engine, load_model, plan_request, prepare
from support.moe import ARCHITECTURES, NUM_EXPERTS, make_moe_config, passes
from support.planning import UNKNOWN_RATES
from support.pretended_gpu import PretendedGpu
from support.pretended_runtime import PretendedRuntime
from support.quantized import awq, block_fp8, gptq, save_quantized
from support.streamed import silent, tiny_packs
from support.threads import watched_threads
from support.tiny_models import VOCAB, perturbed, random_model, save

from specchat.engine.model import PassCancelledError, TreeModel
from specchat.hardware.machine import Machine
from specchat.models.hf.expert_tables import ExpertTables
from specchat.models.hf.routers import Routers
from specchat.models.sizes.describe import describe
from specchat.planner.candidates import Candidates
from specchat.planner.experts import expert_options
from specchat.planner.memory import build_ledger
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.records.generation import Request, Sampling
from specchat.records.limits import EXPERT_WINDOWS
from specchat.records.model import ModelSource
from specchat.records.plan import ExpertSlots, Plan
from specchat.units import GIB

GPU = torch.device("cuda:0")
GIVEN: dict[str, Any] = {"cache_rows": 256, "chunk_rows": 16, "tree_budget": 64}
TREES = (1, 16)
SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=5)
# All experts in host memory, some, and none; pools of one layer's experts, and of up to two.
TIERS = (NUM_EXPERTS, 5, 0)
QUOTAS = (0, 3)


@dataclass(frozen=True)
class Made:
    """A checkpoint, how it is loaded, and the hidden states of its passes on the CPU."""

    source: ModelSource
    given: dict[str, Any]
    expected: list[torch.Tensor]


class Models:
    """Tiny models; made on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str], Made] = {}

    def get(self, architecture: str, quant: str = "none") -> Made:
        key = architecture, quant
        if key not in self._made:
            folder = self._root / "-".join(key)
            source = save(random_model(make_moe_config(architecture)), folder)
            given = {**GIVEN, "quant": quant}
            if quant != "none":
                given["pack"] = prepare(source, "fp32", quant, progress=silent, warn=silent, by_experts=True)
            with closing(load_model(source, **given)) as model:
                self._made[key] = Made(source, given, list(passes(model, TREES)))
        return self._made[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    root = tmp_path_factory.mktemp("gpu-experts")
    with tiny_packs(root):
        yield Models(root)


@contextmanager
def on_gpu(made: Made, slots: ExpertSlots, **changes: Any) -> Iterator[tuple[PretendedGpu, TreeModel]]:
    capability = changes.pop("capability", (8, 9))
    with watched_threads(), PretendedGpu(capability) as gpu:
        with closing(load_model(made.source, **{**made.given, **changes}, device=GPU, experts=slots)) as model:
            yield gpu, model
        assert not gpu.runtime.pinned


def check(made: Made, slots: ExpertSlots, **changes: Any) -> None:
    with on_gpu(made, slots, **changes) as (gpu, model):
        before = bytes_copied(gpu)
        found = [states.cpu() for states in passes(model, TREES)]
        counters = model.streamer.counters()
        moved = bytes_copied(gpu) - before
    assert all(map(torch.equal, made.expected, found)), slots
    assert counters.expert_misses and counters.expert_hits
    if slots.in_host == NUM_EXPERTS:  # threads, which read the others, are not counted
        copies = counters.expert_misses + counters.useless_guesses
        assert counters.num_bytes <= moved <= copies * (counters.num_bytes // copies + 4096)


def bytes_copied(gpu: PretendedGpu) -> int:
    return sum(event.nbytes for event in gpu.events if event.kind == "h2d" and event.stream != "compute")


@pytest.mark.slow
def test_passes_have_the_bits_of_the_cpu(models: Models):
    check(models.get("qwen3_moe", "int4"), ExpertSlots(3, NUM_EXPERTS, in_host=5))


@pytest.mark.slow
@pytest.mark.parametrize("in_host", TIERS)
@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_have_the_bits_of_the_cpu_in_every_pool(
    models: Models, architecture: str, quant: str, quota: int, in_host: int
):
    made = models.get(architecture, quant)
    check(made, ExpertSlots(quota, NUM_EXPERTS, in_host=in_host))
    num_layers = describe(made.source).num_layers
    uses = tuple(tuple((7 * e + layer) % NUM_EXPERTS / NUM_EXPERTS for e in range(NUM_EXPERTS)) for layer in range(9))
    experts = describe(made.source).experts
    assert experts is not None and len(experts.layers) <= num_layers
    check(made, ExpertSlots(quota, NUM_EXPERTS, uses[: len(experts.layers)], looks_ahead=False, in_host=in_host))


KINDS = {
    "awq": awq(16),
    "fp8": block_fp8((32, 32)),
    "mxfp4": mxfp4(),
    "reordered": gptq(act_order=True),
    "nvfp4": nvfp4(),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_come_quantized_have_the_bits_of_the_cpu(kind: str, tmp_path: Path):
    """The kernel cannot read the last two: then experts are computed one by one."""
    source = save_quantized(random_model(make_moe_config("qwen3_moe")), tmp_path, KINDS[kind]).quantized
    with tiny_packs(tmp_path):
        given = {**GIVEN, "quant": describe(source).quant}
        given["pack"] = prepare(source, "fp32", given["quant"], progress=silent, warn=silent, by_experts=True)
        with closing(load_model(source, **given)) as model:
            made = Made(source, given, list(passes(model, TREES)))
        check(made, ExpertSlots(3, NUM_EXPERTS, in_host=5))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["Q4_0", "Q8_0", "F16"])
def test_experts_of_gguf_files_have_the_bits_of_the_cpu(block: str, tmp_path: Path):
    source = save_gguf(random_model(make_moe_config("qwen3_moe")), tmp_path / "model.gguf", block)
    with tiny_packs(tmp_path):
        with closing(load_model(source, **GIVEN)) as model:
            made = Made(source, GIVEN, list(passes(model, TREES)))
        check(made, ExpertSlots(3, NUM_EXPERTS, in_host=5))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "quant"), [("gpt_oss", "none"), ("qwen3_moe", "int4")])
def test_a_gpu_without_the_kernel_computes_experts_one_by_one(models: Models, architecture: str, quant: str):
    check(models.get(architecture, quant), ExpertSlots(3, NUM_EXPERTS, in_host=5), capability=(7, 0))


def test_wrong_guesses_and_cancelled_passes_leave_no_trace(models: Models, monkeypatch: pytest.MonkeyPatch):
    check_cancelled(models, "qwen3_moe", 5, 5, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("in_host", TIERS)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_many_cancelled_passes_leave_no_trace(
    models: Models, architecture: str, in_host: int, monkeypatch: pytest.MonkeyPatch
):
    check_cancelled(models, architecture, in_host, 200, monkeypatch)


def check_cancelled(
    models: Models, architecture: str, in_host: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel passes at random layers, with random guesses; the passes that follow must compute the same bits."""
    rng, draws = random.Random(7), torch.Generator().manual_seed(2)
    tokens = [random_prompt(rng.choice((1, 3, 20)), VOCAB, seed) for seed in range(times)]
    made = models.get(architecture, "int4")
    with closing(load_model(made.source, **made.given)) as model:
        expected = [fresh(model, text) for text in tokens]

    def guess(*_: object) -> torch.Tensor:
        return torch.randint(0, NUM_EXPERTS + 1, (9, 2), generator=draws).to(GPU)

    monkeypatch.setattr(Routers, "likely", guess)
    with on_gpu(made, ExpertSlots(2, NUM_EXPERTS, in_host=in_host)) as (_, model):
        for text, want in zip(tokens, expected, strict=True):
            with pytest.raises(PassCancelledError):
                fresh(model, text, CancelAt(rng.randint(1, 4)))
            assert torch.equal(fresh(model, text), want)
        assert model.streamer.counters().useless_guesses


def fresh(model: TreeModel, tokens: list[int], cancel: Any = None) -> torch.Tensor:
    """The states of a text that begins anew."""
    model.cache.truncate(0, 0)
    return model.append(tokens, cancel).cpu()


@pytest.mark.slow
def test_memory_that_cannot_be_pinned_leaves_experts_to_the_page_cache(models: Models, monkeypatch: pytest.MonkeyPatch):
    made, said = models.get("qwen3_moe", "int4"), list[str]()
    register = PretendedRuntime.cudaHostRegister

    def refuse(self: PretendedRuntime, address: int, nbytes: int, flags: int) -> int:
        self.refuses_to_pin = self.refuses_to_pin or len(self.pinned) > EXPERT_WINDOWS
        return register(self, address, nbytes, flags)

    monkeypatch.setattr(PretendedRuntime, "cudaHostRegister", refuse)
    check(made, ExpertSlots(3, NUM_EXPERTS, in_host=5), warn=said.append)
    assert len(said) == 1 and "page cache" in said[0]


# --- text -----------------------------------------------------------------------------------------------------------


def planned(target: ModelSource, draft: ModelSource, device: str, slots: ExpertSlots | None, **changes: Any) -> Plan:
    spec, draft_spec = describe(target), describe(draft)
    plan = make_plan(target, draft, num_layers=spec.num_layers, tree_budget=16, chunk_rows=24)
    work = replace(plan.work, device=device, **changes)
    plan = replace(plan, work=work, placement=replace(plan.placement, experts=slots))
    return replace(plan, ledger=build_ledger(spec, draft_spec, plan.work, plan.placement))


_EXACT = {
    *("resident layers", "expert pool", "expert slots", "small tensors of experts", "embeddings and head", "head"),
    *("KV cache", "draft", "draft KV cache"),
}
MOST = [
    pytest.param(each, marks=pytest.mark.slow) for each in ARCHITECTURES if each not in ("gpt_oss", "qwen3_5_moe_text")
]


@pytest.mark.parametrize("architecture", ["gpt_oss", *MOST])
def test_text_and_memory_are_as_planned(models: Models, architecture: str, tmp_path: Path):
    """gpt-oss has small tensors of experts, which stay in the GPU's memory."""
    model, prompt = random_model(make_moe_config(architecture)), random_prompt(30, VOCAB)
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    with load_engine(planned(target, draft, "cpu", None), target, draft) as engine:
        expected, _ = write(engine, prompt, SAMPLED, 16)
    plan = planned(target, draft, "cuda:0", ExpertSlots(3, NUM_EXPERTS, in_host=NUM_EXPERTS))
    with PretendedGpu(), load_engine(plan, target, draft) as engine:
        text, steps = write(engine, prompt, SAMPLED, 16)
        measured = sum(each.nbytes for each in engine._meter._models)
    assert text == expected
    assert sum(step.expert_misses for step in steps) and sum(step.expert_hits for step in steps)
    assert measured == sum(item.bytes for item in plan.ledger if item.item in _EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_plan_of_the_planner_is_loaded_as_it_says(architecture: str, tmp_path: Path):
    """With half of the experts in VRAM, and a part of the others in RAM."""
    model, prompt = random_model(make_moe_config(architecture)), random_prompt(30, VOCAB)
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    spec, draft_spec = describe(target), describe(draft)
    machine = Machine("cuda:0", 2 * GIB, GIB, fast_bf16=True, total_bytes=4 * GIB, device_total_bytes=2 * GIB)
    inputs = PlanInputs(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: spec, draft_spec)
    request = plan_request(target, draft, "cuda:0", ctx=128, tree_budget=16, quant="none")
    experts = expert_options(spec, "fp32", on_gpu=True)
    assert experts is not None
    one_each = len(experts.layers) * experts.slot_bytes
    vram_bytes = choose_plan(request, inputs).plan.device_bytes - NUM_EXPERTS // 2 * one_each
    request = asking(request, vram_bytes=vram_bytes, ram_bytes=10 * one_each)
    found = [each for each in Candidates(request, inputs, spec).all if each.sizes.experts is not None]
    plan = found[-1].plan(request.choices, machine)
    slots = plan.placement.experts
    assert slots is not None and slots.in_host == 10 and 0 < slots.quota < NUM_EXPERTS // 2
    with load_engine(planned(target, draft, "cpu", None), target, draft) as engine:
        expected, _ = write(engine, prompt, SAMPLED, 16)
    with PretendedGpu() as gpu, load_engine(plan, target, draft) as engine:
        pinned = sum(nbytes for nbytes in gpu.runtime.pinned.values())
        text, _ = write(engine, prompt, SAMPLED, 16)
        measured = sum(each.nbytes for each in engine._meter._models)
    assert text == expected
    assert measured == sum(item.bytes for item in plan.ledger if item.item in _EXACT)
    counted = sum(item.bytes for item in plan.host_ledger if item.item.startswith("pinned"))
    assert counted <= pinned <= counted + 2 * 2**20  # windows are a little longer than what they read, and one table


@pytest.mark.slow
def test_answers_that_share_passes_are_those_of_the_cpu(models: Models, tmp_path: Path):
    model, texts = random_model(make_moe_config("qwen3_moe")), list[dict[int, list[int]]]()
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    prompts = [tuple(random_prompt(length, VOCAB, seed=length)) for length in (5, 33, 17, 9)]
    requests = [Request(prompt, SAMPLED, max_tokens=12) for prompt in prompts]
    for device, slots in (("cpu", None), ("cuda:0", ExpertSlots(2, NUM_EXPERTS, in_host=8))):
        plan = planned(target, draft, device, slots, seats=3)
        with PretendedGpu(), load_engine(plan, target, draft) as engine:
            texts.append({index: [] for index in range(len(requests))})
            for index, step in engine.generate_many(requests):
                texts[-1][index] += step.token_ids
    assert texts[0] == texts[1]


# --- what a layer asks of a GPU -------------------------------------------------------------------------------------


def counted(models: Models, architecture: str, quant: str) -> tuple[list[Counter[tuple[str, str]]], int]:
    """Events of some passes by kind and stream, and the number of layers with experts."""
    made, found = models.get(architecture, quant), list[Counter[tuple[str, str]]]()
    with on_gpu(made, ExpertSlots(3, NUM_EXPERTS, in_host=NUM_EXPERTS), chunk_rows=64) as (gpu, model):
        model.append(random_prompt(9, VOCAB))  # the first pass finds the routers
        for seed in range(4):
            before = model.streamer.counters()
            gpu.events.clear()
            model.append(random_prompt(4, VOCAB, seed))
            kinds = Counter((event.kind, event.stream) for event in gpu.events)
            after = model.streamer.counters()
            kinds["moved", ""] = after.expert_misses + after.useless_guesses
            kinds["moved", ""] -= before.expert_misses + before.useless_guesses
            found.append(kinds)
        experts = describe(made.source).experts
        assert experts is not None
        return found, len(experts.layers)


# Kernels of a whole layer: the grouped products, the router, and the router of the next layer.
KERNELS = [("qwen3_moe", "int4", 96), pytest.param("gpt_oss", "none", 100, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("architecture", "quant", "kernels"), KERNELS)
def test_budgets_of_a_layer(models: Models, architecture: str, quant: str, kernels: int):
    """Ids and guesses cross the link together, and one table goes back; experts go by a stream of their own."""
    found, num_layers = counted(models, architecture, quant)
    for kinds in found:
        assert kinds["d2h", "compute"] == kinds["wait", "compute"] == num_layers
        assert kinds["h2d", "compute"] <= num_layers + 1  # and the tokens of the pass
        assert (
            kinds["h2d", "side 1"] <= kinds["moved", ""] + NUM_EXPERTS
        )  # guesses of the last layer are not counted yet
        assert kinds["kernel", "compute"] <= kernels * num_layers + 40
        assert kinds["wait", "side 1"] == 0


# --- planted faults --------------------------------------------------------------------------------------------------


def wrong_slot(place: Any) -> Any:
    return lambda self, slots: place(self, slots[::-1].copy())


def stale_table(place: Any) -> Any:
    """The addresses of a layer before."""
    return lambda self, slots: (
        None if getattr(self, "was_here", False) else (setattr(self, "was_here", True), place(self, slots))
    )


@pytest.mark.parametrize("fault", [wrong_slot, pytest.param(stale_table, marks=pytest.mark.slow)])
def test_planted_faults_change_the_bits(fault: Any, models: Models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ExpertTables, "place", fault(ExpertTables.place))
    made = models.get("qwen3_moe", "int4")
    with on_gpu(made, ExpertSlots(3, NUM_EXPERTS, in_host=NUM_EXPERTS)) as (_, model):
        found = [states.cpu() for states in passes(model, TREES)]
    assert not all(map(torch.equal, made.expected, found))


@pytest.mark.slow
def test_a_second_copy_of_ids_exceeds_the_budget(models: Models, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "specchat.engine.experts.gpu_loading._to_host",
        lambda ids, likely: (ids.cpu(), None if likely is None else likely.cpu()),
    )
    found, num_layers = counted(models, "qwen3_moe", "int4")
    assert any(kinds["d2h", "compute"] > num_layers for kinds in found)


# --- a real GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("architecture", "quant"), [("qwen3_moe", "int8"), ("qwen3_moe", "int4"), ("gpt_oss", "none")])
def test_every_pool_gives_the_same_bits_on_a_gpu(models: Models, architecture: str, quant: str):
    """All experts in VRAM, and pools of any size from RAM and disk, with guesses and without."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made, found = models.get(architecture, quant), list[list[torch.Tensor]]()
    for slots in (
        ExpertSlots(NUM_EXPERTS, NUM_EXPERTS, in_host=NUM_EXPERTS),
        ExpertSlots(3, NUM_EXPERTS, in_host=NUM_EXPERTS),
        ExpertSlots(0, NUM_EXPERTS, looks_ahead=False, in_host=5),
        ExpertSlots(3, NUM_EXPERTS),
    ):
        with closing(load_model(made.source, **made.given, device=GPU, experts=slots)) as model:
            found.append([states.cpu() for _ in range(5) for states in again(model)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def again(model: TreeModel) -> Iterator[torch.Tensor]:
    model.cache.truncate(0, 0)
    yield from passes(model, TREES)
