"""Calibration: how much a proposal is worth by its kind, and whether a source is worth its time; both are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specchat.engine.drafting.pass_times import FadingRatio
from specchat.engine.drafting.sources import Priors

# A prior counts like this number of proposals. Errors count by their variance, which is about a tenth here.
_PRIOR_PROPOSALS, _VARIANCE = 16.0, 0.1
# Most proposals of a kind that count, so that the weights follow a change of subject.
_MOST_PROPOSALS = 400
# Bounds of the log odds: no run of luck makes a proposal certain or impossible.
_LEAST, _MOST = -8.0, 8.0

# Steps after which a source's worth is checked. A source that costs more than it brings rests for 64 steps, and twice
# as long after each trial of 8 steps that changes nothing, up to 1024 steps. So a useless source costs little.
_CHECK_AFTER, _TRIAL, _FIRST_REST, _LONGEST_REST = 32, 8, 64, 1024


@dataclass(frozen=True)
class Setting:
    """What the weights of proposals depend on besides their kind.

    Attributes:
        beside_draft: whether a draft model scores the same node.
        is_sampled: whether the answer is sampled.
    """

    beside_draft: bool
    is_sampled: bool


_SETTINGS = tuple(Setting(beside, sampled) for beside in (False, True) for sampled in (False, True))


class Calibration:
    """Weights of one source's proposals, in log odds: an online logistic regression with one weight per kind.

    Each weight moves along the gradient of the likelihood of the tokens that came. So a source whose proposals never
    come true loses its influence, and cannot hold back the other sources for long.

    Args:
        priors: weights before any proposal is tried.
        share: share of these weights that counts beside a draft.
    """

    def __init__(self, priors: Priors, share: float = 1.0) -> None:
        self._weights = {setting: _first_weights(priors, setting, share) for setting in _SETTINGS}
        self._seen = {setting: [0.0] * len(weights) for setting, weights in self._weights.items()}

    def weights(self, setting: Setting) -> Sequence[float | None]:
        """Return the log odds of a proposal by kind; beside a draft, what it adds to the draft's score, or None."""
        return self._weights[setting]

    def learn(self, setting: Setting, kind: int, expected: float, *, came: bool) -> None:
        """Learn whether a proposal came true, whose token was expected with a probability."""
        seen, weights = self._seen[setting], self._weights[setting]
        weight = weights[kind]
        if weight is None:
            return
        seen[kind] = min(seen[kind] + 1.0, _MOST_PROPOSALS)
        step = (came - expected) / (_VARIANCE * (_PRIOR_PROPOSALS + seen[kind]))
        weights[kind] = min(max(weight + max(min(step, 1.0), -1.0), _LEAST), _MOST)


def _first_weights(priors: Priors, setting: Setting, share: float) -> list[float | None]:
    """Return the weights before any proposal is tried."""
    if not setting.beside_draft:
        return list(priors.alone)
    weights = priors.beside_sampled if setting.is_sampled else priors.beside
    return [None if weight is None else share * weight for weight in weights]


class Worth:
    """Decides whether a source is asked: its accepted nodes must be worth its time, at the present speed.

    Attributes:
        is_asked: whether the next step asks the source.
    """

    def __init__(self) -> None:
        self.is_asked = True
        self._accepted, self._seconds = FadingRatio(), FadingRatio()
        self._steps_left, self._rest = _CHECK_AFTER, _FIRST_REST

    def record(self, accepted: int, seconds: float, tokens_per_s: float) -> None:
        """Learn from a step, and decide about the next one.

        Args:
            accepted: accepted nodes of the source.
            seconds: seconds that the source took.
            tokens_per_s: tokens that a second is worth; 0 if time does not count.
        """
        if self.is_asked:
            self._accepted.add(accepted, 1.0)
            self._seconds.add(seconds, 1.0)
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        if not self.is_asked:
            self.is_asked, self._steps_left = True, _TRIAL
        elif self._accepted.value(0.0) < tokens_per_s * self._seconds.value(0.0):
            self.is_asked, self._steps_left = False, self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
        else:
            self._steps_left, self._rest = _CHECK_AFTER, _FIRST_REST
