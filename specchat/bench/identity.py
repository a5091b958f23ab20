"""Whether a baseline wrote the same tokens, and where it first did not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.bench.records import Run
from specchat.records.generation import Sampling
from specchat.records.model import Dtype

# (tokens before, how the next is drawn) -> (margin of the best token over the second, largest score).
Margin = Callable[[tuple[int, ...], Sampling], tuple[float, float]]

# Scores closer than this share of the largest score may change places when another batch shape changes the rounding:
# float32 as in the tests of the engine; 16-bit from the type's own step, which a pass takes several times.
_NEAR_TIE: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 4 * 2.0**-11, "bf16": 4 * 2.0**-8}
_NEAR_TIE_FLOOR = 1e-4


@dataclass(frozen=True)
class Difference:
    """The first token that two answers to one prompt do not share.

    Attributes:
        question_id, turn, temperature: which prompt.
        index: of the token in the answer, from 0.
        own, other: the two tokens; None where an answer had ended.
        margin: how far the target's best token is ahead of the second there.
        near_tie: whether rounding alone may have decided.
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
    """How two systems' texts compare.

    Attributes:
        answers: compared.
        tokens: in them.
        differences: one for each answer that differs.
    """

    answers: int
    tokens: int
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> bool | None:
        """Whether all are; None if nothing could be compared."""
        return not self.differences if self.answers else None


def compare(ours: Iterable[Run], theirs: Iterable[Run], *, keyed: bool, dtype: Dtype, margin: Margin) -> Identity:
    """Compares answers to the same prompts.

    Args:
        ours: runs of one system.
        theirs: runs of another.
        keyed: both draw by seed and position, so sampled answers are compared, too; else only greedy ones.
        dtype: decides what a near-tie is.
        margin: asked once for each difference.
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


def _difference(own: Run, other: Run, dtype: Dtype, margin: Margin) -> Difference | None:
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
