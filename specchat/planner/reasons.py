"""Explain a plan: every choice with its reason, and the best plan with another value."""

from collections.abc import Callable
from typing import Protocol

from specchat.planner.candidate import Candidate, preference
from specchat.planner.candidates import Candidates
from specchat.planner.cost import Prediction
from specchat.planner.explain import Alternative, Choice
from specchat.planner.precision import Precision
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.planner.workload import usual_ctx
from specchat.records.model import DTYPE_BYTES, LOWER_QUANTS, ModelSpec
from specchat.units import format_bytes


class Found(Protocol):
    """Candidates that a plan was chosen among."""

    @property
    def all(self) -> list[Candidate]:
        """All candidates that fit."""


_FindAlternative = Callable[[Callable[[Candidate], bool], Callable[[Candidate], str]], Alternative | None]


def explain_choices(
    request: PlanRequest, inputs: PlanInputs, quant: Precision, best: Candidate, among: Found
) -> tuple[Choice, ...]:
    """Return every choice with its reason, and the speed of the best plan with another value."""

    def best_other(differs: Callable[[Candidate], bool], value: Callable[[Candidate], str]) -> Alternative | None:
        other = max((each for each in among.all if differs(each)), key=preference, default=None)
        return None if other is None else Alternative(value(other), other.tok_per_s)

    work, device = best.work, inputs.machine.device
    found = [
        *_device_choices(request, inputs, best),
        Choice("dtype", work.dtype, _why_dtype(request, best), request.choices.dtype != "auto"),
        Choice(
            "quant", best.target.quant, quant.why, request.choices.quant != "auto", _other_quant(request, inputs, quant)
        ),
        _draft_choice(request, inputs, best, best_other(lambda c: _draft_kind(c) != _draft_kind(best), _draft_name)),
        Choice("ctx", f"{work.ctx:,}", _why_ctx(request, best), request.choices.ctx is not None),
    ]
    if best.draft is not None:
        found += _draft_quant_choice(request, inputs, best, best.draft, best_other)
    if work.tree_budget:
        trees = best_other(
            lambda c: c.draft == best.draft and c.work.tree_budget not in (0, work.tree_budget),
            lambda c: str(c.work.tree_budget),
        )
        nodes = best.prediction.tree_nodes
        why = (
            "asked for"
            if request.choices.tree_budget is not None
            else f"maximum; about {nodes} nodes are worth their time"
        )
        found.append(Choice("tree-budget", str(work.tree_budget), why, request.choices.tree_budget is not None, trees))
    if not best.devices:
        found.append(Choice("vram", format_bytes(best.vram_bytes), _why_budget(request, device), _is_set(request)))
    if (experts := best.sizes.experts) is not None:
        layers = best_other(lambda c: c.sizes.experts is None, lambda _: "whole layers")
        kept = f"{experts.quota} of {experts.num_experts}"
        found.append(Choice("experts", kept, "of each layer stay in memory, others are read when used", False, layers))
    elif best.num_streamed and best.target.experts is not None and not best.devices:
        found.append(Choice("experts", "whole layers", _why_whole_layers(request, best.target, device, among)))
    if best.num_streamed:
        slots = best_other(lambda c: c.slots not in (0, best.slots), lambda c: str(c.slots))
        why = "asked for" if request.choices.slots is not None else "layers loading while one is computed"
        found.append(Choice("slots", str(best.slots), why, request.choices.slots is not None, slots))
    return tuple(found)


def _why_whole_layers(request: PlanRequest, target: ModelSpec, device: str, among: Found) -> str:
    if request.choices.slots is not None:
        return "slots were asked for"
    if device != "cpu" and target.experts is not None and not target.experts.has_kernel:
        return f"no kernel for many experts in {target.quant}"
    fits = any(each.sizes.experts is not None for each in among.all)
    return "faster here than single experts" if fits else "single experts need all else in memory, which does not fit"


def _is_set(request: PlanRequest) -> bool:
    return request.choices.vram_bytes is not None


def _device_choices(request: PlanRequest, inputs: PlanInputs, best: Candidate) -> list[Choice]:
    """Return the choice of the device, or of several; without a choice between one and several, there is one line."""
    device, asked = inputs.machine.device, request.choices.devices
    if best.devices:
        if any(each.peer is not None for each in inputs.others):
            return [Choice("workers", ", ".join(best.devices[1:]), "asked for", pinned=True)]
        why = "asked for" if asked != "auto" else "faster together than the first one alone"
        return [Choice("devices", ", ".join(best.devices), why, asked != "auto")]
    choice = Choice("device", device, _why_device(request, device), request.choices.device != "auto")
    if asked != "auto" or not inputs.others:
        return [choice]
    return [choice, Choice("devices", device, "one device is faster than several, or several cannot share this model")]


def _why_device(request: PlanRequest, device: str) -> str:
    if request.choices.device != "auto":
        return "asked for"
    return "no usable CUDA device" if device == "cpu" else "first CUDA device"


def _why_dtype(request: PlanRequest, best: Candidate) -> str:
    if request.choices.dtype != "auto":
        return "asked for"
    if best.work.dtype == best.target.dtype:
        return "dtype of the checkpoint"
    if best.target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "small model: exact at little cost"
    return f"{best.target.dtype} is slow here" if best.work.dtype == "fp32" else "fast here, half the size of fp32"


def _why_ctx(request: PlanRequest, best: Candidate) -> str:
    if request.choices.ctx is not None:
        return "asked for"
    if best.work.ctx == usual_ctx(request, best.target):
        return "maximum of the model" if best.work.ctx == best.target.max_positions else "default"
    return "halved until the plan fits"


def _why_budget(request: PlanRequest, device: str) -> str:
    if request.choices.vram_bytes is not None:
        return "asked for"
    return "free memory minus a system reserve" if device == "cpu" else "free memory minus 1 GiB"


def _draft_name(candidate: Candidate) -> str:
    names = [candidate.draft.name] if candidate.draft else []
    return "+".join([*names, "retrieval"] if candidate.retrieval else names) or "none"


def _draft_kind(candidate: Candidate) -> tuple[bool, bool]:
    return candidate.draft is None, candidate.work.tree_budget == 0


def _draft_choice(request: PlanRequest, inputs: PlanInputs, best: Candidate, other: Alternative | None) -> Choice:
    if inputs.draft is None and not request.retrieval:
        return Choice("draft", "none", "no draft known or requested")
    if best.draft is None and inputs.draft is not None and inputs.draft.is_copy:
        why = "its copy does not fit beside it" if best.num_streamed else "no layer is streamed, so none is copied"
        return Choice("draft", _draft_name(best), why, alternative=other)
    if not request.draft_is_open:
        return Choice("draft", _draft_name(best), "asked for", pinned=True, alternative=other)
    why = _why_draft(best.prediction) if best.work.tree_budget else "plain decoding is faster here"
    return Choice("draft", _draft_name(best), why, alternative=other)


def _draft_quant_choice(
    request: PlanRequest, inputs: PlanInputs, best: Candidate, draft: ModelSpec, best_other: _FindAlternative
) -> list[Choice]:
    """Return the choice of the draft's precision; empty if there was nothing to choose."""
    if request.choices.draft_quant != "auto":
        return [Choice("draft-quant", draft.quant, "asked for", pinned=True)]
    others = [head for head in inputs.heads if head.name == draft.name and head.quant != draft.quant]
    if not (others if draft in inputs.heads else draft.is_copy or inputs.lower_drafts):
        return []
    if draft.is_copy and not best.num_streamed:
        return [Choice("draft-quant", draft.quant, "not used: no layer is streamed, so none is copied")]
    saves = "more layers resident" if best.num_streamed else "fewer bytes to read"
    why = f"same text, {saves}" if draft.quant in LOWER_QUANTS else "not faster if quantized"
    other = best_other(
        lambda c: c.draft is not None and c.draft.name == draft.name and c.draft.quant != draft.quant,
        lambda c: c.draft.quant if c.draft else "",
    )
    return [Choice("draft-quant", draft.quant, why, alternative=other)]


def _why_draft(prediction: Prediction) -> str:
    return f"{prediction.tokens_per_step:.1f} tokens per pass instead of 1"


def _other_quant(request: PlanRequest, inputs: PlanInputs, quant: Precision) -> Alternative | None:
    """Return the speed of the other precision under the same conditions."""
    if quant.other is None:
        return None
    other = Candidates(request, inputs, quant.other).best
    return Alternative(quant.other.quant, None if other is None else other.tok_per_s)
