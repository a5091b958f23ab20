"""Choosing a plan: the one that is predicted to be the fastest, of all that fit."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from specchat.errors import DoesNotFitError
from specchat.hardware.probe import find_hardware, find_machine, remembered
from specchat.models.sizes.describe import describe
from specchat.paths import cache_folder, state_folder
from specchat.planner.candidates import Candidate, Candidates
from specchat.planner.cost import DEMO_ACCEPTANCE, TYPICAL_ACCEPTANCE, Prediction
from specchat.planner.explain import ExplainedPlan
from specchat.planner.precision import choose_quant, lower_quants
from specchat.planner.rates import rates_of
from specchat.planner.reasons import choices
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.statistics import load
from specchat.records.model import QUANTS, ModelSource, ModelSpec, Quant
from specchat.records.plan import Plan
from specchat.units import format_bytes


def make_plan(request: PlanRequest) -> Plan:
    """As `choose_plan`, without the reasons."""
    return choose_quickly(request, _find_out(request))[0]


def choose_plan(request: PlanRequest, warn: Callable[[str], None] = lambda _: None) -> ExplainedPlan:
    """The fastest plan for this machine and these models; nothing but configurations is read, nothing is measured.

    Args:
        request: what was asked for.
        warn: told in one line of statistics that cannot be read.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: a context the model has no positions for.
        DeviceUnusableError: the device asked for by name cannot be used.
    """
    return choose_for(request, _find_out(request, warn))


def _find_out(request: PlanRequest, warn: Callable[[str], None] = lambda _: None) -> PlanInputs:
    """Machine, models and statistics, as far as they are written down somewhere."""
    machine = find_machine(request.device)
    folder = cache_folder()
    hardware = find_hardware(folder)
    measured = remembered(folder, hardware, machine, request.device)
    draft, *lower_drafts = _described_drafts(request)
    return PlanInputs(
        machine=machine,
        rates=rates_of(hardware, machine, measured),
        typical=rates_of(hardware, machine),
        target=_describing(request.target),
        draft=draft,
        lower_drafts=tuple(each for each in lower_drafts if each is not None),
        prior=DEMO_ACCEPTANCE if request.target.is_toy else TYPICAL_ACCEPTANCE,
        statistics=load(state_folder(), warn),
    )


def _describing(source: ModelSource) -> Callable[[Quant], ModelSpec]:
    """Describes each precision once."""
    return lru_cache(maxsize=None)(lambda quant: describe(source, quant))


def _described_drafts(request: PlanRequest) -> list[ModelSpec | None]:
    """The draft, and what else it may be stored as; [None] without one."""
    if request.draft is None:
        return [None]
    if request.draft_quant != "auto":
        return [describe(request.draft, request.draft_quant)]
    draft = describe(request.draft)
    return [draft, *(describe(request.draft, quant) for quant in lower_quants(draft))]


def choose_for(request: PlanRequest, known: PlanInputs) -> ExplainedPlan:
    """`choose_plan` once everything is known; a pure function.

    Raises:
        DoesNotFitError, UsageError: as `choose_plan`.
    """
    quant = choose_quant(request, known)
    found = Candidates(request, known, quant.spec)
    best = _best_of(found)
    plan, prediction = _planned(request, known, best)
    pace = prediction.tok_per_s / best.tok_per_s  # what chats with this plan have shown holds for those beside it, too
    reasons = choices(request, known, quant, best, found)
    return ExplainedPlan(plan, prediction, tuple(choice.at_pace(pace) for choice in reasons))


def choose_quickly(request: PlanRequest, known: PlanInputs) -> tuple[Plan, Prediction]:
    """As `choose_for`, without the reasons: fast enough for all models there are."""
    return _planned(request, known, _best_of(Candidates(request, known, choose_quant(request, known).spec)))


def _best_of(found: Candidates) -> Candidate:
    if found.best is None:
        raise found.refusal()
    return found.best


def _planned(request: PlanRequest, known: PlanInputs, best: Candidate) -> tuple[Plan, Prediction]:
    plan = best.plan(request, known.machine)
    return plan, known.statistics.corrected(plan, best.prediction, samples=request.samples)


def smaller_plan(request: PlanRequest, plan: Plan) -> Plan:
    """The next plan to try after `plan` could not have its memory: fewer resident layers, then a smaller tree.

    Raises:
        DoesNotFitError: there is nothing left to give up.
    """
    less = replace(
        request,
        vram_bytes=plan.device_bytes - 1,
        ctx=plan.ctx,
        tree_budget=plan.tree_budget or None,
        draft=request.draft if plan.draft is not None else None,
        draft_is_open=False,
        quant=_as_planned(plan.quant, request.quant),
        draft_quant=_as_planned(plan.draft_quant, request.draft_quant),
    )
    try:
        smaller = make_plan(less)
    except DoesNotFitError:
        if plan.tree_budget <= 1:
            raise DoesNotFitError(
                f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.ctx:,}, which cannot be had",
                hint="close other programs, or lower --ctx",
            ) from None
        smaller = make_plan(replace(less, tree_budget=plan.tree_budget // 2))
    return replace(smaller, adaptive=plan.adaptive, expected=plan.expected, lowered_from=plan.lowered_from)


def _as_planned(planned: str, asked: Literal["auto"] | Quant) -> Literal["auto"] | Quant:
    """The plan's precision: what there is less memory for must not be answered in another."""
    return next((quant for quant in QUANTS if quant == planned), asked)
