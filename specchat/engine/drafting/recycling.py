"""Token recycling (arXiv 2408.08696): what the target itself scored best after the same tokens, earlier.

The walk scores the visited nodes and their likeliest neighbours, of which most are thrown away. Their best tokens say
what this target writes after these tokens. After other tokens, the lucky ones of frequent tokens are proposed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.engine.drafting.frequent import NUM_SHARES, FrequentTokens
from specchat.engine.drafting.sources import Priors, Proposal
from specchat.engine.sequence import TokenSequence
from specchat.records.limits import RECYCLED_RUNS

# Best tokens kept for each run of tokens.
_WIDTH = 8
# Classes of the target's probability, by their least value.
_PROBABILITIES = (0.0, 0.03, 0.1, 0.3, 0.6, 0.9)
# Lengths of the runs, longest first.
_ORDERS = (3, 2, 1)
# Number of the first kind of frequent tokens.
_FIRST_FREQUENT = len(_ORDERS) * len(_PROBABILITIES)

_Best = tuple[Proposal, ...]


class Recycling:
    """A source that proposes the target's best tokens after the same run of tokens, and lucky frequent tokens."""

    name = "recycling"
    # Log odds by kind: classes of probability for runs of three tokens, of two, and of one, then classes of frequency.
    # Beside a draft model, a single token says nothing, and nothing does if the answer is sampled: the noise decides.
    priors = Priors(
        alone=(
            *(-4.3, -2.2, -1.0, -0.2, 1.2, 1.7, -4.8, -2.8, -1.2, -0.8, 0.3, 0.8, -5.0, -3.2, -1.8, -1.1, -0.3, -0.3),
            *(-8.0, -8.0, -7.3, -6.8, -6.2, -4.9, -3.7),
        ),
        beside=(
            *(-0.05, 0.25, 0.45, 0.5, 0.45, 0.9, -0.15, 0.05, 0.45, 0.45, 0.45, 0.3),
            *[None] * (_FIRST_FREQUENT - 12 + NUM_SHARES),
        ),
        beside_sampled=(None,) * (_FIRST_FREQUENT + NUM_SHARES),
    )

    def __init__(self) -> None:
        self._best: list[dict[tuple[int, ...], _Best]] = [{} for _ in _ORDERS]
        self._frequent = FrequentTokens(_FIRST_FREQUENT)

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Count the sequences' new tokens; the target's scores come by `observe`."""
        self._frequent.begin(sequences)

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Keep the best tokens of rows that the target scored.

        Args:
            tails: last tokens up to each row.
            scores: the target's scores of each row, float32 [n, V].
        """
        best = scores.topk(min(_WIDTH, scores.shape[-1]), dim=-1)
        shares = (best.values - scores.logsumexp(-1, keepdim=True)).exp()
        # One copy to the host, because each one waits for a GPU; a double holds every token id.
        found = torch.stack([best.indices.double(), shares.double()], 1).tolist()
        for tail, (numbers, each) in zip(tails, found, strict=True):
            tokens = [int(number) for number in numbers]
            classes = [bisect_right(_PROBABILITIES, share) - 1 for share in each]
            self._frequent.count(zip(tokens, each, strict=True))
            for place, (order, kept) in enumerate(zip(_ORDERS, self._best, strict=True)):
                if len(tail) < order:
                    continue
                run = tuple(tail[-order:])
                kept.pop(run, None)  # inserted anew below: the table is ordered by last use
                first = place * len(_PROBABILITIES)
                kept[run] = tuple(Proposal(token, first + kind) for token, kind in zip(tokens, classes, strict=True))
                if len(kept) > RECYCLED_RUNS // len(_ORDERS):
                    del kept[next(iter(kept))]

    def propose(self, seat: int, tail: Sequence[int], luck: Tensor | None) -> Sequence[Proposal]:
        """Return the target's best tokens after the longest known run at the end of the tail, then lucky ones."""
        best = self._best_after(tail)
        if luck is None:
            return best
        known = {proposal.token for proposal in best}
        return [*best, *(each for each in self._frequent.lucky(luck) if each.token not in known)]

    def _best_after(self, tail: Sequence[int]) -> _Best:
        for order, kept in zip(_ORDERS, self._best, strict=True):
            if len(tail) >= order and (found := kept.get(tuple(tail[-order:]))) is not None:
                return found
        return ()

    def reset(self) -> None:
        """Forget all scores."""
        self._best = [{} for _ in _ORDERS]
        self._frequent.reset()
