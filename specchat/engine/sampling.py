"""Exact draws from the target's distribution: a keyed exponential race, and the processors before it.

The token at a position is `argmax_i p_i / e_i` with `e_i ~ Exp(1)`. The race is won by token i with probability exactly
p_i (minimum of independent exponentials with rates p_i), so no rejection step is needed and the text is the target's
own for any tree. Each `e_i` is a pure function of (seed, absolute position, token id): whoever evaluates a position,
in whatever batch, draws the same token, and a drafter may look at the very same noise.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.models.hf.processors import logits_processors
from specchat.records.generation import Sampling
from specchat.records.limits import NOISE_ROWS

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's int64 reads it."""
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """SplitMix64's finaliser on one 64-bit number.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` on int64 tensors; torch shifts arithmetically, so the sign's copies are masked off."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Noise:
    """The race's noise, `-log e`, one row of the vocabulary per absolute position; rows are kept while they are near.

    Args:
        seed: any integer.
        vocab_size: V.
        device: where the rows live.
        max_rows: rows kept at once.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device, max_rows: int = NOISE_ROWS) -> None:
        self._seed_key = _mix(seed & _MASK64)
        self._steps = torch.arange(1, vocab_size + 1, device=device) * _signed(_GAMMA)
        self._max_rows = max_rows
        self._rows: dict[int, Tensor] = {}

    def row(self, position: int) -> Tensor:
        """`-log e` for every token at `position`: float32 [V]."""
        if position not in self._rows:
            if len(self._rows) >= self._max_rows:
                del self._rows[min(self._rows)]  # positions only move on
            self._rows[position] = self._draw(position)
        return self._rows[position]

    def _draw(self, position: int) -> Tensor:
        key = _signed(_mix((self._seed_key + (position + 1) * _GAMMA) & _MASK64))
        bits = (_mix_tensor(self._steps + key) >> 12) & ((1 << 52) - 1)
        # 52 bits and a half keep u strictly inside (0, 1); e near 0 decides races, so precision is spent there
        u = (bits.double() + 0.5) * 2.0**-52
        return -torch.log(-torch.log1p(-u)).float()


class ScoresNotFiniteError(Exception):
    """Scores among which no best one exists: NaN, infinite, or all -inf. A score of -inf alone excludes a token."""


class Sampler:
    """Draws the target's tokens: processors as transformers applies them, then argmax or the race.

    Args:
        sampling: processors and seed.
        vocab_size: V.
        device: where logits arrive.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.noise = None if sampling.greedy else Noise(sampling.seed, vocab_size, device)
        self._processors = logits_processors(sampling)
        self._needs_context = sampling.repetition_penalty != 1.0

    def draw(self, logits: Tensor, context: Sequence[int]) -> int:
        """The token that follows `context`.

        Args:
            logits: the target's scores, float32 [V].
            context: every token before this position; its length is the position.

        Raises:
            ScoresNotFiniteError: the best score is NaN or infinite. For torch, NaN is larger than any number.
        """
        scores = self.scores(logits, context)
        token = int(scores.argmax())
        if not math.isfinite(scores[token]):
            raise ScoresNotFiniteError
        return token

    def scores(self, logits: Tensor, context: Sequence[int]) -> Tensor:
        """What `draw` takes the argmax of: processed logits (greedy) or `log p - log e` up to a constant; [V]."""
        ids = torch.tensor([context if self._needs_context else context[-1:]], device=logits.device)
        processed: Tensor = self._processors(ids, logits[None].float())[0]
        return processed if self.noise is None else processed + self.noise.row(len(context))
