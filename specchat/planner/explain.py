"""What was chosen and why, as plain data for whoever prints it."""

from dataclasses import dataclass, replace

from specchat.planner.cost import Prediction
from specchat.records.plan import Plan


@dataclass(frozen=True)
class Alternative:
    """What could have been had instead.

    Attributes:
        value: of the option.
        tok_per_s: predicted with it and everything else at its best; None if nothing would fit.
    """

    value: str
    tok_per_s: float | None


@dataclass(frozen=True)
class Choice:
    """One thing that the plan settles.

    Attributes:
        option: as the flag is called, without dashes.
        value: what it is.
        why: in a few words.
        pinned: whether the user said so.
        alternative: the best other value, where one was looked into.
    """

    option: str
    value: str
    why: str
    pinned: bool = False
    alternative: Alternative | None = None

    def at_pace(self, pace: float) -> "Choice":
        """The same, where everything is `pace` times as fast as predicted."""
        other = self.alternative
        if other is None or other.tok_per_s is None:
            return self
        return replace(self, alternative=replace(other, tok_per_s=pace * other.tok_per_s))


@dataclass(frozen=True)
class ExplainedPlan:
    """A plan with its reasons.

    Attributes:
        plan: for the engine.
        prediction: the speed to expect.
        choices: what the plan settles, in the order a person would ask for it.
    """

    plan: Plan
    prediction: Prediction
    choices: tuple[Choice, ...]

    @property
    def pinned(self) -> tuple[str, ...]:
        """The options that the user has settled."""
        return tuple(choice.option for choice in self.choices if choice.pinned)
