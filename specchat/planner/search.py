"""Choosing a plan: the one that is predicted to be the fastest, of all that fit."""

from dataclasses import replace
from typing import Literal

from specchat.errors import DoesNotFitError
from specchat.planner.candidates import Candidate, Candidates
from specchat.planner.cost import Prediction
from specchat.planner.explain import ExplainedPlan
from specchat.planner.precision import choose_quant
from specchat.planner.reasons import explain_choices
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.records.model import QUANTS, Quant
from specchat.records.plan import Plan
from specchat.units import format_bytes


def choose_plan(request: PlanRequest, inputs: PlanInputs) -> ExplainedPlan:
    """Return the fastest plan that fits, with the reasons for every choice; a pure function.

    Args:
        request: models and choices.
        inputs: what the choice is based on.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: a context the model has no positions for.
    """
    quant = choose_quant(request, inputs)
    found = Candidates(request, inputs, quant.spec)
    best = _best_of(found)
    plan, prediction = _planned(request, inputs, best)
    pace = prediction.tok_per_s / best.tok_per_s  # what chats with this plan have shown holds for those beside it, too
    reasons = explain_choices(request, inputs, quant, best, found)
    return ExplainedPlan(plan, prediction, tuple(choice.at_pace(pace) for choice in reasons))


def choose_quickly(request: PlanRequest, known: PlanInputs) -> tuple[Plan, Prediction]:
    """Return the plan of `choose_plan` without its reasons: fast enough to rank every known model."""
    return _planned(request, known, _best_of(Candidates(request, known, choose_quant(request, known).spec)))


def _best_of(found: Candidates) -> Candidate:
    if found.best is None:
        raise found.refusal()
    return found.best


def _planned(request: PlanRequest, known: PlanInputs, best: Candidate) -> tuple[Plan, Prediction]:
    plan = best.plan(request.choices, known.machine)
    return plan, known.statistics.corrected(plan, best.prediction, samples=request.samples)


def smaller_plan(request: PlanRequest, inputs: PlanInputs, plan: Plan) -> Plan:
    """The next plan to try after `plan` could not have its memory: fewer resident layers, then a smaller tree.

    Raises:
        DoesNotFitError: there is nothing left to give up.
    """
    choices = replace(
        request.choices,
        vram_bytes=plan.device_bytes - 1,
        ctx=plan.work.ctx,
        tree_budget=plan.work.tree_budget or None,
        quant=_as_planned(plan.quant, request.choices.quant),
        draft_quant=_as_planned(plan.draft_quant, request.choices.draft_quant),
    )
    draft = request.draft if plan.draft is not None else None
    less = replace(request, choices=choices, draft=draft, draft_is_open=False)
    try:
        smaller = choose_quickly(less, inputs)[0]
    except DoesNotFitError:
        if plan.work.tree_budget <= 1:
            raise DoesNotFitError(
                f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.work.ctx:,}, "
                "which cannot be allocated",
                hint="close other programs, or lower --ctx",
            ) from None
        halved = replace(choices, tree_budget=plan.work.tree_budget // 2)
        smaller = choose_quickly(replace(less, choices=halved), inputs)[0]
    return replace(smaller, adaptive=plan.adaptive, expected=plan.expected, lowered_from=plan.lowered_from)


def _as_planned(planned: str, asked: Literal["auto"] | Quant) -> Literal["auto"] | Quant:
    """The plan's precision: what there is less memory for must not be answered in another."""
    return next((quant for quant in QUANTS if quant == planned), asked)
