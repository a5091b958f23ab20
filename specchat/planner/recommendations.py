"""Recommend known models for a machine, best first; predicted without any network access."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.catalog.known_models import KnownModel, known_model, known_models
from specchat.models.catalog.ref import draft_candidates, parse_model
from specchat.models.sizes.geometry import layer_sizes, weight_bytes
from specchat.models.sizes.known_specs import active_params, known_spec
from specchat.planner.cost import Prediction
from specchat.planner.precision import lower_quants
from specchat.planner.rates import Rates
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_quickly
from specchat.records.model import ModelSource, ModelSpec, own_quant
from specchat.records.plan import Plan

ANYTHING = PlanRequest(ModelSource("", Path()), None, draft_is_open=True)
# People read 4 to 6 words a second; slower text makes them wait.
READING_TOK_PER_S = 5.0
# Bits per weight from which quantized models count as fine.
_FINE_BITS = 4.0


@dataclass(frozen=True)
class Recommendation:
    """A model with its plan and predicted speed on this machine.

    Attributes:
        model: entry of the model in the catalog.
        draft: draft that the plan uses, or None.
        plan: plan for the engine.
        prediction: expected speed.
        is_cached: whether the model is in the local cache.
        download_bytes: bytes to download, the draft included.
        disk_bytes: bytes of the download and of a repacked or quantized copy of the weights.
        capability: geometric mean of all and of active weights; meaningful only in comparisons.
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
    def is_coarse(self) -> bool:
        """Whether the weights take less than four bits each, which changes texts more than int4 does."""
        if self.model.stored != "gguf":
            return False
        spec = known_spec(self.model.id)
        return sum(layer_sizes(spec, spec.dtype)) * 8 < _FINE_BITS * spec.num_layer_params

    @property
    def reads_well(self) -> bool:
        """Whether text is written at least as fast as people read."""
        return self.prediction.tok_per_s >= READING_TOK_PER_S

    @property
    def command(self) -> str:
        """Command line that runs the model."""
        return f"specchat run {self.model.id}"


@dataclass(frozen=True)
class Recommendations:
    """Known models, grouped by whether they run on this machine.

    Attributes:
        best: models that run. Models at reading speed come first, the most capable first; then slower ones, the
            fastest first.
        too_large: ids of models that do not fit this machine's memory.
        no_disk: ids of models whose files do not fit on the disk.
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
    """Plan every known model and rank the ones that run.

    Args:
        asked: settings that the user has fixed; its models are ignored.
        machine: device, total memory and free memory.
        rates: rates of this machine.
        typical: typical rates of machines of this kind.
        cached: ids of the models in the local cache.
        free_disk_bytes: free bytes on the disk of models and packs.
    """
    found: list[Recommendation] = []
    too_large: list[str] = []
    no_disk: list[str] = []
    for model in known_models().values():
        if not model.offered:
            continue
        try:
            recommendation = recommend(model, asked, machine, rates, typical, cached)
        except (DoesNotFitError, UsageError):  # UsageError: the context is longer than the model allows
            too_large.append(model.id)
            continue
        if recommendation.disk_bytes > free_disk_bytes:
            no_disk.append(model.id)
        else:
            found.append(recommendation)
    return Recommendations(tuple(sorted(found, key=_rank)), tuple(too_large), tuple(no_disk))


def _rank(recommendation: Recommendation) -> tuple[float, ...]:
    """Return a sort key; smaller is better."""
    speed = recommendation.prediction.tok_per_s
    if not recommendation.reads_well:
        return 1, -speed
    return 0, -recommendation.capability, recommendation.is_coarse, -speed


def recommend(
    model: KnownModel,
    asked: PlanRequest,
    machine: Machine,
    rates: Rates,
    typical: Rates,
    cached: Collection[str] = (),
) -> Recommendation:
    """Plan a known model for this machine.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: the context is longer than the model allows.
    """
    draft = draft_for(model, cached) if asked.draft_is_open else None
    request = replace(asked, target=_source(model), draft=None if draft is None else _source(draft))
    draft_spec = None if draft is None else known_spec(draft.id)
    inputs = PlanInputs(
        machine=machine,
        rates=rates,
        typical=typical,
        target=lambda quant: known_spec(model.id, quant),
        draft=draft_spec,
        lower_drafts=() if draft_spec is None else _lower(draft_spec),
    )
    plan, prediction = choose_quickly(request, inputs)
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


def draft_for(model: KnownModel, cached: Collection[str] = ()) -> KnownModel | None:
    """Return the first cached draft of the model's family, or else the first; None if the family has none."""
    ids = [ref.text for ref in draft_candidates(parse_model(model.id))]
    ids.sort(key=lambda draft: draft not in cached)
    return known_model(ids[0]) if ids else None


def _source(model: KnownModel) -> ModelSource:
    """Return a source without files; a known model is planned from its catalog entry alone."""
    return ModelSource(model.id, Path())


def _checkpoint_bytes(model: KnownModel) -> int:
    if model.file_bytes:
        return model.file_bytes
    spec = known_spec(model.id)
    return weight_bytes(spec, spec.dtype)


def _copy_bytes(model: KnownModel, plan: Plan) -> int:
    """Return the bytes of the pack that the plan needs; 0 for an unquantized, fully resident model."""
    quant = own_quant(plan.quant)
    if _streams_in_place(model, plan) or (quant == "none" and not plan.placement.streamed):
        return 0
    return weight_bytes(known_spec(model.id, quant), plan.work.dtype)


def _streams_in_place(model: KnownModel, plan: Plan) -> bool:
    """Return whether layers stream from the downloaded file: a GGUF whose experts, if read one by one, lie apart."""
    return model.stored == "gguf" and (plan.experts is None or model.config["model_type"] != "gpt_oss")
