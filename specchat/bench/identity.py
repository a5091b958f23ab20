"""Comparison of a baseline's tokens with specchat's, with the first difference of each answer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.bench.records import Run
from specchat.records.generation import Sampling
from specchat.records.model import Dtype

# (context tokens, sampling) -> (margin of the next token's best score over the second best, largest score).
MarginFunction = Callable[[tuple[int, ...], Sampling], tuple[float, float]]

# Scores closer than this share of the largest score may swap their order, because other batch shapes round differently.
# float32: as in the tests of the engine. 16-bit: four times the rounding error, because a pass rounds several times.
_NEAR_TIE: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 4 * 2.0**-11, "bf16": 4 * 2.0**-8}
_NEAR_TIE_FLOOR = 1e-4


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers to one prompt.

    Attributes:
        question_id, turn, temperature: identity of the prompt.
        index: position of the first different token in the answer, from 0.
        own, other: two different tokens; None if that answer had ended.
        margin: score of the target's best token minus that of the second best.
        near_tie: whether rounding may explain the difference.
    """

    question_id: str
    turn: int
    temperature: float
    index: int
    own: int | None
    other: int | None
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class Identity:
    """The result of comparing two systems' texts.

    Attributes:
        answers: number of compared answers.
        tokens: number of tokens in the compared answers.
        differences: first difference of each answer that differs.
    """

    answers: int
    tokens: int
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> bool | None:
        """Whether all answers are identical; None if no answers were compared."""
        return not self.differences if self.answers else None


def compare(
    ours: Iterable[Run], theirs: Iterable[Run], *, keyed: bool, dtype: Dtype, margin: MarginFunction
) -> Identity:
    """Compare the answers of two systems to the same prompts.

    Args:
        ours: runs of specchat.
        theirs: runs of the other system.
        keyed: whether both sample by seed and position. If not, only greedy answers are compared.
        dtype: dtype of the computation, which sets the size of a near-tie.
        margin: function that returns the margin at a difference; called once for each difference.
    """
    base = {(run.prompt, run.repeat): run for run in theirs}
    pairs = [
        (run, base[run.prompt, run.repeat])
        for run in ours
        if (run.prompt, run.repeat) in base and (keyed or run.sampling.greedy)
    ]
    found = [_difference(own, other, dtype, margin) for own, other in pairs]
    num_tokens = sum(len(own.answer.token_ids) for own, _ in pairs)
    return Identity(len(pairs), num_tokens, tuple(difference for difference in found if difference is not None))


def _difference(own: Run, other: Run, dtype: Dtype, margin: MarginFunction) -> Difference | None:
    a, b = own.answer.token_ids, other.answer.token_ids
    if a == b:
        return None
    shorter = min(len(a), len(b))
    index = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    ahead, scale = margin((*own.prompt_ids, *a[:index]), own.sampling)
    return Difference(
        question_id=own.question.question_id,
        turn=own.turn,
        temperature=own.temperature,
        index=index,
        own=a[index] if index < len(a) else None,
        other=b[index] if index < len(b) else None,
        margin=ahead,
        near_tie=ahead <= max(_NEAR_TIE_FLOOR, _NEAR_TIE[dtype] * scale),
    )
