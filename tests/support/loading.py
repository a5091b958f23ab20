"""Models and engines of tests in one call: every choice as a keyword, whichever record it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from specchat.engine import loading
from specchat.engine.attention import tree_attention
from specchat.engine.engine import Engine
from specchat.engine.model import TreeModel
from specchat.hardware.pressure import MemoryWatch
from specchat.loading.engine import open_engine
from specchat.loading.request import ModelRequest
from specchat.models.checkpoint.dtypes import short_name
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.hf.kv_shapes import record_kv_shapes
from specchat.models.hf.skeleton import Skeleton
from specchat.models.packs.pack import Pack
from specchat.models.packs.prepare import prepare as prepare_weights
from specchat.models.weights.open import ModelWeights, open_reader, open_weights
from specchat.models.weights.recipe import Recipe
from specchat.planner.inputs import find_inputs
from specchat.planner.request import PlanRequest
from specchat.planner.search import choose_plan
from specchat.records.model import Dtype, ModelSource
from specchat.records.plan import ExpertSlots, Placement, Plan, PlanChoices, Workload
from support.plans import split_values

CPU = torch.device("cpu")


def _short(dtype: torch.dtype) -> Dtype:
    name = short_name(str(dtype))
    assert name is not None
    return name


def load_model(
    source: ModelSource,
    *,
    cache_rows: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    chunk_rows: int = 512,
    resident: Iterable[int] | None = None,
    num_slots: int = 0,
    in_ram: Iterable[int] = (),
    host_embeddings: bool = False,
    pack: Pack | None = None,
    quant: str = "none",
    seats: int = 1,
    tree_budget: int = 0,
    experts: ExpertSlots | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> TreeModel:
    """A model by itself; all layers are resident unless it is said which."""
    weights = open_weights(source, _short(dtype), quant, tree_attention)
    num_layers = len(weights.skeleton.layers)
    stays = tuple(range(num_layers)) if resident is None else tuple(resident)
    if experts is None:
        in_ram = tuple(index for index in in_ram if index not in stays and index < num_layers)
    work = Workload(
        device=str(device),
        dtype=_short(dtype),
        ctx=cache_rows - tree_budget,
        tree_budget=tree_budget,
        draft_rows=0,
        chunk_rows=chunk_rows,
        host_embeddings=host_embeddings,
        seats=seats,
    )
    placement = Placement(num_layers, stays, in_ram, num_slots, experts)
    return loading.load_model(weights, work, placement, cache_rows=cache_rows, pack=pack, warn=warn)


def load_engine(
    plan: Plan,
    target: ModelSource,
    draft: ModelSource | None,
    pack: Pack | None = None,
    draft_pack: Pack | None = None,
    warn: Callable[[str], None] = lambda _: None,
    watch: MemoryWatch | None = None,
) -> Engine:
    """An engine under a plan."""
    return open_engine(target, draft, plan, (pack, draft_pack), warn, watch)


def prepare(source: ModelSource, dtype: Dtype, quant: str = "none", **reports: Any) -> Pack | None:
    """The pack of a model; None if its own files are streamed."""
    with open_weights(source, dtype, quant, tree_attention) as weights:
        return prepare_weights(weights, **reports)


def opened(skeleton: Skeleton, checkpoint: Checkpoint, recipe: Recipe | None = None) -> ModelWeights:
    """Weights of a skeleton that a test has built."""
    dtype = _short(next(skeleton.model.parameters()).dtype)
    source = ModelSource("a model", checkpoint.folder)
    kv_shapes = record_kv_shapes(skeleton)
    reader = open_reader(skeleton, checkpoint, recipe)
    return ModelWeights(source, dtype, skeleton, checkpoint, recipe, reader, kv_shapes)


def plan_request(target: ModelSource, draft: ModelSource | None, device: str = "auto", **asked: Any) -> PlanRequest:
    """A request with its choices given flat."""
    choices, others = split_values(PlanChoices, {"device": device, **asked})
    return PlanRequest(target, draft, PlanChoices(**choices), **others)


def model_request(model: str | None = None, **asked: Any) -> ModelRequest:
    """A request for models with its choices given flat."""
    choices, others = split_values(PlanChoices, asked)
    return ModelRequest(model, choices=PlanChoices(**choices), **others)


def asking(request: PlanRequest, **changes: Any) -> PlanRequest:
    """The request with choices replaced."""
    choices, others = split_values(PlanChoices, changes)
    return replace(request, choices=replace(request.choices, **choices), **others)


def plan_here(request: PlanRequest) -> Plan:
    """The plan for this machine."""
    return choose_plan(request, find_inputs(request)).plan


class Quiet:
    """A reporter that hears and says nothing."""

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda _done, _total: None

    def warn(self, text: str) -> None:
        pass


def yes(_question: str) -> bool:
    """Agrees to every download."""
    return True
