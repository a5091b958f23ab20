"""What a step may ask of a GPU, counted on a pretended one: kernels, copies over the link, and waits of the host.

Every number that grows here costs every user time, and every number that falls is written down lower. Faults that leave
something on the wrong device are planted, and must be caught by an error or by a count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.engines import NOTHING, make_plan, random_prompt
from support.loading import load_engine
from support.plans import changed
from support.pretended_gpu import CPU, Event, PretendedGpu, WrongDeviceError, move_in
from support.tiny_models import BASE, VOCAB, make_config, perturbed, random_model, save

from specchat.engine import loading, walk
from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.engine import Engine
from specchat.engine.kv_cache import LayerKv, TreeCache
from specchat.engine.layout import PassLayout
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Noise, Sampler
from specchat.engine.streaming import host_layers
from specchat.models.quant.formats import nf4
from specchat.models.quant.modules import Scratch
from specchat.records.generation import Sampling, Step
from specchat.records.model import ModelSource
from specchat.records.plan import Expectation

NUM_LAYERS = 4
BUDGET = 64
FEW_TOKENS = 16
SAMPLED = Sampling(temperature=0.8, seed=5)
PENALIZED = replace(SAMPLED, repetition_penalty=1.1)
Pair = tuple[ModelSource, ModelSource]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, model = tmp_path_factory.mktemp("pair"), random_model(make_config("llama"))
    return save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft")


@dataclass(frozen=True)
class StepCounts:
    """One step's events."""

    step: Step
    events: tuple[Event, ...]

    def of(self, *phases: str) -> Counter[str]:
        """Number of events by kind; copies of layers are apart."""
        mine = [event for event in self.events if event.phase in phases]
        return Counter("layer" if event.kind == "h2d" and event.stream != "compute" else event.kind for event in mine)


def counted(pair: Pair, sampling: Sampling = SAMPLED, num_tokens: int = 24, **changes: Any) -> list[StepCounts]:
    """All steps of an answer but the first one, which reads the prompt, and the last one, whose tree may be small."""
    with PretendedGpu(kernels=("triton",)) as gpu, engine_of(pair, **changes) as engine:
        found = list[StepCounts]()
        prompt = random_prompt(30, VOCAB)
        for step in engine.generate(prompt, sampling, stop_ids=NOTHING, max_tokens=num_tokens):
            found.append(StepCounts(step, tuple(gpu.events)))
            gpu.events.clear()
    return found[1:-1]


def engine_of(pair: Pair, **changes: Any) -> Engine:
    num_layers = changes.pop("num_layers", NUM_LAYERS)
    plan = make_plan(*pair, num_layers=num_layers, resident=(), tree_budget=BUDGET)
    plan = changed(
        plan, **{"device": "cuda:0", "dtype": "bf16", "in_ram": range(num_layers), "head_rows": 32, **changes}
    )
    return load_engine(plan, *pair)


def check_step(each: StepCounts, num_streamed: int) -> None:
    """The budgets that every step keeps."""
    drafting, verifying, walking = each.of("drafting"), each.of("verifying"), each.of("sampling")
    # The new tokens, and the finished tree; once more for a tree that grows for longer than the last ones.
    assert drafting["h2d"] <= 1 and drafting["d2h"] == drafting["wait"] <= 2
    # The layers, one other copy, and the waits of the streamer and of the end.
    assert verifying["layer"] == num_streamed and verifying["h2d"] <= 1 and verifying["d2h"] == 0
    assert verifying["wait"] <= max(num_streamed - 3, 0) + 1
    layers = {event.name for event in each.events if event.kind == "h2d" and event.stream != "compute"}
    assert layers == {"copy_ of pinned"}
    # One wait for each block of 32 nodes, and a copy for each but the first, whose rows follow one another.
    assert walking["d2h"] == walking["wait"] <= 2 and walking["h2d"] < walking["wait"]
    assert sum(each.of(phase)["h2d"] for phase in ("drafting", "verifying", "sampling", "rest")) <= 4


SLOWER = [pytest.param(*each, marks=pytest.mark.slow) for each in (("none", 44), ("int4", 64))]


@pytest.mark.parametrize(("quant", "kernels"), [("int8", 58), *SLOWER])
def test_budgets_of_a_step(quant: str, kernels: int, pair: Pair):
    for each in counted(pair, quant=quant):
        check_step(each, NUM_LAYERS)
        assert each.of("drafting")["wait"] >= 1
        assert each.of("verifying")["kernel"] <= kernels * NUM_LAYERS + 40
        rest = each.of("rest")
        # Keeping the path: its rows' places in both caches; the streamer's events have happened by then.
        assert rest["h2d"] <= 1 and rest["d2h"] == 0
        assert rest["kernel"] <= 4  # two for each cache, whatever the number of layers


def test_a_rule_that_ends_trees_costs_no_copy(pair: Pair):
    """The costs of passes cross the link along with the new tokens."""
    expected = Expectation(((1, 0.5), (65, 0.6)), ((1, 0.001), (8, 0.001)), BUDGET, 5.0, 9.0)
    steps = counted(pair, num_tokens=FEW_TOKENS, adaptive=True, expected=expected)
    assert any(each.step.tree_nodes for each in steps)
    assert all(each.of("drafting")["h2d"] <= 1 for each in steps)


MANY = [pytest.param(*each, marks=pytest.mark.slow) for each in (("int4", 128), ("int8", 128))]


@pytest.mark.parametrize(("quant", "num_experts"), [("int4", 24), *MANY])
def test_experts_of_a_layer_are_computed_together(quant: str, num_experts: int, tmp_path: Path):
    """A loop starts a dozen kernels for each expert, and waits for the numbers of their rows."""
    values = {"num_experts": num_experts, "num_experts_per_tok": 8, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    model = random_model(hf.Qwen3MoeConfig(**{**BASE, **values}))
    pair = save(model, tmp_path / "target"), save(random_model(make_config("llama")), tmp_path / "draft")
    for each in counted(pair, quant=quant, num_layers=2, num_tokens=5):
        verifying = each.of("verifying")
        assert verifying["kernel"] <= 86 * 2 + 40
        assert verifying["wait"] == 1 and verifying["h2d"] <= 1 and verifying["d2h"] == 0


@pytest.mark.slow
def test_a_walk_with_a_penalty_also_copies_the_text(pair: Pair):
    for each in counted(pair, PENALIZED):
        walking = each.of("sampling")
        assert walking["h2d"] == walking["wait"] <= 2


@pytest.mark.slow
def test_a_text_that_copies_waits_once_more_for_each_block(pair: Pair):
    for each in counted(pair, Sampling(), retrieval=True):
        walking = each.of("sampling")
        assert walking["h2d"] < walking["wait"] <= 4


# --- planted faults --------------------------------------------------------------------------------------------------


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose result stays on the CPU."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs).clone()  # what the function keeps stays where it is
        move_in(out, None)
        return out

    return moved


def buffers_on_cpu(load: Callable[..., TreeModel]) -> Callable[..., TreeModel]:
    """Loading that leaves the tables of rotary positions on the CPU, from where transformers moves them every pass."""

    def left(*args: Any, **kwargs: Any) -> TreeModel:
        model = load(*args, **kwargs)
        for buffer in model.skeleton.model.buffers():
            move_in(buffer, None)
        return model

    return left


def caches_on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    return lambda self, *args, **kwargs: init(self, *args[:3], CPU, *args[4:], **kwargs)


def looking(append: Callable[..., Any]) -> Callable[..., Any]:
    """Appending that looks at a value of every layer."""

    def appends(self: LayerKv, layout: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        assert values.sum().item() is not None
        return append(self, layout, keys, values)

    return appends


Plant = Callable[[pytest.MonkeyPatch], None]


def plant(owner: Any, name: str, change: Callable[[Any], Any]) -> Plant:
    return lambda patch: patch.setattr(owner, name, change(getattr(owner, name)))


# Name -> the fault, and changes of the plan in which it shows.
FAULTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "resident layers stay on the CPU": (
        plant(loading, "bind", lambda bind: lambda layer, views: (bind(layer, views), _to_cpu(layer))[0]),
        {"resident": (1,), "in_ram": (0, 2, 3)},
    ),
    "caches are made on the CPU": (plant(TreeCache, "__init__", caches_on_cpu), {}),
    "noise is drawn on the CPU": (plant(Noise, "_draw", on_cpu), {}),
    "scratch memory is taken on the CPU": (plant(Scratch, "of", on_cpu), {"quant": "int8"}),
    "a table of codes stays on the CPU": (plant(nf4, "dynamic_map", on_cpu), {"quant": "int4"}),
    "scores are brought to the CPU": (plant(TreeModel, "logits", on_cpu), {}),
    "rotary tables stay on the CPU": (plant(loading, "load_model", buffers_on_cpu), {}),
    "layers are copied from pageable memory": (
        plant(host_layers.Pinner, "__call__", lambda _: lambda self, blobs: None),
        {},
    ),
    "every layer waits for a value": (plant(LayerKv, "append", looking), {}),
    "draws wait one by one": (
        plant(Sampler, "best_tokens", lambda best: lambda *args: torch.stack([row.cpu() for row in best(*args)])),
        {},
    ),
    "the walk scores one node at a time": (plant(walk, "head_block_rows", lambda _: lambda *_: 1), {}),
    "ancestors cross the link by themselves": (
        plant(TreeModel, "_on_device", lambda moved: lambda self, ids, layout: moved(self, ids, _moved(layout))),
        {},
    ),
    "every draft pass waits for a value": (
        plant(DraftModel, "compute", lambda compute: lambda *args: _looked_at(compute(*args))),
        {},
    ),
}


def _to_cpu(layer: Any) -> None:
    for parameter in layer.parameters():
        move_in(parameter, None)


def _moved(layout: PassLayout) -> PassLayout:
    parts = [(part.seat, replace(part.layout, ancestors=part.layout.ancestors.to("cuda:0"))) for part in layout.parts]
    return PassLayout(parts)


def _looked_at(scores: torch.Tensor) -> torch.Tensor:
    assert scores[0, 0].item() is not None
    return scores


@contextmanager
def planted(fault: str) -> Iterator[dict[str, Any]]:
    make, changes = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        make(patch)
        yield changes


# One that raises, and one that only counts show.
QUICK = {"noise is drawn on the CPU", "every draft pass waits for a value"}


@pytest.mark.parametrize(
    "fault", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in FAULTS]
)
def test_planted_faults_are_caught(fault: str, pair: Pair):
    with planted(fault) as changes, pytest.raises((WrongDeviceError, AssertionError, TypeError)):
        for each in counted(pair, num_tokens=FEW_TOKENS, **changes):
            check_step(each, NUM_LAYERS - len(changes.get("resident", ())))


@pytest.mark.slow
def test_nothing_is_caught_without_a_fault(pair: Pair):
    steps = counted(pair, num_tokens=FEW_TOKENS, resident=(1,), in_ram=(0, 2, 3), quant="int4")
    assert steps and counted(pair, num_tokens=FEW_TOKENS)
    for each in steps:
        check_step(each, NUM_LAYERS - 1)
