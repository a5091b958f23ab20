"""Statistics of answers on this machine: tokens per step of a pair of models, and the speed of plans.

One small file in the state folder, replaced atomically. It only improves predictions, so a damaged file is just a
warning. If two programs write at the same moment, one of them may be lost.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from specchat.files import atomic_write_text, read_regular
from specchat.planner.acceptance import Acceptance
from specchat.planner.cost import Prediction
from specchat.planner.expert_statistics import record_experts
from specchat.records.generation import Step
from specchat.records.plan import Plan

_VERSION = 1
_FILE = "statistics.json"
# Fewer than _ENOUGH_STEPS steps are ignored. Sums of more than _MOST_STEPS are halved: recent answers count most.
_ENOUGH_STEPS = 30
_MOST_STEPS = 2000
_MOST_PLANS = 200
# Name of drafts without a model, in place of a draft's name.
RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class AnswerStep:
    """A step of an answer, and whether the answer is sampled."""

    step: Step
    samples: bool


# The steps of one pass, one for each answer that shared it.
SharedPass = Sequence[AnswerStep]


@dataclass(frozen=True)
class Tally:
    """Sums over steps: number of steps, tree nodes, emitted tokens, seconds."""

    steps: float = 0.0
    nodes: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Return the sum of both tallies."""
        return Tally(*(mine + more for mine, more in zip(self.values(), other.values(), strict=True)))

    def faded(self) -> "Tally":
        """Return the tally, halved if it has more than 2,000 steps."""
        share = 0.5 if self.steps > _MOST_STEPS else 1.0
        return Tally(*(share * value for value in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        """Return the sums in the order of the attributes."""
        return self.steps, self.nodes, self.tokens, self.seconds


@dataclass(frozen=True)
class Statistics:
    """Contents of the statistics file.

    Attributes:
        pairs: tallies of steps with a tree, by pair and temperature class (greedy, sampled), then by tree size class.
        plans: tallies of passes of all seats that read one new token of each answer, by `plan_key`.
    """

    pairs: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)
    plans: Mapping[str, Tally] = field(default_factory=dict)

    def acceptance(self, target: str, draft: str, prior: Acceptance, *, samples: bool) -> Acceptance:
        """Return the prior, scaled to the tokens that this pair has emitted; unscaled after too few steps.

        Args:
            target: name of the target.
            draft: name of the draft.
            prior: typical acceptance of similar pairs.
            samples: whether answers are sampled; sampled and greedy answers have different acceptance rates.
        """
        tallies = self.pairs.get(_pair_key(target, draft, samples=samples), {}).values()
        if sum(tally.steps for tally in tallies) < _ENOUGH_STEPS:
            return prior
        seen = sum(tally.tokens - tally.steps for tally in tallies)
        promised = sum(tally.steps * (prior.tokens_per_step(round(tally.nodes / tally.steps)) - 1) for tally in tallies)
        return Acceptance(prior.gain * seen / max(promised, 1e-9), prior.knee, "measured")

    def corrected(self, plan: Plan, prediction: Prediction, *, samples: bool) -> Prediction:
        """Return the prediction with measured figures, if this plan has run for enough steps.

        Args:
            plan: plan of the prediction.
            prediction: predicted speed of the plan.
            samples: whether answers are sampled.
        """
        tally = self.plans.get(plan_key(plan, samples=samples))
        if tally is None or tally.steps < _ENOUGH_STEPS:
            return prediction
        return replace(
            prediction,
            pass_s=tally.seconds / tally.steps,
            tokens_per_step=tally.tokens / tally.steps,
            tree_nodes=round(tally.nodes / tally.steps),
            tok_per_s=tally.tokens / tally.seconds,
            basis="measured",
        )


def plan_key(plan: Plan, *, samples: bool) -> str:
    """Return a key of everything that the speed of a plan depends on, temperature class included."""
    facts = [
        *(plan.target, plan.draft, plan.quant, plan.draft_quant, plan.work.device, plan.work.dtype),
        *([list(plan.placement.devices), list(plan.placement.owner)] if plan.placement.devices else []),
        *(
            plan.work.tree_budget,
            plan.adaptive,
            plan.placement.slots,
            list(plan.placement.resident),
            list(plan.placement.in_ram),
        ),
        *(
            []
            if plan.placement.experts is None
            else ["experts", plan.placement.experts.quota, *["ahead"] * plan.placement.experts.looks_ahead]
        ),
        *([plan.work.seats] if plan.work.seats > 1 else []),
        *([RETRIEVAL] if plan.retrieval else []),
    ]
    return f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]} {_class_of(samples=samples)}"


def load(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Statistics:
    """Load the statistics of a folder; empty if the file is missing or damaged.

    Args:
        folder: the state folder.
        warn: receives one line about a damaged file.
    """
    path = folder / _FILE
    try:
        values = json.loads(read_regular(path))
        if values["version"] != _VERSION:
            return Statistics()
        pairs = {key: _tallies(rows) for key, rows in values["pairs"].items()}
        return Statistics(pairs, _tallies(values["plans"]))
    except FileNotFoundError:
        return Statistics()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        warn(f"cannot read {path}: speeds are predicted without the statistics of earlier chats")
        return Statistics()


def record(folder: Path, plan: Plan, temperature: float, steps: Iterable[Step]) -> None:
    """Add the steps of an answer that shared its passes with no other; see `record_passes`.

    Args:
        folder: the state folder.
        plan: plan that the engine ran under.
        temperature: sampling temperature of the answer.
        steps: steps of the answer in any order; interrupted ones are ignored.
    """
    record_passes(folder, plan, [[AnswerStep(step, samples=temperature > 0)] for step in steps])


def record_passes(folder: Path, plan: Plan, passes: Iterable[SharedPass]) -> None:
    """Add passes to the statistics; do nothing if the folder cannot be written to.

    A pass counts for its plan if all seats were in use and no prompt was read. For the pair, every answer counts by
    itself: the tokens of a tree depend on its own nodes, not on the other trees of the pass.

    Args:
        folder: the state folder.
        plan: plan that the engine ran under.
        passes: passes in any order; interrupted ones are ignored.
    """
    before, found = load(folder), tuple(passes)
    pairs, plans = dict(before.pairs), dict(before.plans)
    if plan.work.tree_budget:
        for each in chain.from_iterable(found):
            _add_to_pair(pairs, _pair_key(plan.target, plan.draft or RETRIEVAL, samples=each.samples), each.step)
    for shared in found:
        _add_to_plan(plans, plan, shared)
    kept = dict(list(plans.items())[-_MOST_PLANS:])
    # An unwritable state folder must not disturb a chat; saving the chat reports the problem.
    with suppress(OSError):
        _write(folder, Statistics(pairs, kept))
        record_experts(folder, plan, [[each.step for each in shared] for shared in found])


def _add_to_pair(pairs: dict[str, Mapping[str, Tally]], key: str, step: Step) -> None:
    rows = dict(pairs.get(key, {}))
    if step.token_ids and step.tree_nodes and step.finish_reason != "length":
        size = str(step.tree_nodes.bit_length())
        rows[size] = rows.get(size, Tally()).faded().plus(_tally_of([step]))
    pairs[key] = rows


def _add_to_plan(plans: dict[str, Tally], plan: Plan, shared: SharedPass) -> None:
    """Add a pass to the tally of its plan, which becomes the last one: plans are ordered by last use."""
    classes = {each.samples for each in shared}
    if len(classes) > 1:
        return  # the speed of a mixture belongs to neither class
    key = plan_key(plan, samples=classes.pop())
    tally = plans.pop(key, Tally())
    steps = [each.step for each in shared]
    if len(steps) == plan.work.seats and all(step.token_ids and step.new_rows == 1 for step in steps):
        tally = tally.faded().plus(_tally_of(steps))
    plans[key] = tally


def _tally_of(steps: Sequence[Step]) -> Tally:
    """Return the tally of one pass, from all its steps or some; each step names the seconds of the whole pass."""
    return Tally(
        steps=1.0,
        nodes=sum(step.tree_nodes for step in steps),
        tokens=sum(len(step.token_ids) for step in steps),
        seconds=sum(step.pass_s / step.num_sharing for step in steps),
    )


def _class_of(*, samples: bool) -> str:
    return "sampled" if samples else "greedy"


def _pair_key(target: str, draft: str, *, samples: bool) -> str:
    return f"{target} {draft} {_class_of(samples=samples)}"


def _tallies(rows: Mapping[str, list[float]]) -> dict[str, Tally]:
    return {key: _tally(row) for key, row in rows.items()}


def _tally(row: list[float]) -> Tally:
    steps, nodes, tokens, seconds = (float(value) for value in row)
    if not (steps > 0 and nodes >= 0 and tokens >= steps and 0 < seconds < float("inf")):
        raise ValueError("impossible sums of steps")
    return Tally(steps, nodes, tokens, seconds)


def _write(folder: Path, statistics: Statistics) -> None:
    pairs = {key: {size: tally.values() for size, tally in rows.items()} for key, rows in statistics.pairs.items()}
    plans = {key: tally.values() for key, tally in statistics.plans.items() if tally.steps}
    atomic_write_text(folder / _FILE, json.dumps({"version": _VERSION, "pairs": pairs, "plans": plans}))
