"""Choose the plan with the highest predicted speed among all plans that fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from specchat.errors import DoesNotFitError
from specchat.planner.candidate import Candidate
from specchat.planner.candidates import Candidates
from specchat.planner.cost import Prediction
from specchat.planner.devices import DeviceCandidates
from specchat.planner.explain import ExplainedPlan
from specchat.planner.precision import choose_quant
from specchat.planner.reasons import Found, explain_choices
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.stages import first_sizes, with_first_stage, with_stages
from specchat.records.model import QUANTS, ModelSpec, Quant
from specchat.records.plan import DeviceChoice, Plan
from specchat.units import format_bytes


def choose_plan(request: PlanRequest, inputs: PlanInputs) -> ExplainedPlan:
    """Return the fastest plan that fits, with a reason for every choice; a pure function.

    Args:
        request: models and choices.
        inputs: machine, rates, sizes and statistics.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: the context is longer than the model allows.
    """
    quant = choose_quant(request, inputs)
    found, best = _best(request, inputs, quant.spec)
    plan, prediction = _while_short(request, inputs, best)
    pace = prediction.tok_per_s / best.tok_per_s  # scale alternatives by the measured speed
    reasons = explain_choices(request, inputs, quant, best, found)
    return ExplainedPlan(plan, prediction, tuple(choice.at_pace(pace) for choice in reasons))


def choose_quickly(request: PlanRequest, inputs: PlanInputs) -> tuple[Plan, Prediction]:
    """Return the plan of `choose_plan` without reasons and later stages; fast enough to rank every known model."""
    best = _best(request, inputs, choose_quant(request, inputs).spec)[1]
    return _while_short(request, inputs, best, with_first_stage)


def _with_stages(request: PlanRequest, inputs: PlanInputs) -> Plan:
    """Return the plan of `choose_plan` without reasons and prediction."""
    _, best = _best(request, inputs, choose_quant(request, inputs).spec)
    return with_stages(_planned(request, inputs, best)[0], best.target, best.draft)


def _best(request: PlanRequest, inputs: PlanInputs, target: ModelSpec) -> tuple[Found, Candidate]:
    """Return all candidates and the best: on several devices if they were named, or are predicted to be faster.

    Raises:
        DoesNotFitError: no plan stays within the budgets.
        UnsupportedModelError: the layers of this target cannot be dealt to the devices that were named.
    """
    single = Candidates(request, inputs, target)
    if inputs.others:
        several = DeviceCandidates(request, inputs, target, single)
        if request.choices.devices != "auto":
            if several.best is None:
                raise several.refusal()
            return several, several.best
        if several.best is not None and (single.best is None or several.best.tok_per_s > single.best.tok_per_s):
            return several, several.best
    if single.best is None:
        raise single.refusal()
    return single, single.best


def _planned(request: PlanRequest, inputs: PlanInputs, best: Candidate) -> tuple[Plan, Prediction]:
    plan = best.plan(request.choices, inputs.machine)
    return plan, inputs.statistics.corrected(plan, best.prediction, samples=request.samples)


def _while_short(
    request: PlanRequest,
    inputs: PlanInputs,
    best: Candidate,
    add_stages: Callable[[Plan, ModelSpec, ModelSpec | None], Plan] = with_stages,
) -> tuple[Plan, Prediction]:
    """Return the plan with its stages, and the prediction for the first one: most chats are short."""
    plan, prediction = _planned(request, inputs, best)
    plan = add_stages(plan, best.target, best.draft)
    if not plan.stages:
        return plan, prediction
    sizes, tree_budget = first_sizes(plan, best.sizes, best.target), plan.work.tree_budget
    expected = best.model.expectation(sizes, tree_budget) if plan.expected is not None else None
    prediction = best.model.predict(sizes, tree_budget, adaptive=best.adaptive)
    plan = replace(plan, expected=expected)
    return plan, inputs.statistics.corrected(plan, prediction, samples=request.samples)


def smaller_plan(request: PlanRequest, inputs: PlanInputs, plan: Plan) -> Plan:
    """Return the next plan to try after memory for `plan` could not be allocated.

    Fewer layers stay resident; when none is left to give up, the tree budget is halved.

    Raises:
        DoesNotFitError: nothing smaller is left to try.
    """
    most = plan.device_bytes - 1
    choices = replace(
        request.choices,
        devices=tuple(DeviceChoice(each.device, each.num_bytes - 1) for each in plan.devices),
        vram_bytes=min(most, inputs.machine.ram_available_bytes) if inputs.machine.device == "cpu" else most,
        ctx=plan.work.ctx,
        tree_budget=plan.work.tree_budget or None,
        quant=_as_planned(plan.quant, request.choices.quant),
        draft_quant=_as_planned(plan.draft_quant, request.choices.draft_quant),
    )
    pairs = zip(inputs.others, plan.devices[1:], strict=False)  # none for a plan with one device
    inputs = replace(inputs, others=tuple(replace(each, vram_bytes=past.num_bytes - 1) for each, past in pairs))
    draft = request.draft if plan.draft is not None else None
    smaller_request = replace(
        request, choices=choices, draft=draft, heads=(), copy=None, draft_is_open=False, adapts=plan.adaptive
    )
    try:
        smaller = _with_stages(smaller_request, inputs)
    except DoesNotFitError:
        if plan.work.tree_budget <= 1:
            raise DoesNotFitError(
                f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.work.ctx:,}, "
                "which cannot be allocated",
                hint="close other programs, or lower --ctx",
            ) from None
        halved = replace(choices, tree_budget=plan.work.tree_budget // 2)
        smaller = _with_stages(replace(smaller_request, choices=halved), inputs)
    return replace(smaller, adaptive=plan.adaptive, expected=plan.expected, lowered_from=plan.lowered_from)


def _as_planned(planned: str, asked: Literal["auto"] | Quant) -> Literal["auto"] | Quant:
    """Return the precision of the plan, so that a smaller plan writes the same text."""
    return next((quant for quant in QUANTS if quant == planned), asked)
