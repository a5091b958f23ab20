"""`bench --batch`: many answers in one pass, with and without a draft, at several numbers of answers.

One engine runs everything, with a fixed share of resident layers, so that only the number of answers differs. The two
systems take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol

from specchat.bench.identity import MarginFunction, compare
from specchat.bench.prompts import Question
from specchat.bench.records import OWN, AnswerRecord, BenchSettings, Run
from specchat.bench.tables import Table, number
from specchat.records.generation import Request, Sampling, Step
from specchat.records.model import Dtype

PLAIN = "plain"
Clock = Callable[[], float]


class BatchEngine(Protocol):
    """The part of `specchat.engine.engine.Engine` that this measurement uses."""

    def generate_many(
        self, requests: Iterable[Request], *, seats: int | None = None, cancel: Event | None = None
    ) -> Iterator[tuple[int, Step]]:
        """Answer many requests; see `Engine.generate_many`."""

    def forget(self) -> None:
        """Empty all caches."""


@dataclass(frozen=True)
class Asked:
    """A prompt of the measurement.

    Attributes:
        question: question, of which the first turn is asked.
        request: prompt and sampling.
    """

    question: Question
    request: Request


@dataclass(frozen=True)
class BatchRun:
    """All answers of one system at one number of answers at once.

    Attributes:
        batch: most answers at once.
        system: `OWN` or `PLAIN`.
        repeat: number of the repetition, from 1.
        runs: answers, in the order of the prompts.
        seconds: seconds from the first pass to the last token.
        num_passes: number of target passes.
        num_rows: rows of all passes, prompts and trees included.
    """

    batch: int
    system: str
    repeat: int
    runs: tuple[Run, ...]
    seconds: float
    num_passes: int
    num_rows: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(run.answer.token_ids) for run in self.runs)

    @property
    def tok_per_s(self) -> float:
        """Tokens per second of all answers together."""
        return self.num_tokens / self.seconds


@dataclass
class _Timed:
    """Steps of an answer with their ends, in seconds since the beginning."""

    seated_s: float
    steps: list[Step] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)

    def record(self) -> AnswerRecord:
        """Return the answer; its time begins with the pass that reads its prompt."""
        reason = self.steps[-1].finish_reason
        assert reason is not None, "complete answers only"
        return AnswerRecord(
            token_ids=tuple(token for step in self.steps for token in step.token_ids),
            finish_reason=reason,
            ttft_s=self.ends_s[0] - self.seated_s,
            decode_s=self.ends_s[-1] - self.ends_s[0],
            num_passes=len(self.steps),
            first_tokens=len(self.steps[0].token_ids),
            cached_tokens=self.steps[0].cached_rows,
            steps=tuple(self.steps),
        )


def measure_batches(
    engine: BatchEngine,
    asked: Sequence[Asked],
    batches: Sequence[int],
    settings: BenchSettings,
    *,
    without_draft: Callable[[], AbstractContextManager[None]],
    cancel: Event,
    report: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> list[BatchRun]:
    """Answer all prompts with both systems at every number of answers, in turn, as often as the settings say.

    Args:
        engine: engine with as many seats as the largest number.
        asked: prompts.
        batches: numbers of answers at once.
        settings: number of repeats.
        without_draft: makes a context in which the engine decodes plainly.
        cancel: ends the measurement; complete runs are kept.
        report: receives a line about what is being measured.
        clock: clock in seconds.
    """
    found = list[BatchRun]()
    scopes: dict[str, Callable[[], AbstractContextManager[None]]] = {OWN: nullcontext, PLAIN: without_draft}
    for repeat in range(1, settings.repeats + 1):
        for batch in batches:
            for system, scope in scopes.items():
                report(f"{system}, {batch} at once, repeat {repeat} of {settings.repeats}")
                engine.forget()
                with scope():
                    run = _run(engine, asked, batch, system, repeat, cancel, clock)
                if run is None:
                    return found
                found.append(run)
    return found


def _run(
    engine: BatchEngine, asked: Sequence[Asked], batch: int, system: str, repeat: int, cancel: Event, clock: Clock
) -> BatchRun | None:
    """Answer all prompts once; return None if interrupted."""
    begin = pass_begin_s = clock()
    answers: dict[int, _Timed] = {}
    shares, rows = 0.0, 0
    for index, step in engine.generate_many((each.request for each in asked), seats=batch, cancel=cancel):
        if step.finish_reason in ("interrupt", "error"):
            return None
        now = clock()
        answer = answers.setdefault(index, _Timed(pass_begin_s))
        answer.steps.append(step)
        answer.ends_s.append(now)
        shares += 1 / step.num_sharing
        rows += step.new_rows + step.tree_nodes
        if abs(shares - round(shares)) < 1e-6:  # the last step of its pass
            pass_begin_s = now
    runs = [_answered(each, answers[index].record(), system, repeat) for index, each in enumerate(asked)]
    return BatchRun(batch, system, repeat, tuple(runs), clock() - begin, round(shares), rows)


def _answered(asked: Asked, answer: AnswerRecord, system: str, repeat: int) -> Run:
    request = asked.request
    return Run(system, asked.question, 1, repeat, request.sampling, request.prompt_ids, answer, "")


def ask(
    questions: Sequence[Question],
    encode: Callable[[str], tuple[int, ...]],
    settings: BenchSettings,
    stop_ids: frozenset[int],
) -> list[Asked]:
    """Return the first turn of every question, at every temperature of the settings, each with a seed of its own."""
    pairs = [(question, temperature) for temperature in settings.temperatures for question in questions]
    return [
        Asked(
            question,
            Request(
                encode(question.turns[0]),
                Sampling(temperature=temperature, seed=settings.seed + number),
                stop_ids,
                settings.max_tokens,
            ),
        )
        for number, (question, temperature) in enumerate(pairs)
    ]


# --- the report --------------------------------------------------------------------------------------------------


def batches_object(runs: Sequence[BatchRun], dtype: Dtype, margin: MarginFunction) -> list[dict[str, Any]]:
    """Return the figures of every number of answers and system, in the order of the measurement.

    Args:
        runs: all runs.
        dtype: dtype of the computation, which sets the size of a near-tie.
        margin: margin of the target's best next token, called at differences.
    """
    kinds = list(dict.fromkeys((run.batch, run.system) for run in runs))
    reference = [run for run in runs if (run.batch, run.system) == (kinds[0][0], PLAIN)]
    plain = {batch: _mean_tok_per_s(runs, batch, PLAIN) for batch, _ in kinds}
    return [_figures(runs, *kind, plain[kind[0]], reference, dtype, margin) for kind in kinds]


def _figures(
    runs: Sequence[BatchRun],
    batch: int,
    system: str,
    plain_tok_per_s: float | None,
    reference: Sequence[BatchRun],
    dtype: Dtype,
    margin: MarginFunction,
) -> dict[str, Any]:
    own = [run for run in runs if (run.batch, run.system) == (batch, system)]
    answers = [each.answer for run in own for each in run.runs]
    num_passes, tokens = sum(run.num_passes for run in own), sum(run.num_tokens for run in own)
    tok_per_s = statistics.fmean(run.tok_per_s for run in own)
    same = compare(_every(own), _every(reference), keyed=True, dtype=dtype, margin=margin)
    return {
        "batch": batch,
        "system": system,
        "repeats": len(own),
        "answers": len(answers),
        "tokens": tokens,
        "tok_per_s": tok_per_s,
        "tok_per_s_sd": statistics.stdev([run.tok_per_s for run in own]) if len(own) > 1 else None,
        "tok_per_s_each": statistics.fmean(answer.tok_per_s for answer in answers),
        "ttft_s": statistics.fmean(answer.ttft_s for answer in answers),
        "passes": num_passes,
        "tokens_per_pass": tokens / num_passes,
        "tokens_per_step": statistics.fmean(answer.tokens_per_step for answer in answers),
        "rows_per_pass": sum(run.num_rows for run in own) / num_passes,
        "over_plain": tok_per_s / plain_tok_per_s if plain_tok_per_s else None,
        "compared": same.answers,
        "different": len(same.differences),
        "near_ties": sum(each.near_tie for each in same.differences),
    }


def _mean_tok_per_s(runs: Sequence[BatchRun], batch: int, system: str) -> float | None:
    speeds = [run.tok_per_s for run in runs if (run.batch, run.system) == (batch, system)]
    return statistics.fmean(speeds) if speeds else None


def _every(runs: Iterable[BatchRun]) -> list[Run]:
    return [each for run in runs for each in run.runs]


def batches_table(batches: Sequence[dict[str, Any]], seats: int) -> Table:
    """Return the figures as a table."""
    header = (
        *("at once", "system", "tok/s", "tok/s each", "tokens/pass", "tokens/step", "rows/pass"),
        *("first token s", "over plain", "same text"),
    )
    rows = []
    for each in batches:
        same = f"{each['compared'] - each['different']}/{each['compared']}"
        if each["different"]:
            same += f" ({each['near_ties']} near-ties)"
        rows.append(
            (
                str(each["batch"]),
                each["system"],
                number(each["tok_per_s"]),
                number(each["tok_per_s_each"]),
                number(each["tokens_per_pass"]),
                number(each["tokens_per_step"]),
                number(each["rows_per_pass"]),
                number(each["ttft_s"]),
                number(each["over_plain"]),
                same,
            )
        )
    note = (
        f"one engine with {seats} seats; tok/s of all answers together, prompts included; texts are compared with "
        f"plain decoding at {batches[0]['batch'] if batches else 1} at once"
    )
    return Table("many answers in one pass", header, tuple(rows), note)
