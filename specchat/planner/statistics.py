"""What chats on this machine have shown: tokens per step of a pair of models, and the speed of whole plans.

One small file in the state folder, replaced whole or not at all. It only makes predictions better, so whatever is wrong
with it is never worth more than a warning. Of two chats that end at the same moment one may not be counted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from specchat.files import atomic_write_text
from specchat.planner.cost import Acceptance, Prediction
from specchat.records.generation import Step
from specchat.records.plan import Plan

_VERSION = 1
_FILE = "statistics.json"
# Fewer steps say little; more are halved now and then, so that the last chats count most.
_ENOUGH_STEPS = 30
_MOST_STEPS = 2000
_MOST_PLANS = 200


@dataclass(frozen=True)
class Tally:
    """Steps added up: their number, and the nodes, emitted tokens and seconds of all together."""

    steps: float = 0.0
    nodes: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Both."""
        return Tally(*(mine + more for mine, more in zip(self.values(), other.values(), strict=True)))

    def faded(self) -> "Tally":
        """With half of too many forgotten."""
        share = 0.5 if self.steps > _MOST_STEPS else 1.0
        return Tally(*(share * value for value in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        """In the order of its attributes."""
        return self.steps, self.nodes, self.tokens, self.seconds


@dataclass(frozen=True)
class Statistics:
    """Everything that is kept.

    Attributes:
        pairs: by target, draft and class of temperature (greedy, sampled): steps with a tree, by the tree's size class.
        plans: by `plan_key`: steps that read nothing but the last token.
    """

    pairs: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)
    plans: Mapping[str, Tally] = field(default_factory=dict)

    def acceptance(self, target: str, draft: str, prior: Acceptance, *, samples: bool) -> Acceptance:
        """The prior, scaled to what this pair has been seen to emit; as it is while too little was seen.

        Args:
            target: its name.
            draft: likewise.
            prior: of pairs like this one.
            samples: whether answers are drawn: what a draft guesses of those says little of greedy ones.
        """
        tallies = self.pairs.get(_pair_key(target, draft, samples=samples), {}).values()
        if sum(tally.steps for tally in tallies) < _ENOUGH_STEPS:
            return prior
        seen = sum(tally.tokens - tally.steps for tally in tallies)
        promised = sum(tally.steps * (prior.tokens_per_step(round(tally.nodes / tally.steps)) - 1) for tally in tallies)
        return Acceptance(prior.gain * seen / max(promised, 1e-9), prior.knee, "measured")

    def corrected(self, plan: Plan, prediction: Prediction, *, samples: bool) -> Prediction:
        """What this very plan has achieved with such answers, where it has run for long enough.

        Args:
            plan: that is predicted.
            prediction: of its speed.
            samples: whether answers are drawn.
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
    """Return a name for everything that the speed of a plan depends on, with the class of temperature."""
    facts = [
        *(plan.target, plan.draft, plan.quant, plan.draft_quant, plan.work.device, plan.work.dtype),
        *(
            plan.work.tree_budget,
            plan.adaptive,
            plan.placement.slots,
            list(plan.placement.resident),
            list(plan.placement.in_ram),
        ),
    ]
    return f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]} {_class_of(samples=samples)}"


def load(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Statistics:
    """What is kept in a folder; nothing where there is no file, or a damaged one.

    Args:
        folder: the state folder.
        warn: told in one line of a damaged file.
    """
    path = folder / _FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            return Statistics()
        pairs = {key: _tallies(rows) for key, rows in values["pairs"].items()}
        return Statistics(pairs, _tallies(values["plans"]))
    except FileNotFoundError:
        return Statistics()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        warn(f"{path} cannot be read: predictions do without what earlier chats have shown")
        return Statistics()


def record(folder: Path, plan: Plan, temperature: float, steps: Iterable[Step]) -> None:
    """Adds the steps of an answer; where nothing can be written, nothing is kept.

    Args:
        folder: the state folder.
        plan: that the answer was written under.
        temperature: of its sampling.
        steps: in any order; interrupted ones do not count.
    """
    before, found = load(folder), tuple(steps)
    pairs, plans = dict(before.pairs), dict(before.plans)
    if plan.draft is not None:
        key = _pair_key(plan.target, plan.draft, samples=temperature > 0)
        rows = dict(pairs.get(key, {}))
        for step in found:
            if step.token_ids and step.tree_nodes and step.finish_reason != "length":
                size = str(step.tree_nodes.bit_length())
                rows[size] = rows.get(size, Tally()).faded().plus(_one(step))
        pairs[key] = rows
    key = plan_key(plan, samples=temperature > 0)
    tally = plans.pop(key, Tally())  # the last one used stands last
    for step in found:
        if step.token_ids and step.new_rows == 1:
            tally = tally.faded().plus(_one(step))
    plans[key] = tally
    kept = dict(list(plans.items())[-_MOST_PLANS:])
    # A state folder that cannot be written to is no reason to disturb a chat; one that is not saved says so itself.
    with suppress(OSError):
        _write(folder, Statistics(pairs, kept))


def _one(step: Step) -> Tally:
    return Tally(1.0, step.tree_nodes, len(step.token_ids), step.pass_s)


def _class_of(*, samples: bool) -> str:
    return "sampled" if samples else "greedy"


def _pair_key(target: str, draft: str, *, samples: bool) -> str:
    return f"{target} {draft} {_class_of(samples=samples)}"


def _tallies(rows: Mapping[str, list[float]]) -> dict[str, Tally]:
    return {key: _tally(row) for key, row in rows.items()}


def _tally(row: list[float]) -> Tally:
    steps, nodes, tokens, seconds = (float(value) for value in row)
    if not (steps > 0 and nodes >= 0 and tokens >= steps and 0 < seconds < float("inf")):
        raise ValueError("no steps have such sums")
    return Tally(steps, nodes, tokens, seconds)


def _write(folder: Path, statistics: Statistics) -> None:
    pairs = {key: {size: tally.values() for size, tally in rows.items()} for key, rows in statistics.pairs.items()}
    plans = {key: tally.values() for key, tally in statistics.plans.items() if tally.steps}
    atomic_write_text(folder / _FILE, json.dumps({"version": _VERSION, "pairs": pairs, "plans": plans}))
