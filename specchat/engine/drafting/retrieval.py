"""Retrieval: what followed the last tokens wherever they stood before, in this text or in earlier ones.

Text that copies (code, summaries, lists, quotes) repeats long runs of the prompt. Repeats are found as in prompt lookup
and SuffixDecoding (arXiv 2411.04975), without a model. Their worth is learned by the length of the repeat.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor

from specchat.engine.drafting.sources import Priors, Proposal
from specchat.engine.drafting.suffix_index import SuffixIndex
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import common_prefix
from specchat.records.limits import RETRIEVAL_PAST_TOKENS

# Least lengths of the classes of repeats.
_LENGTHS = (1, 2, 3, 4, 5, 7, 9, 13, 16)
# Continuations proposed for each node, and their ranks: the one behind the longest repeat, the second one, and others.
_WAYS, _RANKS = 4, 3
# Shorter texts are not worth keeping.
_LEAST_TEXT = 8


class Retrieval:
    """A source that proposes what followed the longest repeats of a node's last tokens.

    Each seat has an index of its text. What a seat drops, because another text follows, joins the index of earlier
    texts, which all seats share.

    Args:
        seats: number of seats.
    """

    name = "retrieval"
    # Log odds by kind: classes of length for each rank. Beside a draft, a single token says nothing, and neither do
    # further continuations; beside one that ranks by the sampler's own noise, short repeats do not either.
    priors = Priors(
        alone=(
            *(-1.0, 0.0, 0.7, 1.0, 1.2, 1.5, 2.4, 2.8, 3.4),
            *(-1.5, -1.2, -1.6, -1.6, -1.4, -0.6, -0.6, -0.6, -0.6),
            *(-2.5, -2.4, -2.2, -2.2, -2.0, -1.5, -1.5, -1.5, -1.5),
        ),
        beside=(
            *(None, 0.3, 0.3, 0.6, 0.6, 0.65, 0.9, 1.1, 1.5),
            *(None, 0.0, 0.2, 0.25, 0.25, 0.3, 0.5, 0.6, 0.6),
            *[None] * 9,
        ),
        beside_sampled=(*[None] * 5, 0.65, 0.9, 1.1, 1.5, *[None] * 18),
    )

    def __init__(self, seats: int) -> None:
        self._texts = [SuffixIndex() for _ in range(seats)]
        self._past = SuffixIndex()

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Read the sequences' new tokens."""
        for sequence in sequences:
            text = self._texts[sequence.seat]
            shared = common_prefix(text.tokens, sequence.tokens)
            self._remember(text.tokens[shared:])
            text.truncate(shared)
            text.append(sequence.tokens[shared:])

    def propose(self, seat: int, tail: Sequence[int], luck: Tensor | None) -> list[Proposal]:
        """Return what followed the longest repeats of the tail."""
        longest: dict[int, int] = {}
        for index in (self._texts[seat], self._past):
            for place, length in index.matches(tail):
                token = index.tokens[place]
                longest[token] = max(longest.get(token, 0), length)
        best = sorted(longest.items(), key=lambda item: -item[1])[:_WAYS]
        return [
            Proposal(token, min(rank, _RANKS - 1) * len(_LENGTHS) + bisect_right(_LENGTHS, length) - 1)
            for rank, (token, length) in enumerate(best)
        ]

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Do nothing: texts alone are searched."""

    def reset(self) -> None:
        """Forget all texts."""
        self._texts = [SuffixIndex() for _ in self._texts]
        self._past = SuffixIndex()

    def _remember(self, tokens: Sequence[int]) -> None:
        if len(tokens) < _LEAST_TEXT:
            return
        most = RETRIEVAL_PAST_TOKENS
        if len(self._past.tokens) + len(tokens) > most:  # drop the older half
            kept = self._past.tokens[-most // 2 :]
            self._past = SuffixIndex()
            self._past.append(kept)
        self._past.append(tokens[-most // 2 :])
