"""What a machine can run of the models whose figures are shipped, best first: predicted, nothing looked up."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.catalog.known_models import KnownModel, known_model, known_models
from specchat.models.catalog.ref import draft_candidates, parse_model
from specchat.models.sizes.geometry import weight_bytes
from specchat.models.sizes.known_specs import active_params, known_spec
from specchat.planner.cost import Prediction
from specchat.planner.precision import lower_quants
from specchat.planner.rates import Rates
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_quickly
from specchat.records.model import ModelSource, ModelSpec, own_quant
from specchat.records.plan import Plan

ANYTHING = PlanRequest(ModelSource("", Path()), None, draft_is_open=True)
# People read 4 to 6 words a second; text that comes slower is waited for.
READING_TOK_PER_S = 5.0


@dataclass(frozen=True)
class Recommendation:
    """A model, and how it would run here.

    Attributes:
        model: its figures.
        draft: the model that would draft for it, or None.
        plan: for the engine.
        prediction: the speed to expect.
        is_cached: whether the model need not be downloaded any more.
        download_bytes: of what would have to be downloaded, the draft included.
        disk_bytes: that download, and a copy of the weights as they are streamed.
        capability: grows with what models of its size and kind are able to do; only good for comparing.
    """

    model: KnownModel
    draft: KnownModel | None
    plan: Plan
    prediction: Prediction
    is_cached: bool
    download_bytes: int
    disk_bytes: int
    capability: float

    @property
    def reads_well(self) -> bool:
        """Whether text comes at least as fast as it is read."""
        return self.prediction.tok_per_s >= READING_TOK_PER_S

    @property
    def command(self) -> str:
        """What to type."""
        return f"specchat run {self.model.id}"


@dataclass(frozen=True)
class Recommendations:
    """All of them.

    Attributes:
        best: those that run: first what comes as fast as it is read, the most capable first; then the others, the
            fastest first.
        too_large: ids of models that this machine's memory cannot run.
        no_disk: ids of models for whose files the disk has no room.
    """

    best: tuple[Recommendation, ...]
    too_large: tuple[str, ...]
    no_disk: tuple[str, ...]


def find_recommendations(
    asked: PlanRequest,
    machine: Machine,
    rates: Rates,
    typical: Rates,
    *,
    cached: Collection[str] = (),
    free_disk_bytes: int,
) -> Recommendations:
    """Plans for every known model.

    Args:
        asked: what the user has settled; the models in it do not matter.
        machine: the device, and memory as it is free now.
        rates: of the machine.
        typical: of such machines.
        cached: ids of the models in the local cache.
        free_disk_bytes: where models and copies of them lie.
    """
    found: list[Recommendation] = []
    too_large: list[str] = []
    no_disk: list[str] = []
    for model in known_models().values():
        if not model.offered:
            continue
        try:
            offer = recommend(model, asked, machine, rates, typical, cached)
        except (DoesNotFitError, UsageError):  # a context that the model has no positions for
            too_large.append(model.id)
            continue
        if offer.disk_bytes > free_disk_bytes:
            no_disk.append(model.id)
        else:
            found.append(offer)
    return Recommendations(tuple(sorted(found, key=_rank)), tuple(too_large), tuple(no_disk))


def _rank(offer: Recommendation) -> tuple[float, ...]:
    """Smaller is better."""
    speed = offer.prediction.tok_per_s
    return (0, -offer.capability, -speed) if offer.reads_well else (1, -speed)


def recommend(
    model: KnownModel,
    asked: PlanRequest,
    machine: Machine,
    rates: Rates,
    typical: Rates,
    cached: Collection[str] = (),
) -> Recommendation:
    """The plan for a known model.

    Raises:
        DoesNotFitError: there is none.
        UsageError: a context that the model has no positions for.
    """
    draft = _draft_for(model, cached) if asked.draft_is_open else None
    request = replace(asked, target=_source(model), draft=None if draft is None else _source(draft))
    draft_spec = None if draft is None else known_spec(draft.id)
    known = PlanInputs(
        machine=machine,
        rates=rates,
        typical=typical,
        target=lambda quant: known_spec(model.id, quant),
        draft=draft_spec,
        lower_drafts=() if draft_spec is None else _lower(draft_spec),
    )
    plan, prediction = choose_quickly(request, known)
    used = None if plan.draft is None else draft
    download_bytes = sum(_checkpoint_bytes(each) for each in (model, used) if each and each.id not in cached)
    return Recommendation(
        model=model,
        draft=used,
        plan=plan,
        prediction=prediction,
        is_cached=model.id in cached,
        download_bytes=download_bytes,
        disk_bytes=download_bytes + _copy_bytes(model, plan),
        capability=math.sqrt(known_spec(model.id).num_params * active_params(model)),
    )


def _lower(draft: ModelSpec) -> tuple[ModelSpec, ...]:
    return tuple(known_spec(draft.name, quant) for quant in lower_quants(draft))


def _draft_for(model: KnownModel, cached: Collection[str]) -> KnownModel | None:
    """The first draft of the model's family, or the first that is there."""
    ids = [ref.text for ref in draft_candidates(parse_model(model.id))]
    ids.sort(key=lambda draft: draft not in cached)
    return known_model(ids[0]) if ids else None


def _source(model: KnownModel) -> ModelSource:
    """Stands for files that nobody will open."""
    return ModelSource(model.id, Path())


def _checkpoint_bytes(model: KnownModel) -> int:
    spec = known_spec(model.id)
    return weight_bytes(spec, spec.dtype)


def _copy_bytes(model: KnownModel, plan: Plan) -> int:
    """Of the weights as they are streamed, or quantized; a model that stays whole and as it is needs none."""
    quant = own_quant(plan.quant)
    if quant == "none" and not plan.placement.streamed:
        return 0
    return weight_bytes(known_spec(model.id, quant), plan.work.dtype)
