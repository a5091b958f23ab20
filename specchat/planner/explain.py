"""A plan with the reasons for its choices, as plain data."""

from dataclasses import dataclass, replace

from specchat.planner.cost import Prediction
from specchat.records.plan import Plan


@dataclass(frozen=True)
class Alternative:
    """Best plan with another value for an option.

    Attributes:
        value: other value of the option.
        tok_per_s: predicted speed with this value and the best other settings; None if no plan fits.
    """

    value: str
    tok_per_s: float | None


@dataclass(frozen=True)
class Choice:
    """One setting of the plan, with its reason.

    Attributes:
        option: name of the flag, without leading dashes; "experts", which has no flag.
        value: chosen value, as text.
        why: short reason.
        pinned: whether the user set the value.
        alternative: best other value, or None if none was tried.
    """

    option: str
    value: str
    why: str
    pinned: bool = False
    alternative: Alternative | None = None

    def at_pace(self, pace: float) -> "Choice":
        """Return the choice with its alternative's speed multiplied by `pace`."""
        other = self.alternative
        if other is None or other.tok_per_s is None:
            return self
        return replace(self, alternative=replace(other, tok_per_s=pace * other.tok_per_s))


@dataclass(frozen=True)
class ExplainedPlan:
    """A plan with its reasons.

    Attributes:
        plan: plan for the engine.
        prediction: expected speed.
        choices: settings of the plan with reasons, most important first.
        assumptions: facts that the plan takes for granted about models whose weights are not here.
    """

    plan: Plan
    prediction: Prediction
    choices: tuple[Choice, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def pinned(self) -> tuple[str, ...]:
        """Options that the user has set."""
        return tuple(choice.option for choice in self.choices if choice.pinned)
