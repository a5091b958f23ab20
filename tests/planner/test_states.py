"""Memory of recurrent states: what the planner counts, from config.json alone, is what the engine allocates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import make_plan, random_prompt, write
from support.hybrids import HYBRIDS, LIKE_QWEN_27B, make_hybrid_config, random_hybrid
from support.loading import load_engine, plan_request
from support.planning import available, plan_for
from support.tiny_models import VOCAB, perturbed, save
from support.versions import newest_only

from specchat.engine.kv_cache import TreeCache
from specchat.engine.measuring import GenerationMemory
from specchat.hardware.machine import Machine
from specchat.models.sizes.describe import describe
from specchat.planner.memory import build_ledger
from specchat.planner.states import draft_state_bytes, num_points, restore_items, state_items
from specchat.records.generation import Sampling
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSource, ModelSpec
from specchat.records.plan import WEIGHT_ITEMS, Plan, Workload
from specchat.units import GIB, MIB


def spec_of(folder: Path, values: dict[str, object]) -> ModelSpec:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return describe(ModelSource(folder.name, folder))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(tmp_path_factory.mktemp("specs") / "qwen", LIKE_QWEN_27B)


@newest_only("older ones repeat the keys of heads before they compute")
def test_states_of_a_27b_shape(large: ModelSpec):
    """Figures by hand: 48 states of 3 MiB and 60 KiB; a node stashes 36.375 KiB a layer; 16 layers of 4 x 256 KV."""
    one_state = 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)
    assert sum(shape.state is not None for shape in large.kv_shapes) == 48
    assert large.kv_numbers_per_row * 2 == 64 << 10
    for nodes, stash in ((64, 109.125), (256, 436.5)):
        work = Workload("cpu", "bf16", 8192, nodes, 2 * nodes, 512)
        states, rows = state_items(large, work)
        assert states.bytes == 2 * one_state and one_state / MIB == pytest.approx(146.8, abs=0.05)
        workspace = nodes * (16 * 128 * 4 + 48 * 128 * 4 + 48 * 8)
        assert (rows.bytes - workspace) / MIB == stash
    (points,) = restore_items(large, None, work)
    assert points.bytes == 12 * one_state
    states, rows = state_items(large, replace(work, seats=3))
    assert states.bytes == 6 * one_state
    assert (rows.bytes - workspace) / MIB == 3 * stash
    assert restore_items(large, None, replace(work, seats=3)) == ()
    assert restore_items(large, None, replace(work, most_points=3))[0].bytes == 3 * one_state


def plan_with(target: ModelSpec, device: str, ram: int, **choices: int) -> Plan:
    asked = plan_request(ModelSource("target", Path("target")), None, device, dtype="bf16", ctx=2048, **choices)
    return plan_for(asked, Machine(device, 24 * GIB, available(ram), fast_bf16=True), target, None)


@pytest.mark.parametrize(
    ("ram", "num_points"), [(64 * GIB, 12), (16 * GIB, 12), (8 * GIB, 6), (2 * GIB, 2), (200 * MIB, 1), (100 * MIB, 0)]
)
@pytest.mark.parametrize("by", ["free memory", "--ram"])
def test_restore_points_take_what_layers_leave(large: ModelSpec, ram: int, num_points: int, by: str):
    """A 27B in 16 bits streams most layers: points take an eighth of the host memory, but two in any case."""
    free, choices = (64 * GIB, {"ram_bytes": ram}) if by == "--ram" else (ram, {})
    plan = plan_with(large, "cuda:0", free, **choices)
    assert plan.states is not None and plan.work.restore_points == plan.states.num_points == num_points
    host = {item.item: item.bytes for item in plan.host_ledger}
    assert host.get("restore points", 0) == num_points * plan.states.point_bytes
    assert host.get("restore points", 0) + host.get("pinned layers", 0) <= ram
    if ram == 64 * GIB:
        assert "disk" not in plan.placement.tiers


def test_on_a_cpu_restore_points_lie_within_all_memory(large: ModelSpec):
    """Resident layers fill the memory, and leave room for two points."""
    plan = plan_with(large, "cpu", 24 * GIB)
    points = next(item.bytes for item in plan.host_ledger if item.item == "restore points")
    assert plan.placement.streamed and plan.states is not None and plan.states.num_points >= 2
    assert plan.device_bytes + points <= 24 * GIB


def test_all_points_are_kept_where_everything_fits(large: ModelSpec):
    assert num_points(100, 1200, 0) == num_points(100, 5000, 3800) == 12
    assert [num_points(100, ram, 10**6) for ram in (99, 100, 300, 2400, 9700)] == [0, 1, 2, 3, 12]


@pytest.mark.parametrize(
    ("architecture", "dtype", "seats"),
    [
        pytest.param(name, *work, marks=pytest.mark.slow if (number + place) % 2 else ())
        for number, name in enumerate(HYBRIDS)
        for place, work in enumerate([("bf16", 1), ("fp32", 3)])
    ],
)
def test_the_engine_allocates_what_is_counted(architecture: str, dtype: Dtype, seats: int, tmp_path: Path):
    make_hybrid_config(architecture).save_pretrained(tmp_path)
    spec = describe(ModelSource("tiny", tmp_path))
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    rows = seats * 32 * spec.kv_numbers_per_row * DTYPE_BYTES[dtype]
    work = Workload("cpu", dtype, 23, 9, 9, 512, seats=seats)
    for grows in (False, True):
        cache = TreeCache(spec.kv_shapes, 32, torch_dtype, torch.device("cpu"), seats, tree_rows=9, grows=grows)
        items = state_items(spec, work)
        counted = draft_state_bytes(spec, work) if grows else sum(item.bytes for item in items)
        assert cache.nbytes == rows + counted


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3_5_text",
        "kimi_linear",
        "falcon_h1",
        pytest.param("lfm2_moe", marks=pytest.mark.slow),
        pytest.param("jamba", marks=pytest.mark.slow),
        pytest.param("minimax", marks=pytest.mark.slow),
        pytest.param("zamba2", marks=pytest.mark.slow),
    ],
)
def test_memory_of_generation_stays_within_the_ledger(architecture: str, tmp_path: Path):
    """Operations create nothing that the ledger does not count, and the ledger does not count much more."""
    model = random_hybrid(architecture)
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    specs = describe(target), describe(draft)
    num_layers = specs[0].num_layers
    plan = make_plan(target, draft, num_layers=num_layers, ctx=224, tree_budget=32, chunk_rows=128)
    plan = replace(plan, ledger=build_ledger(*specs, plan.work, plan.placement))
    with load_engine(plan, target, draft) as engine:
        assert engine.memory().device_peak_bytes == plan.device_bytes - _workspaces(plan)
        with (memory := GenerationMemory(engine)):
            for left in (72, 9):
                write(engine, random_prompt(224 - left, VOCAB, left), Sampling(temperature=0.8, seed=1), 8)
        models = engine.target, *engine._drafter.models
        points = sum(model.cache.recurrent.point_bytes for model in models)
    promised = plan.generation_bytes
    print(f"{architecture}: measured {memory.peak_bytes - points:,}, promised {promised:,}")
    assert memory.peak_bytes - points <= promised <= 1.5 * (memory.peak_bytes - points)


def _workspaces(plan: Plan) -> int:
    kept = {*WEIGHT_ITEMS, "KV cache", "draft KV cache", "recurrent states", "stashed tree rows", "draft states"}
    return sum(item.bytes for item in plan.ledger if item.item not in kept)
