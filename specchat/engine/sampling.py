"""Exact draws from the target's distribution: logits processors, then a keyed exponential race.

The token at a position is `argmax_i p_i / e_i` with `e_i ~ Exp(1)`. Token i wins the race with probability exactly p_i
(minimum of independent exponentials with rates p_i). So no rejection step is needed, and the text is the target's own
for any tree. Each `e_i` is a pure function of (seed, absolute position, token id). So a position draws the same token
in any batch, and the drafter can use the target's noise.
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
    """Return the signed integer with the 64-bit pattern of `value`, as torch's int64 needs it."""
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """Apply SplitMix64's finaliser to one 64-bit integer.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators.
    """
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    """Apply `_mix` to an int64 tensor; torch shifts arithmetically, so mask off the copied sign bits."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Noise:
    """Noise of the race, `-log e`, one row of V values per absolute position; the latest rows are cached.

    Args:
        seed: any integer.
        vocab_size: V.
        device: device of the rows.
        max_rows: number of rows to cache.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device, max_rows: int = NOISE_ROWS) -> None:
        self._seed_key = _mix(seed & _MASK64)
        self._steps = torch.arange(1, vocab_size + 1, device=device) * _signed(_GAMMA)
        self._max_rows = max_rows
        self._rows: dict[int, Tensor] = {}

    def row(self, position: int) -> Tensor:
        """Return `-log e` for every token at `position`, float32 [V]."""
        if position not in self._rows:
            if len(self._rows) >= self._max_rows:
                del self._rows[min(self._rows)]  # positions only increase
            self._rows[position] = self._draw(position)
        return self._rows[position]

    def _draw(self, position: int) -> Tensor:
        key = _signed(_mix((self._seed_key + (position + 1) * _GAMMA) & _MASK64))
        bits = (_mix_tensor(self._steps + key) >> 12) & ((1 << 52) - 1)
        # 52 bits plus one half keep u strictly inside (0, 1). A small e wins the race, so log1p keeps precision near 0.
        u = (bits.double() + 0.5) * 2.0**-52
        return -torch.log(-torch.log1p(-u)).float()


class ScoresNotFiniteError(Exception):
    """Scores among which no best one exists: NaN, infinite, or all -inf. A score of -inf alone excludes a token."""


class Sampler:
    """Draws the target's tokens: logits processors, applied as in transformers, then argmax or the race.

    Args:
        sampling: parameters of the processors, and the seed.
        vocab_size: V.
        device: device of the logits.
        noise_rows: number of rows of noise to cache.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, device: torch.device, noise_rows: int = NOISE_ROWS) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.noise = None if sampling.greedy else Noise(sampling.seed, vocab_size, device, noise_rows)
        self._processors = logits_processors(sampling)
        self._needs_context = sampling.repetition_penalty != 1.0

    def draw(self, logits: Tensor, context: Sequence[int]) -> int:
        """Return the token that follows `context`.

        Args:
            logits: the target's scores, float32 [V].
            context: all tokens before this position; the position is the context's length.

        Raises:
            ScoresNotFiniteError: the best score is NaN or infinite. For torch, NaN is larger than any number.
        """
        return checked_token(*_best(self.scores(logits, context)).tolist())

    def scores(self, logits: Tensor, context: Sequence[int]) -> Tensor:
        """Return the scores [V] that `draw` maximizes: processed logits if greedy, else `log p - log e + const`."""
        ids = torch.tensor([self.known_of(context)], dtype=torch.int64, device=logits.device)
        return self._scores(logits, ids, len(context))

    def best_tokens(self, logits: Tensor, contexts: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
        """Return the best token of each row and its score, float64 [n, 2]; the host waits for nothing.

        Rows are processed one by one, because the processors' workspace is counted for a single row.

        Args:
            logits: the target's scores, float32 [n, V].
            contexts: results of `known_of` for the tokens before each row, int64 [length], on the device.
            positions: absolute positions of the drawn tokens.
        """
        rows = zip(logits, contexts, positions, strict=True)
        return torch.stack([_best(self._scores(row, ids[None], position)) for row, ids, position in rows])

    def known_of(self, context: Sequence[int]) -> Sequence[int]:
        """Return the tokens of a context that the processors read: all, or none."""
        return context if self._needs_context else context[:0]

    def _scores(self, logits: Tensor, ids: Tensor, position: int) -> Tensor:
        processed: Tensor = self._processors(ids, logits[None].float())[0]
        return processed if self.noise is None else processed + self.noise.row(position)


def _best(scores: Tensor) -> Tensor:
    """Return the best token and its score, float64 [2], in one tensor: each copy to the host is a wait."""
    return torch.stack([scores.argmax().double(), scores.amax().double()])


def checked_token(token: float, score: float) -> int:
    """Return a drawn token.

    Raises:
        ScoresNotFiniteError: the best score is NaN or infinite.
    """
    if not math.isfinite(score):
        raise ScoresNotFiniteError
    return int(token)
