"""While memory is short, engines give layers back: the memory is free, the text is the same, and the plan says so."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import NOTHING, make_plan, random_prompt
from support.loading import load_engine, prepare
from support.plans import changed
from support.pretended_gpu import PretendedGpu
from support.shortages import ShortMachine
from support.streamed import silent, tiny_packs
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.relief import choose_layers
from specchat.models.packs.pack import Pack
from specchat.records.generation import Sampling, Step
from specchat.records.model import ModelSource
from specchat.records.plan import LedgerItem, Plan, Stage
from specchat.units import GIB, KIB, MIB

NUM_LAYERS, NUM_TOKENS = 5, 24
SAMPLING = Sampling(temperature=0.8, seed=3)


@dataclass(frozen=True)
class Small:
    """A model of five layers, a draft that is often right, and the text of the model alone."""

    target: ModelSource
    draft: ModelSource
    pack: Pack
    prompt: list[int]
    text: list[int]

    def plan(self, resident: list[int], in_ram: list[int], slots: int) -> Plan:
        plan = make_plan(self.target, self.draft, num_layers=NUM_LAYERS, resident=resident, slots=slots)
        return changed(plan, in_ram=tuple(in_ram))


def write(engine: Engine, prompt: list[int], machine: ShortMachine, moments: dict[int, int | float]) -> list[Step]:
    """Write a text; before passes with these numbers, bytes are missing (int), or programs wait (percent, float)."""
    steps = engine.generate(prompt, SAMPLING, stop_ids=NOTHING, max_tokens=NUM_TOKENS)
    written: list[Step] = []
    while True:
        lack = moments.get(len(written))
        machine.calm()
        if isinstance(lack, float):
            machine.stalls(lack)
        elif lack is not None:
            machine.lacks(lack)
        step = next(steps, None)
        if step is None:
            return written
        written.append(step)


def tokens(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("small")
    with tiny_packs(folder):
        model = random_model(make_config("llama_tied")).bfloat16().float()
        target = save(model.bfloat16(), folder / "target")
        draft = save(perturbed(model, 0.03), folder / "draft")
        pack = prepare(target, "fp32", progress=silent, warn=silent)
        assert pack is not None
        prompt = random_prompt(20, VOCAB)
        with load_engine(make_plan(target, None, num_layers=NUM_LAYERS), target, None) as engine:
            text = tokens(write(engine, prompt, ShortMachine(folder / "calm"), {}))
        yield Small(target, draft, pack, prompt, text)


@given(
    tiers=st.lists(st.sampled_from(["device", "device", "ram", "disk"]), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    slots=st.integers(1, 3),
    packed=st.booleans(),
    moments=st.dictionaries(
        st.integers(0, 8), st.one_of(st.integers(1, 1500).map(lambda kib: kib * KIB), st.just(60.0)), max_size=4
    ),
    early=st.sets(st.integers(0, NUM_LAYERS - 1)),
)
@settings(deadline=None, max_examples=5)
def test_the_text_does_not_depend_on_moments_of_pressure(
    small: Small,
    tmp_path_factory: pytest.TempPathFactory,
    tiers: list[str],
    slots: int,
    packed: bool,
    moments: dict[int, int | float],
    early: set[int],
):
    """Some more layers are resident in a first stage, which the text outgrows."""
    resident = [index for index, tier in enumerate(tiers) if tier == "device"]
    in_ram = [index for index, tier in enumerate(tiers) if tier == "ram"]
    plan, machine = small.plan(resident, in_ram, slots), ShortMachine(tmp_path_factory.mktemp("machine"))
    sizes = [layer.nbytes for layer in small.pack.layers]
    at_first = tuple(sorted({*resident, *early}))
    if len(resident) < len(at_first) < NUM_LAYERS:
        plan = replace(plan, stages=(Stage(28, at_first),))
    with load_engine(plan, small.target, small.draft, small.pack if packed else None, watch=machine.watch()) as engine:
        before = engine.memory()
        for _ in range(2):
            steps = write(engine, small.prompt, machine, moments)
            assert tokens(steps) == small.text
            last = engine.plan.placement
            assert steps[-1].streamed_bytes == sum(sizes[index] for index in last.streamed)
        after = engine.memory()
        assert set(last.resident) <= set(resident) and set(last.in_ram) <= set(in_ram)
        num_given = len(resident) - len(last.resident) + len(in_ram) - len(last.in_ram)
        assert after.resident_layers == len(last.resident)
        if not plan.stages:
            assert after.given_back_layers == num_given
            assert after.device_peak_bytes <= before.device_peak_bytes or last.resident == tuple(resident)
        assert after.given_back_layers >= num_given  # layers of the first stage come from the disk later anyway
        if not moments:
            assert last == plan.placement


def test_one_warning_names_the_lack_and_the_layers(small: Small, tmp_path: Path):
    machine = ShortMachine(tmp_path)
    with load_engine(
        small.plan([0, 1, 2, 3, 4], [], 0), small.target, small.draft, small.pack, watch=machine.watch()
    ) as engine:
        steps = write(engine, small.prompt, machine, {1: KIB, 2: MIB, 3: MIB})
    assert tokens(steps) == small.text
    warnings = [step.warning for step in steps]
    assert [number for number, each in enumerate(warnings) if each] == [1]
    assert warnings[1] is not None and "\n" not in warnings[1]
    assert warnings[1].startswith("memory is short (") and "available): gave 3 layers (" in warnings[1]
    assert engine.plan.placement.tiers == ("disk",) * NUM_LAYERS


def test_memory_is_given_back_while_nobody_is_answered(small: Small, tmp_path: Path):
    """The next answer begins with the warning."""
    machine = ShortMachine(tmp_path)
    with load_engine(small.plan([0, 1, 2, 3, 4], [], 0), small.target, small.draft, watch=machine.watch()) as engine:
        assert tokens(write(engine, small.prompt, machine, {})) == small.text
        engine.relieve()
        assert not engine.plan.placement.streamed
        machine.stalls(50.0)
        engine.relieve()
        num_given = engine.memory().given_back_layers
        assert num_given == 4  # more than the two slots, by a quarter of the layers
        steps = write(engine, small.prompt, machine, {})
        assert tokens(steps) == small.text and steps[0].warning is not None and "50% of the time" in steps[0].warning
        assert engine.memory().given_back_layers == num_given


def test_the_ledger_follows(small: Small, tmp_path: Path):
    machine, size = ShortMachine(tmp_path), small.pack.layers[0].nbytes
    plan = replace(
        small.plan([0, 1, 2], [3], 1),
        ledger=(LedgerItem("resident layers", 3 * size), LedgerItem("slots", size), LedgerItem("head", 7)),
        host_ledger=(LedgerItem("layers in the page cache", size),),
        streamed_bytes_per_step=2 * size,
    )
    with load_engine(plan, small.target, small.draft, small.pack, watch=machine.watch()) as engine:
        write(engine, small.prompt, machine, {1: KIB})
        placement = engine.plan.placement
        assert len(placement.resident) == 2 and placement.in_ram == (3,) and placement.slots == 1
        assert engine.plan.ledger == (
            LedgerItem("resident layers", 2 * size),
            LedgerItem("slots", size),
            LedgerItem("head", 7),
        )
        assert engine.plan.streamed_bytes_per_step == 3 * size
        write(engine, small.prompt, machine, {0: MIB})
        assert engine.plan.placement.tiers == ("disk",) * NUM_LAYERS
        assert [item.item for item in engine.plan.ledger] == ["slots", "head"]
        assert [item.item for item in engine.plan.host_ledger] == ["reading"]
        assert engine.plan.streamed_bytes_per_step == NUM_LAYERS * size


STAGES = (Stage(30, (0, 1, 3, 4)),)  # the pass over the 31st token ends it: the pass of number 11
BEFORE, AFTER = 5, 15


@pytest.mark.parametrize("moments", [(BEFORE,), (AFTER,), (BEFORE, AFTER)], ids=["first", "last", "both"])
def test_a_stage_ends_and_memory_is_given_back(moments: tuple[int, ...], small: Small, tmp_path: Path):
    """Places, ledger and memory are those of an engine that was loaded with what is left."""
    machine, size = ShortMachine(tmp_path), small.pack.layers[0].nbytes
    plan = replace(
        small.plan([0, 1], [2, 3], 1),
        draft=None,
        stages=STAGES,
        ledger=(LedgerItem("resident layers", 2 * size), LedgerItem("slots", size)),
        host_ledger=(LedgerItem("layers in the page cache", 2 * size),),
        streamed_bytes_per_step=3 * size,
    )
    with load_engine(plan, small.target, None, small.pack, watch=machine.watch()) as engine:
        assert engine.memory().resident_layers == 4
        steps = write(engine, small.prompt, machine, dict.fromkeys(moments, size * 3 // 2))
        assert tokens(steps) == small.text
        left, memory, nbytes = engine.plan, engine.memory(), engine.target.nbytes
        assert memory.given_back_layers == 2 * len(moments)
        assert write(engine, small.prompt, machine, {})[-1].streamed_bytes == left.streamed_bytes_per_step
    num_layers = [step.streamed_bytes // size for step in steps]
    assert num_layers == sorted(num_layers) and num_layers[0] == 1 and num_layers[11] > num_layers[10]
    assert (num_layers[BEFORE] > 1) == (BEFORE in moments)
    place = left.placement
    assert memory.resident_layers == len(place.resident) and num_layers[-1] == len(place.streamed)
    assert sum(item.bytes for item in left.ledger) == size * (len(place.resident) + place.slots)
    cached = [item.bytes for item in left.host_ledger if item.item == "layers in the page cache"]
    assert sum(cached) == size * len(place.in_ram)
    were_given = {index for index in range(4) if place.tiers[index] == "disk"}
    assert were_given and all(were_given.isdisjoint(stage.resident) for stage in left.stages)
    with load_engine(replace(left, stages=()), small.target, None, small.pack) as engine:
        assert tokens(write(engine, small.prompt, machine, {})) == small.text
        assert engine.target.nbytes == nbytes


@pytest.mark.parametrize("moments", [(BEFORE,), (AFTER,), (BEFORE, AFTER)], ids=["first", "last", "both"])
def test_pinned_memory_is_given_back_in_a_stage(moments: tuple[int, ...], small: Small, tmp_path: Path):
    """A layer that is resident for now loses its copy in host memory, and stays resident until the stage ends."""
    machine, size = ShortMachine(tmp_path), small.pack.layers[0].nbytes
    plan = replace(changed(small.plan([0], [1, 2, 3], 1), device="cuda:0"), draft=None, stages=STAGES)
    with PretendedGpu() as gpu:
        with load_engine(plan, small.target, None, small.pack, watch=machine.watch()) as engine:
            steps = write(engine, small.prompt, machine, dict.fromkeys(moments, size * 3 // 2))
            left, memory = engine.plan.placement, engine.memory()
            kept = engine.target.kept
            pinned = sum(gpu.runtime.pinned.values())
            assert pinned == size * len(left.in_ram) + kept.slot_bytes(()) and kept.slot_bytes(()) == size
        assert not gpu.runtime.pinned
    assert tokens(steps) == small.text
    assert [step.streamed_bytes // size for step in steps] == [1] * 11 + [4] * (NUM_TOKENS - 11)
    assert memory.given_back_layers == 3 - len(left.in_ram) == (2 if len(moments) == 1 else 3)
    assert left.resident == (0,)


def test_expanded_layers_count_with_all_that_they_take(small: Small, tmp_path: Path):
    """Each of the five layers takes 100 KiB and a few bytes more than its file has, which no slot needs."""
    machine, size = ShortMachine(tmp_path), small.pack.layers[0].nbytes
    more, layers = 5 * 100 * KIB + 3, list(range(NUM_LAYERS))
    plan = changed(small.plan(layers, [], 0), expanded=tuple(layers), expanded_bytes=more)
    plan = replace(plan, ledger=(LedgerItem("resident layers", NUM_LAYERS * size + more), LedgerItem("head", 7)))
    with load_engine(plan, small.target, None, small.pack, watch=machine.watch()) as engine:
        write(engine, small.prompt, machine, {1: KIB})
        placement, given = engine.plan.placement, engine.memory()
        assert given.given_back_layers == 1 and given.given_back_bytes >= size + 100 * KIB
        assert placement.expanded == placement.resident and placement.expanded_bytes < more - 100 * KIB + 1
        assert engine.plan.streamed_bytes_per_step == size
        write(engine, small.prompt, machine, {0: MIB})
        assert engine.plan.placement.expanded == () and engine.plan.placement.expanded_bytes == 0
        assert [item.item for item in engine.plan.ledger] == ["head", "slots"]


def resident_pages() -> tuple[int, int]:
    """Bytes of this process's memory that only swap could hold, and of mapped files."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10, int(lines["RssFile"].split()[0]) << 10


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["device", "ram"])
def test_the_memory_is_returned(tier: str, tmp_path: Path):
    """Layers of 6 MiB: what is given back leaves this process, and slots stay."""
    with tiny_packs(tmp_path):
        config = make_config("llama")
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1024, 5
        target = save(random_model(config).bfloat16(), tmp_path / "target")
        pack = prepare(target, "fp32", progress=silent, warn=silent)
        assert pack is not None
        machine, size = ShortMachine(tmp_path), pack.layers[0].nbytes
        layers = tuple(range(5))
        plan = make_plan(target, None, num_layers=5, resident=layers if tier == "device" else ())
        plan = changed(plan, in_ram=() if tier == "device" else layers, slots=2)
        with load_engine(plan, target, None, pack, watch=machine.watch()) as engine:
            prompt = random_prompt(20, VOCAB)
            write(engine, prompt, machine, {})
            anonymous, mapped = resident_pages()
            text = tokens(write(engine, prompt, machine, {1: 2 * size}))
            anonymous_after, mapped_after = resident_pages()
            assert tokens(write(engine, prompt, machine, {})) == text
    assert size >= 6 * MIB
    lost = anonymous - anonymous_after if tier == "device" else mapped - mapped_after
    num_given = engine.plan.placement.tiers.count("disk")
    assert num_given == 4  # two of them make room for slots
    assert lost >= (num_given - (2 if tier == "device" else 0)) * size - 2 * MIB


class Kept:
    """Layers of one size, in two groups, and slots of that size."""

    def __init__(self, sizes: list[list[int]], slots: int, read: int) -> None:
        numbers = iter(range(99))
        self.groups = [{next(numbers): size for size in group} for group in sizes]
        self._slots, self._read = slots, read

    def num_slots(self, given: object) -> int:
        return min(self._slots, self._read + len(given))  # type: ignore[arg-type]

    def slot_bytes(self, given: object) -> int:
        return self.num_slots(given) * 10


def test_as_many_layers_are_given_as_free_the_bytes():
    assert len(choose_layers(Kept([[10] * 8, []], 2, 2), 25)) == 3  # type: ignore[arg-type]
    assert len(choose_layers(Kept([[10] * 8, []], 2, 0), 25)) == 5  # type: ignore[arg-type]  # slots must be made
    assert choose_layers(Kept([[10, 10], []], 2, 0), 25) == {}  # type: ignore[arg-type]  # slots would take it all
    assert len(choose_layers(Kept([[10] * 8, []], 2, 2), GIB)) == 8  # type: ignore[arg-type]


def test_layers_that_the_system_cannot_reclaim_go_first_and_from_everywhere():
    chosen = choose_layers(Kept([[10] * 20, [10] * 20], 1, 1), 100)  # type: ignore[arg-type]
    assert len(chosen) == 10 and max(chosen) < 20
    gaps = [b - a for a, b in zip(sorted(chosen), sorted(chosen)[1:], strict=False)]
    assert max(gaps) <= 3
