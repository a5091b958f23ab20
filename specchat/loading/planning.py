"""Plan the models of a request for this machine."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specchat.errors import UsageError
from specchat.loading.checking import assumptions_about, check_model, check_tokenizer
from specchat.loading.models import Models
from specchat.loading.request import RETRIEVAL, ModelRequest, Reporter
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.checkpoint.generation_config import load_generation_defaults
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.planner.explain import ExplainedPlan
    from specchat.planner.request import PlanInputs, PlanRequest

_PLAIN = "plain decoding"


@dataclass(frozen=True)
class Planned:
    """A plan with its reasons and models; there is no draft if plain decoding is faster."""

    chosen: "ExplainedPlan"
    models: Models

    @property
    def plan(self) -> Plan:
        """The plan that the engine runs under."""
        return self.chosen.plan


def make_plan(
    request: ModelRequest,
    models: Models,
    reporter: Reporter,
    *,
    temperature: float | None = None,
    as_given: bool = False,
) -> Planned:
    """Choose the fastest plan for this machine.

    Args:
        request: models and choices of the user.
        models: models that were found.
        reporter: receives one line about statistics that cannot be read.
        temperature: sampling temperature of the user; None leaves it to the model.
        as_given: whether to keep draft and precision even if others are faster, for comparisons.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UnsupportedModelError: draft trees do not work on a model's architecture.
    """
    from specchat.planner.search import choose_plan

    for source in (models.target, models.draft):
        if source is not None and not source.part:  # a part has the target's architecture
            check_model(source)
    check_tokenizer(models.target)
    asked = plan_request(request, models, temperature)
    if as_given:
        is_copy = models.draft is not None and models.draft.is_copy  # a copy has no precision of its own
        is_open = asked.choices.draft_quant == "auto" and not is_copy
        given = "none" if is_open else asked.choices.draft_quant
        choices = replace(asked.choices, draft_quant=given)
        asked = replace(asked, choices=choices, draft_is_open=False, lowers_for_speed=False)
    chosen = choose_plan(asked, _inputs(request, asked, reporter))
    if (head := next((each for each in models.heads if each.name == chosen.plan.draft), None)) is not None:
        models = replace(models, draft=head)
    if models.copy is not None and chosen.plan.draft == models.copy.name:
        models = replace(models, draft=models.copy)
    sources = [models.target] if models.draft is None or chosen.plan.draft is None else [models.target, models.draft]
    sources = [source for source in sources if not source.is_copy]
    chosen = replace(chosen, assumptions=tuple(each for source in sources for each in assumptions_about(source)))
    if chosen.plan.draft is not None:
        return Planned(chosen, models)
    return Planned(chosen, replace(models, draft=None, draft_note=_why_no_draft(chosen.plan, models)))


def _why_no_draft(plan: Plan, models: Models) -> str:
    """Return what decodes without a draft model, and why."""
    instead = RETRIEVAL if plan.retrieval else _PLAIN
    if models.draft is not None:
        return f"{instead}: predicted to be faster here than drafting with {models.draft.name}"
    if models.draft_note == RETRIEVAL and not plan.retrieval:
        return f"{_PLAIN}: predicted to be faster here than retrieval"
    return models.draft_note.replace(_PLAIN, instead, 1)


def make_smaller_plan(
    request: ModelRequest, models: Models, reporter: Reporter, plan: Plan, temperature: float | None = None
) -> Plan:
    """Return the next plan to try after memory for `plan` could not be allocated.

    Raises:
        DoesNotFitError: nothing smaller is left to try.
    """
    from specchat.planner.search import smaller_plan

    asked = plan_request(request, models, temperature)
    return smaller_plan(asked, _inputs(request, asked, reporter), plan)


def _inputs(request: ModelRequest, asked: "PlanRequest", reporter: Reporter) -> "PlanInputs":
    """Return the facts of a plan: of this machine, and of the workers if there are any.

    Raises:
        UsageError: a draft that reads what stays on other machines.
        SpecchatError: a worker that cannot be used.
    """
    from specchat.planner.inputs import find_inputs

    inputs = find_inputs(asked, reporter.warn)
    if request.workers is None:
        return inputs
    from specchat.loading.workers import worker_inputs

    if asked.draft is not None and asked.draft.part not in ("", "mtp"):
        raise UsageError(
            f"--draft {request.draft} cannot be used with workers: it reads what stays on their machines",
            hint="use a draft model, mtp, retrieval or none",
        )
    return replace(inputs, others=worker_inputs(request.workers))


def plan_request(request: ModelRequest, models: Models, temperature: float | None = None) -> "PlanRequest":
    """Return the request for the planner.

    Args:
        request: models and choices of the user.
        models: models that were found.
        temperature: sampling temperature of the user; None leaves it to the model.
    """
    from specchat.planner.request import PlanRequest

    defaults = load_generation_defaults(models.target.path)
    choices = request.choices
    heads = tuple(each for each in models.heads if request.workers is None or each.part == "mtp")
    return PlanRequest(
        target=models.target,
        draft=models.draft,
        choices=choices,
        # A user who sets a tree budget or a draft precision wants a draft.
        draft_is_open=request.draft_model == "auto" and choices.tree_budget is None and choices.draft_quant == "auto",
        retrieval=request.retrieval,
        heads=heads,
        copy=models.copy if request.workers is None else None,
        samples=not resolve_sampling(SamplingChoices(temperature=temperature), defaults, 0).greedy,
    )
