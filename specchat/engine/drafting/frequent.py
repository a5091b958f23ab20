"""Frequent tokens: guesses where nothing repeats, chosen by the luck of the sampler's noise.

A text and the target's scores so far tell how often each token is written, whatever came before. That alone says
little. But a sampled answer is a race whose noise is known (`Sampler`): a token that the noise favours by some nats may
win although it is unlikely. So of the frequent tokens, the luckiest are worth the nodes that repeats leave.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specchat.engine.drafting.sources import Proposal
from specchat.engine.sequence import TokenSequence
from specchat.records.limits import FREQUENT_TOKENS

# Tokens proposed for each position. Tokens per step of SmolLM2-135M at t=0.7 on the copying prompts, in a replay of its
# answers: 2.67 without, 3.09 with 8, 3.18 with 24, 3.19 with 48.
_MOST = 16
# Classes of a token's share of all tokens, by the least logarithm.
_SHARES = (-100.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0)
NUM_SHARES = len(_SHARES)


class FrequentTokens:
    """Counts of tokens in texts and in the target's scores, and the lucky ones among frequent tokens.

    Args:
        first_kind: kind of proposals of the rarest tokens; `NUM_SHARES` kinds follow.
    """

    def __init__(self, first_kind: int) -> None:
        self._first_kind = first_kind
        self._counts: dict[int, float] = {}
        self._read: dict[int, int] = {}  # tokens that were counted, by seat
        self._tokens, self._logs = torch.empty(0, dtype=torch.int64), torch.empty(0)
        # Proposals by position: by the address of its noise, which the tensor beside them keeps alive.
        self._lucky: dict[int, tuple[Tensor, list[Proposal]]] = {}

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Count the sequences' new tokens, and forget the choices for earlier trees."""
        for sequence in sequences:
            begin = min(self._read.get(sequence.seat, 0), sequence.num_cached)
            self.count((token, 1.0) for token in sequence.tokens[begin:])
            self._read[sequence.seat] = len(sequence.tokens)
        self._tokens, self._lucky = torch.tensor(list(self._counts), dtype=torch.int64), {}
        counts = torch.tensor(list(self._counts.values()))
        self._logs = (counts / counts.sum()).log()

    def count(self, tokens: Iterable[tuple[int, float]]) -> None:
        """Count tokens, or shares of them; older ones fade as the table fills up."""
        counts = self._counts
        for token, share in tokens:
            if share > 0:  # broken scores are NaN
                counts[token] = counts.get(token, 0.0) + share
        if len(counts) > FREQUENT_TOKENS:
            most = sorted(counts.items(), key=lambda item: -item[1])[: FREQUENT_TOKENS // 2]
            self._counts = {token: count / 2 for token, count in most}

    def lucky(self, luck: Tensor) -> list[Proposal]:
        """Return the likeliest winners of a position's race.

        Args:
            luck: the sampler's noise at the position [V].
        """
        if (known := self._lucky.get(id(luck))) is not None:
            return known[1]
        tokens, logs = (each.to(luck.device) for each in (self._tokens, self._logs))
        best = (logs + luck[tokens]).topk(min(_MOST, len(tokens))).indices
        # One copy to the host, because each one waits for a GPU; a double holds every token id.
        numbers, shares = torch.stack([tokens[best].double(), logs[best].double()]).tolist()
        found = [
            Proposal(int(number), self._first_kind + bisect_right(_SHARES, share) - 1)
            for number, share in zip(numbers, shares, strict=True)
        ]
        self._lucky[id(luck)] = luck, found
        return found

    def reset(self) -> None:
        """Forget all counts."""
        self._counts, self._read, self._lucky = {}, {}, {}
