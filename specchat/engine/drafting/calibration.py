"""Calibration: how much a proposal of each kind is worth, learned from which proposals came true."""

from __future__ import annotations

from dataclasses import dataclass

from specchat.engine.drafting.sources import Priors

# A prior counts like this number of proposals. Errors count by their variance, which is about a tenth here.
_PRIOR_PROPOSALS, _VARIANCE = 8.0, 0.1
# Most proposals of a kind that count, so that the weights follow a change of subject.
_MOST_PROPOSALS = 400
# Bounds of the log odds: no run of luck makes a proposal certain or impossible.
_LEAST, _MOST = -8.0, 8.0


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
    """

    def __init__(self, priors: Priors) -> None:
        self._weights = {
            setting: list(priors.beside if setting.beside_draft else priors.alone) for setting in _SETTINGS
        }
        self._seen = {setting: [0.0] * len(weights) for setting, weights in self._weights.items()}

    def weight(self, setting: Setting, kind: int) -> float:
        """Return the log odds of a proposal; beside a draft, what the proposal adds to the draft's score."""
        return self._weights[setting][kind]

    def learn(self, setting: Setting, kind: int, expected: float, *, came: bool) -> None:
        """Learn whether a proposal came true, whose token was expected with a probability."""
        seen, weights = self._seen[setting], self._weights[setting]
        seen[kind] = min(seen[kind] + 1.0, _MOST_PROPOSALS)
        step = (came - expected) / (_VARIANCE * (_PRIOR_PROPOSALS + seen[kind]))
        weights[kind] = min(max(weights[kind] + max(min(step, 1.0), -1.0), _LEAST), _MOST)
