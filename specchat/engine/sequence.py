"""The state of one answer while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

from torch import Tensor

from specchat.engine.sampling import Sampler
from specchat.records.generation import FinishReason


@dataclass(eq=False)
class TokenSequence:
    """A prompt and the answer written so far.

    Attributes:
        index: number of the request.
        seat: region of the caches that holds the sequence.
        tokens: committed tokens, the prompt's first; the last one is the root of the next tree.
        num_cached: number of leading tokens whose rows are in the target's cache.
        sampler: draws of the target's tokens.
        stop_ids: token ids that end the answer.
        max_length: most tokens of prompt and answer together.
        length_reason: reason of the end at `max_length`.
        cancel: event that ends this sequence alone, or None.
    """

    index: int
    seat: int
    tokens: list[int]
    num_cached: int
    sampler: Sampler
    stop_ids: frozenset[int]
    max_length: int
    length_reason: FinishReason
    cancel: Event | None = None

    @property
    def pending(self) -> list[int]:
        """Committed tokens that the next pass computes; the last one is the root."""
        return self.tokens[self.num_cached :]

    @property
    def max_depth(self) -> int:
        """Most levels of a draft tree; the target's own token follows each accepted path."""
        return self.max_length - len(self.tokens) - 1

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the rest of the answer."""
        return self.cancel is not None and self.cancel.is_set()

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Return whether the answer ends where `tokens` are all tokens of prompt and answer."""
        return tokens[-1] in self.stop_ids or len(tokens) >= self.max_length

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason of the end of the answer; None while the answer continues."""
        if self.tokens[-1] in self.stop_ids:
            return "stop"
        return self.length_reason if len(self.tokens) >= self.max_length else None


@dataclass(frozen=True)
class FinalStates:
    """The target's hidden states of the rows of a pass that became final, for drafters that read them.

    Attributes:
        tokens: copy of the committed tokens of the sequence; all but the last one have states now.
        first: number of tokens before the first of these rows.
        hidden: states after the target's last norm, [len(tokens) - 1 - first, hidden].
        tapped: states that the drafter's taps collected of these rows, [len(tokens) - 1 - first, width]; None without.
    """

    tokens: list[int]
    first: int
    hidden: Tensor
    tapped: Tensor | None = None
