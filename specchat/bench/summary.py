"""Figures of runs: means, spreads, and speedups with their uncertainty. Pure functions of records."""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from specchat.bench.records import Run
from specchat.records.generation import Step, guesses_of

# Resampling uses a fixed seed, so the same runs give the same interval.
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over answers; None where there are too few answers."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class PassSplit:
    """The parts of the time of a mean pass, in seconds; their sum is `pass_s`.

    Attributes:
        link_wait_s: time in which the target waited for layers, and in which the draft grew its tree meanwhile.
        compute_s: time in which the target computed.
        draft_s: time of drafting that no reads of layers hid.
        head_s: time of the head, the logits processors and the walk down the tree.
        host_s: remaining time: caches and bookkeeping.
    """

    link_wait_s: float
    compute_s: float
    draft_s: float
    head_s: float
    host_s: float


@dataclass(frozen=True)
class SourceShare:
    """The acceptance of one source's draft nodes, and their cost.

    Attributes:
        source: name of the source.
        offered_per_step: mean number of its nodes in a tree.
        accepted_per_step: mean number of its nodes that the target accepted.
        share: share of its nodes that the target accepted; 0 without nodes.
        offered_by_depth: number of its nodes at depth 1, 2, ..., of all trees together.
        accepted_by_depth: number of its accepted nodes at depth 1, 2, ...
        draft_s: mean seconds of a step that the source took.
        draft_passes: mean number of passes of a draft model in a step.
    """

    source: str
    offered_per_step: float
    accepted_per_step: float
    share: float
    offered_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()
    draft_s: float = 0.0
    draft_passes: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Figures of one system's answers; means are over the counted answers.

    Attributes:
        answers: number of answers.
        counted: number of answers that do not repeat themselves.
        tok_per_s: tokens per second, including prefill.
        decode_tok_per_s: tokens per second after the first pass.
        ttft_s: seconds to the first token.
        prompt_tok_per_s: new prompt tokens per second of `ttft_s`.
        tokens_per_step: tokens per pass of the target.
        distinct_4gram: share of distinct 4-grams over all answers, counted or not.
        pass_s: mean seconds of a pass with its drafting; None without step records, like `draft_share` and `split`.
        draft_share: share of drafting in `pass_s`.
        split: parts of `pass_s`.
        achieved_bytes_per_s: streamed bytes per second of whole passes; None if nothing streamed.
        accept_by_depth: shares of the trees reaching depth 1, 2, ... whose token at that depth was accepted.
        accept_by_source: acceptance of each source's draft nodes, sorted by name.
    """

    answers: int
    counted: int
    tok_per_s: Spread
    decode_tok_per_s: Spread
    ttft_s: Spread
    prompt_tok_per_s: Spread
    tokens_per_step: Spread
    distinct_4gram: Spread
    pass_s: float | None
    draft_share: float | None
    split: PassSplit | None
    achieved_bytes_per_s: float | None
    accept_by_depth: tuple[float, ...]
    accept_by_source: tuple[SourceShare, ...]


@dataclass(frozen=True)
class Ratio:
    """The ratio of two systems' figures over pairs of answers to the same prompt.

    Attributes:
        ratio: geometric mean over the pairs.
        low, high: bounds of the 95% interval from resampled questions; None for a single question.
        pairs: number of pairs.
        p_value: probability that chance alone gives a ratio as far from 1; None for a single question.
    """

    ratio: float
    low: float | None
    high: float | None
    pairs: int
    p_value: float | None


def figures(runs: Iterable[Run]) -> Figures:
    """Return the figures of one system's runs."""
    every = list(runs)
    counted = [run for run in every if run.counted]
    steps = [step for run in counted for step in run.answer.steps]
    pass_s = sum(step.pass_s for step in steps)
    streamed = sum(step.streamed_bytes for step in steps)
    return Figures(
        answers=len(every),
        counted=len(counted),
        tok_per_s=spread(run.answer.tok_per_s for run in counted),
        decode_tok_per_s=spread(run.answer.decode_tok_per_s for run in counted),
        ttft_s=spread(run.answer.ttft_s for run in counted),
        prompt_tok_per_s=spread(_prompt_tok_per_s(run) for run in counted),
        tokens_per_step=spread(run.answer.tokens_per_step for run in counted),
        distinct_4gram=spread(run.distinct_4gram for run in every),
        pass_s=pass_s / len(steps) if steps else None,
        draft_share=sum(step.exposed_draft_s for step in steps) / pass_s if steps else None,
        split=_split(steps),
        achieved_bytes_per_s=streamed / pass_s if streamed else None,
        accept_by_depth=_accept_by_depth(steps),
        accept_by_source=_accept_by_source(steps),
    )


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean and standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    return Spread(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
    )


def run_spread(runs: Iterable[Run]) -> float | None:
    """Return standard deviation / mean of the repeats' mean tokens per second; None for a single repeat."""
    by_repeat: dict[int, list[float]] = {}
    for run in runs:
        if run.counted:
            by_repeat.setdefault(run.repeat, []).append(run.answer.tok_per_s)
    means = [statistics.fmean(values) for values in by_repeat.values()]
    return statistics.stdev(means) / statistics.fmean(means) if len(means) > 1 else None


def speedup(ours: Iterable[Run], theirs: Iterable[Run]) -> Ratio | None:
    """Return the ratio of tokens per second, paired by prompt and repeat; None without counted pairs."""
    return _paired(ours, theirs, lambda run: run.answer.tok_per_s)


def pass_speedup(ours: Iterable[Run], theirs: Iterable[Run]) -> Ratio | None:
    """Return the ratio of passes per second: the speedup at equal tokens per pass.

    A ratio of 0.8 means that 80% of the gain in tokens per pass becomes speed.
    """
    return _paired(ours, theirs, lambda run: run.answer.num_passes / run.answer.total_s)


def _paired(ours: Iterable[Run], theirs: Iterable[Run], rate: Callable[[Run], float]) -> Ratio | None:
    base = {(run.prompt, run.repeat): run for run in theirs if run.counted}
    logs: dict[str, list[float]] = {}
    for run in ours:
        other = base.get((run.prompt, run.repeat))
        if other is not None and run.counted:
            logs.setdefault(run.question.question_id, []).append(math.log(rate(run) / rate(other)))
    return ratio_of(logs)


@dataclass(frozen=True)
class PassPrediction:
    """The predicted time of a pass, from the link's rate and the measured parts of a pass.

    Attributes:
        pass_s: seconds of a mean pass.
        tok_per_s: tokens per second at the measured tokens per pass.
    """

    pass_s: float
    tok_per_s: float


def predict(runs: Iterable[Run], streamed_bytes_per_step: int, link_bytes_per_s: float | None) -> PassPrediction | None:
    """Predict the time of a pass: the longer of streaming and computing, which overlap, plus all other parts.

    Args:
        runs: runs of specchat.
        streamed_bytes_per_step: bytes that a pass streams by the plan.
        link_bytes_per_s: rate of the link without other work in bytes/s, or None.

    Returns:
        Prediction, or None if nothing streams, the rate is unknown, or there are no steps.
    """
    answers = [run.answer for run in runs if run.counted]
    split = _split([step for answer in answers for step in answer.steps])
    if split is None or link_bytes_per_s is None or not streamed_bytes_per_step:
        return None
    pass_s = max(streamed_bytes_per_step / link_bytes_per_s, split.compute_s)
    pass_s += split.draft_s + split.head_s + split.host_s
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return PassPrediction(pass_s, num_tokens / sum(answer.num_passes for answer in answers) / pass_s)


def ratio_of(logs_by_question: dict[str, list[float]]) -> Ratio | None:
    """Return a ratio and its uncertainty from the logarithms of paired ratios.

    Answers to one question (turns, temperatures, repeats) form a group, because they are not independent.
    """
    groups = [logs for logs in logs_by_question.values() if logs]
    if not groups:
        return None
    every = [log for logs in groups for log in logs]
    low, high = _interval(groups)
    return Ratio(math.exp(statistics.fmean(every)), low, high, len(every), _p_value(groups))


def _interval(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Return the 95% interval by the percentile bootstrap over groups."""
    if len(groups) < 2:
        return None, None
    generator = random.Random(0)
    means = []
    for _ in range(_RESAMPLES):
        chosen = [log for _ in groups for log in generator.choice(groups)]
        means.append(statistics.fmean(chosen))
    means.sort()
    tail = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return math.exp(means[tail]), math.exp(means[-1 - tail])


def _p_value(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the p-value of a sign-flip test: without a real difference, the signs of group means are random."""
    if len(groups) < 2:
        return None
    means = [statistics.fmean(logs) for logs in groups]
    observed = abs(sum(means)) * (1 - 1e-12)
    if len(means) <= 12:
        flips = [_signs(number, len(means)) for number in range(1 << len(means))]
        return sum(_flipped(means, signs) >= observed for signs in flips) / len(flips)
    generator = random.Random(0)
    hits = sum(
        _flipped(means, _signs(generator.getrandbits(len(means)), len(means))) >= observed for _ in range(_RESAMPLES)
    )
    return (hits + 1) / (_RESAMPLES + 1)


def _signs(bits: int, count: int) -> list[int]:
    return [1 if bits >> i & 1 else -1 for i in range(count)]


def _flipped(means: Sequence[float], signs: Sequence[int]) -> float:
    return abs(sum(mean * sign for mean, sign in zip(means, signs, strict=True)))


def _prompt_tok_per_s(run: Run) -> float:
    return (len(run.prompt_ids) - run.answer.cached_tokens) / run.answer.ttft_s


def _split(steps: Sequence[Step]) -> PassSplit | None:
    if not steps:
        return None
    mean: Callable[[Callable[[Step], float]], float] = lambda part: statistics.fmean(map(part, steps))  # noqa: E731
    return PassSplit(
        link_wait_s=mean(lambda step: step.stream_wait_s + step.draft_hidden_s),
        compute_s=mean(lambda step: step.verify_s - step.stream_wait_s),
        draft_s=mean(lambda step: step.exposed_draft_s),
        head_s=mean(lambda step: step.sample_s),
        host_s=mean(lambda step: step.pass_s - step.verify_s - step.draft_s - step.sample_s),
    )


def _accept_by_depth(steps: Sequence[Step]) -> tuple[float, ...]:
    deepest = max((step.depth for step in steps), default=0)
    shares = []
    for depth in range(1, deepest + 1):
        offered = [step for step in steps if step.depth >= depth]
        shares.append(sum(step.accepted >= depth for step in offered) / len(offered))
    return tuple(shares)


def _accept_by_source(steps: Sequence[Step]) -> tuple[SourceShare, ...]:
    return tuple(
        SourceShare(
            each.source,
            each.offered / len(steps),
            each.accepted / len(steps),
            each.accepted / max(each.offered, 1),
            each.offered_by_depth,
            each.accepted_by_depth,
            each.draft_s / len(steps),
            each.draft_passes / len(steps),
        )
        for each in guesses_of(steps)
    )
