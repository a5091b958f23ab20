"""The JSON of `bench --json`, in bytes, seconds and unrounded values; `schema.json` describes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specchat.bench import summary
from specchat.bench.cold import PassRounds
from specchat.bench.identity import Identity
from specchat.bench.records import OWN, BenchSettings, Measurement, Run
from specchat.chat.answer import Speculation, Timings, Turn, Usage
from specchat.chat.result import SCHEMA_VERSION, plan_object, run_object
from specchat.records.chat import Message
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from specchat.records.usage import MemoryReport

# Describes `summary.predict`.
PREDICTION_BASIS = (
    "the longer of streaming at the link's own rate and computing, plus drafting, head and host time of this run"
)


@dataclass(frozen=True)
class Baseline:
    """A baseline's name, and the comparison of its texts with specchat's."""

    name: str
    identity: Identity


@dataclass(frozen=True)
class Outcome:
    """All results of one plan's measurement.

    Attributes:
        plan: measured plan.
        load_s: seconds to load the models.
        measurement: runs of all systems.
        baselines: baselines in the order of their runs.
        memory: memory of specchat, without the baselines'.
        link_bytes_per_s: rate of the link without other work in bytes/s, or None if it was not measured.
        disk_passes: rounds of single passes, or None if they were not timed.
        page_cache_passes: rounds of passes from the page cache after cold passes, or None if they were not timed.
    """

    plan: Plan
    load_s: float
    measurement: Measurement
    baselines: tuple[Baseline, ...]
    memory: MemoryReport
    link_bytes_per_s: float | None
    disk_passes: PassRounds | None = None
    page_cache_passes: PassRounds | None = None


def outcome_object(outcome: Outcome, target: ModelSource) -> dict[str, Any]:
    """Return the part of the report for one plan: plan, runs, summary, baselines, speedup."""
    measurement = outcome.measurement
    ours = measurement.of(OWN)
    return {
        "plan": plan_object(outcome.plan),
        "runs": [_own_run(run, outcome, target) for run in ours],
        "summary": _summary(ours, outcome),
        "baselines": [_baseline(each, measurement) for each in outcome.baselines],
        "speedup": {each.name: _speedup(ours, measurement.of(each.name)) for each in outcome.baselines},
    }


def counts_object(measurement: Measurement) -> dict[str, int]:
    """Return the number of questions asked, and the numbers of turns and questions left out."""
    return {
        "asked": measurement.num_questions,
        "turns_too_long": measurement.too_long,
        "not_begun": measurement.not_begun,
    }


def settings_object(settings: BenchSettings, *, prompts: str, limit: int | None) -> dict[str, Any]:
    """Return the settings of the measurement."""
    return {
        "prompts": prompts,
        "limit": limit,
        "temperatures": list(settings.temperatures),
        "max_tokens": settings.max_tokens,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "time_box_s": settings.time_box_s,
        "limit_memory_bytes": settings.limit_memory_bytes,
    }


def report_object(head: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the whole report, beginning with its schema version."""
    return {"schema_version": SCHEMA_VERSION, **head, **rest}


def figures_object(runs: Iterable[Run]) -> dict[str, Any]:
    """Return the figures of some runs of one system."""
    figures = summary.figures(runs)
    return {
        "answers": figures.answers,
        "counted_answers": figures.counted,
        "tok_per_s": asdict(figures.tok_per_s),
        "decode_tok_per_s": asdict(figures.decode_tok_per_s),
        "ttft_s": asdict(figures.ttft_s),
        "prompt_tok_per_s": asdict(figures.prompt_tok_per_s),
        "tokens_per_step": asdict(figures.tokens_per_step),
        "distinct_4gram": asdict(figures.distinct_4gram),
        "pass_s": figures.pass_s,
        "draft_share": figures.draft_share,
        "pass_split": None if figures.split is None else asdict(figures.split),
        "accept_by_depth": list(figures.accept_by_depth),
        "accept_by_source": [_source_object(share) for share in figures.accept_by_source],
    }


def _source_object(share: summary.SourceShare) -> dict[str, Any]:
    """Return the acceptance of a source, with lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(share).items()}


def _summary(ours: Sequence[Run], outcome: Outcome) -> dict[str, Any]:
    achieved = summary.figures(ours).achieved_bytes_per_s
    link = outcome.link_bytes_per_s
    memory = outcome.memory
    prediction = summary.predict(ours, outcome.plan.streamed_bytes_per_step, link)
    return {
        "load_s": outcome.load_s,
        **figures_object(ours),
        "run_spread": summary.run_spread(ours),
        "stream": {
            "achieved_bytes_per_s": achieved,
            "link_bytes_per_s": link,
            "utilisation": achieved / link if achieved is not None and link is not None else None,
        },
        "device_peak_bytes": memory.device_peak_bytes,
        "host_peak_bytes": memory.host_peak_bytes,
        "runtime_bytes": memory.runtime_bytes,
        "predicted_device_bytes": memory.predicted_device_bytes,
        "predicted_host_bytes": _predicted_host_bytes(outcome),
        "predicted_pass_s": None if prediction is None else prediction.pass_s,
        "predicted_tok_per_s": None if prediction is None else prediction.tok_per_s,
        "prediction_basis": "none" if prediction is None else PREDICTION_BASIS,
        "by_temperature": _by_temperature(ours),
    }


def _predicted_host_bytes(outcome: Outcome) -> int:
    """Return the predicted peak memory of the process: libraries, host copies of layers, and on the CPU the ledger."""
    plan, memory = outcome.plan, outcome.memory
    ledger = memory.predicted_device_bytes if plan.work.device == "cpu" else 0
    return memory.runtime_bytes + plan.host_bytes + ledger


def _by_temperature(runs: Sequence[Run]) -> list[dict[str, Any]]:
    temperatures = sorted({run.temperature for run in runs})
    return [{"temperature": t, **figures_object(run for run in runs if run.temperature == t)} for t in temperatures]


def _baseline(baseline: Baseline, measurement: Measurement) -> dict[str, Any]:
    theirs = measurement.of(baseline.name)
    identity = baseline.identity
    every = summary.figures(theirs)
    differences = [asdict(difference) for difference in identity.differences]
    return {
        "name": baseline.name,
        "tok_per_s": asdict(every.tok_per_s),
        "ttft_s": asdict(every.ttft_s),
        "tokens_per_step": asdict(every.tokens_per_step),
        "identical_output": identity.identical,
        "compared_answers": identity.answers,
        "compared_tokens": identity.tokens,
        "differing_answers": len(differences),
        "near_ties": sum(difference.near_tie for difference in identity.differences),
        "first_difference": differences[0] if differences else None,
        "by_temperature": [_baseline_at(t, measurement, theirs) for t in sorted({run.temperature for run in theirs})],
        "runs": [_other_run(run) for run in theirs],
    }


def _baseline_at(temperature: float, measurement: Measurement, theirs: Sequence[Run]) -> dict[str, Any]:
    runs = [run for run in theirs if run.temperature == temperature]
    ours = [run for run in measurement.of(OWN) if run.temperature == temperature]
    figures = summary.figures(runs)
    return {
        "temperature": temperature,
        "answers": figures.answers,
        "counted_answers": figures.counted,
        "tok_per_s": asdict(figures.tok_per_s),
        "ttft_s": asdict(figures.ttft_s),
        "tokens_per_step": asdict(figures.tokens_per_step),
        "distinct_4gram": asdict(figures.distinct_4gram),
        "speedup": _speedup(ours, runs),
    }


def disk_passes_object(rounds: PassRounds | None, page_cache: PassRounds | None = None) -> dict[str, Any] | None:
    """Return rounds of single passes, with the later rounds from the page cache if they were timed."""
    if rounds is None:
        return None
    return _rounds(rounds) | {"page_cache": None if page_cache is None else _rounds(page_cache)}


def _rounds(rounds: PassRounds) -> dict[str, Any]:
    raw, ours = rounds.raw, rounds.systems[OWN]
    return {
        "rows": rounds.rows,
        "cold": rounds.cold,
        "rounds": len(raw.seconds),
        "resident_share": rounds.resident_share,
        "own_over_resident": rounds.own_over_resident,
        "raw": {
            "bytes": raw.streamed_bytes,
            "seconds": list(raw.seconds),
            "bytes_per_s": raw.bytes_per_s,
            "direct": rounds.raw_direct,
        },
        "systems": [
            {
                "name": name,
                "seconds": list(series.seconds),
                "pass_s": series.pass_s,
                "streamed_bytes": series.streamed_bytes,
                "achieved_bytes_per_s": series.bytes_per_s if series.streamed_bytes else None,
                "utilisation": series.bytes_per_s / raw.bytes_per_s if series.streamed_bytes else None,
                "relative_pass_s": series.pass_s / ours.pass_s,
            }
            for name, series in rounds.systems.items()
        ],
    }


def _speedup(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any] | None:
    """Return specchat's speedup in tokens per second and in passes per second."""
    found, per_pass = summary.speedup(ours, theirs), summary.pass_speedup(ours, theirs)
    return None if found is None or per_pass is None else {**asdict(found), "per_pass": asdict(per_pass)}


def _place(run: Run) -> dict[str, Any]:
    return {
        "question_id": run.question.question_id,
        "category": run.question.category,
        "turn": run.turn,
        "repeat": run.repeat,
        "temperature": run.temperature,
        "distinct_4gram": run.distinct_4gram,
        "counted": run.counted,
    }


def _own_run(run: Run, outcome: Outcome, target: ModelSource) -> dict[str, Any]:
    """Return a run as `run --json` prints it, with its place in the measurement."""
    turn = _turn(run, outcome)
    return _place(run) | run_object(turn, target=target, plan=outcome.plan, seed=run.sampling.seed)


def _other_run(run: Run) -> dict[str, Any]:
    answer = run.answer
    return _place(run) | {
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "steps": answer.num_passes,
        "ttft_s": answer.ttft_s,
        "decode_s": answer.decode_s,
        "tok_per_s": answer.tok_per_s,
    }


def _turn(run: Run, outcome: Outcome) -> Turn:
    answer = run.answer
    num_tokens, num_accepted = len(answer.token_ids), sum(step.accepted for step in answer.steps)
    return Turn(
        message=Message("assistant", run.text),
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        usage=Usage(len(run.prompt_ids), answer.cached_tokens, num_tokens),
        timings=Timings.of_steps(
            answer.steps, num_tokens, load_s=outcome.load_s, ttft_s=answer.ttft_s, decode_s=answer.decode_s
        ),
        speculation=Speculation.of_steps(answer.steps, num_tokens, num_accepted, outcome.plan.work.tree_budget),
        memory=outcome.memory,
    )
