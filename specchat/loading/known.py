"""Plans for models that are neither here nor can be asked for: from the sizes that specchat ships of known uploads."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from specchat.errors import HubUnreachableError, ModelError, ModelNotCachedError
from specchat.loading.models import Models, Refs
from specchat.loading.planning import Planned
from specchat.loading.request import ModelRequest, Reporter
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.catalog.known_models import KnownModel, known_models
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.models.hub.cache import cached_models
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.inputs import find_inputs
from specchat.planner.precision import lower_quants
from specchat.planner.recommendations import draft_for
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.search import choose_plan
from specchat.records.model import ModelSource

_DRAFTS = ("auto", "none")  # other drafts are models that may be unknown


def plan_known(
    request: ModelRequest, refs: Refs, why: ModelError, reporter: Reporter, temperature: float | None = None
) -> Planned:
    """Choose a plan for an upload that specchat knows the sizes of.

    Args:
        request: models and choices of the user.
        refs: parsed names.
        why: reason for which the model's own files tell nothing.
        reporter: receives one line about statistics that cannot be read.
        temperature: sampling temperature of the user; None leaves it to the model, whose own is not known.

    Raises:
        ModelError: `why`, for other reasons than a missing network, and for other models.
        DoesNotFitError: no plan stays within the budget.
    """
    known = known_models().get(refs.target.text)
    is_offline = isinstance(why, HubUnreachableError | ModelNotCachedError)
    if known is None or not is_offline or request.draft_model not in _DRAFTS or request.workers is not None:
        raise why
    draft = draft_for(known, cached_models()) if request.draft_model == "auto" else None
    target = ModelSource(known.id, Path())
    source = None if draft is None else ModelSource(draft.id, Path())
    sampling = resolve_sampling(SamplingChoices(temperature=temperature), GenerationDefaults(), 0)
    asked = PlanRequest(
        target=target,
        draft=source,
        choices=request.choices,
        draft_is_open=request.draft_model == "auto",
        retrieval=request.retrieval,
        samples=not sampling.greedy,
    )
    chosen = choose_plan(asked, _inputs(asked, known, draft, reporter))
    told = f"the sizes that specchat ships of {known.id}, because {why.message}"
    used = None if chosen.plan.draft is None else source
    return Planned(replace(chosen, assumptions=(told,)), Models(target, used, "" if used else "plain decoding"))


def _inputs(asked: PlanRequest, target: KnownModel, draft: KnownModel | None, reporter: Reporter) -> PlanInputs:
    """Return the facts of a plan, with the sizes of both models from the catalog."""
    inputs = find_inputs(replace(asked, draft=None), reporter.warn)
    spec = None if draft is None else known_spec(draft.id)
    lower = () if spec is None else tuple(known_spec(spec.name, quant) for quant in lower_quants(spec))
    return replace(inputs, target=partial(known_spec, target.id), draft=spec, lower_drafts=lower)
