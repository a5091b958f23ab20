"""`specchat bench`: from checked options to a report."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from specchat.bench.records import LAYERS, OFFLOADED
from specchat.chat.settings import whole
from specchat.cli import options as parse
from specchat.cli.ask import asker
from specchat.cli.bench_options import LLAMA_BASELINES, BenchOptions, trees
from specchat.cli.output import print_line
from specchat.errors import BudgetError, UsageError
from specchat.json_lines import to_json
from specchat.loading import planning
from specchat.loading.engine import make_packs, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.models import Models
from specchat.loading.request import ModelRequest, Reporter
from specchat.paths import state_folder
from specchat.records.model import ModelSource, own_quant
from specchat.records.plan import Plan
from specchat.units import format_bytes

if TYPE_CHECKING:
    from specchat.bench.cold import PassFiles
    from specchat.bench.generation import CountedOutcome
    from specchat.bench.measure import Job
    from specchat.bench.prompts import Question
    from specchat.bench.records import BenchSettings
    from specchat.bench.report import Outcome
    from specchat.bench.setup import WholeLayers
    from specchat.models.packs.pack import Pack
    from specchat.ui.bench_view import ReportView
    from specchat.ui.console import Talk

_INTERRUPTED = 130
_DEFAULT_REPEATS = 3
_DEFAULT_MAX_TOKENS = 64
_DEFAULT_SEED = 0
_TIME_BOX_S = 110.0


def bench(options: BenchOptions) -> int:
    """Run `specchat bench` and return the exit code."""
    prepare_libraries()  # before anything imports torch
    if options.batches is not None:
        from specchat.cli.bench_batch import bench_batches
        from specchat.ui.console import talk

        return bench_batches(options, _settings(options, 1), talk(quiet=options.quiet))
    if options.compare is not None:
        return _compare(options, *options.compare)
    if options.limit_memory is None:
        return _measure(options)
    from specchat.cli.bench_limit import limited

    with limited(options.limit_memory, options.models.choices, lambda: _least_bytes(options)):
        return _measure(options)


def _least_bytes(options: BenchOptions) -> int:
    """Return the device memory of the smallest plan."""
    from specchat.ui.console import talk
    from specchat.ui.progress import TalkReporter

    say = talk(quiet=True)
    point = _points(options, say)[0]
    try:
        planning.make_plan(_choosing(point.request, vram_bytes=1), point.models, TalkReporter(say), as_given=True)
    except BudgetError as error:
        return error.needed_bytes
    return 0


# --- comparing ---------------------------------------------------------------------------------------------------


def _compare(options: BenchOptions, a: Path, b: Path) -> int:
    from specchat.bench.compare import comparison_object, comparison_table, read_report
    from specchat.bench.export import markdown_table

    comparison = comparison_object(read_report(a), read_report(b))
    if options.output == "table":
        _view().table(comparison_table(comparison))
    else:
        is_markdown = options.output == "md"
        print_line(markdown_table(comparison_table(comparison)) if is_markdown else to_json(comparison))
    return 0


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One plan to measure: the only one, or that of one value of a sweep.

    Attributes:
        value: value of the sweep as typed; empty without a sweep.
        request: request that the plan is made from.
        models: located target and draft.
        trees: tree budget and rows of the head that replace those of the plan, or None to keep them.
    """

    value: str
    request: ModelRequest
    models: Models
    trees: tuple[int, int | None] | None = None


def _measure(options: BenchOptions) -> int:
    from specchat.bench.measure import measure
    from specchat.bench.plot import check_plot, plot_sweep
    from specchat.engine.device import release_memory
    from specchat.ui.bench_view import BenchLine
    from specchat.ui.console import talk
    from specchat.ui.interrupts import Interrupts

    say = talk(quiet=options.quiet)
    if options.plot is not None:
        check_plot(options.plot)
    questions = _questions(options)
    points = _points(options, say)
    cancel = Event()
    outcomes: list[tuple[_Point, Job, CountedOutcome]] = []
    with BenchLine(say) as progress, Interrupts().setting(cancel):
        jobs = [_job(options, point, questions, len(points), say) for point in points]
        for point, job in zip(points, jobs, strict=True):
            if not cancel.is_set():
                if outcomes:
                    release_memory()  # of the last point; a GPU has no room for two
                progress.part = f"{options.sweep[0]}={point.value}" if options.sweep else ""
                outcomes.append((point, job, measure(job, cancel, progress.update)))
                _keep_statistics(outcomes[-1][2])
    if not outcomes:
        say.warn("interrupted before anything was measured")
        return _INTERRUPTED
    report = _report(
        options, outcomes, [f"{options.sweep[0]}={point.value}" for point in points[len(outcomes) :] if options.sweep]
    )
    _print_report(options, report)
    if options.plot is not None:
        plot_sweep(report, options.plot)
        say.say(f"wrote {options.plot}")
    return _INTERRUPTED if cancel.is_set() else 0


def _keep_statistics(outcome: "Outcome") -> None:
    """Save tokens per step and times, for the next plan of these models."""
    from specchat.bench.records import OWN
    from specchat.planner.statistics import record

    for run in outcome.measurement.runs:
        if run.system == OWN:
            record(state_folder(), outcome.plan, run.sampling.temperature, run.answer.steps)


def _questions(options: BenchOptions) -> "tuple[Question, ...]":
    from specchat.bench.prompts import BUILT_IN, read_questions

    questions = BUILT_IN if options.prompts is None else read_questions(options.prompts)
    return questions[: options.limit]


def _points(options: BenchOptions, say: "Talk") -> list[_Point]:
    """Return the points to measure, with their models located."""
    if options.sweep is None:
        # Without RAM in the plan, no layer is planned to stay in the page cache, so all streamed layers come from disk.
        chosen = _choosing(options.models, ram_bytes=0) if _avoids_page_cache(options) else options.models
        return [_located("", chosen, options, say)]
    name, values = options.sweep
    if name == "memory":
        largest = _choosing(options.models, tree_budget=trees(values[0])[0])
        checked = [(value, trees(value)) for value in values]
        return [replace(_located(value, largest, options, say), trees=each) for value, each in checked]
    return [_located(value, _with(options.models, name, value), options, say) for value in values]


def _avoids_page_cache(options: BenchOptions) -> bool:
    """Return whether specchat keeps no layers in the page cache.

    llama.cpp maps the same file. Pages that specchat keeps in its control group would extend llama.cpp's limit.
    """
    beside_llama = any(name in LLAMA_BASELINES for name in options.baselines or ())
    is_shared = options.limit_memory is not None and beside_llama and options.models.choices.ram_bytes is None
    return options.cold or is_shared


def _located(value: str, request: ModelRequest, options: BenchOptions, say: "Talk") -> _Point:
    from specchat.ui.progress import TalkReporter

    refs = parse_models(request)
    return _Point(value, request, locate_models(request, refs, TalkReporter(say), asker(yes=options.yes)))


def _choosing(request: ModelRequest, **choices: Any) -> ModelRequest:
    """Return the request with some of its choices replaced."""
    return replace(request, choices=replace(request.choices, **choices))


def _with(request: ModelRequest, name: str, value: str) -> ModelRequest:
    """Return the request with one choice replaced by a sweep's value."""
    match name:
        case "tree-budget":
            return _choosing(request, tree_budget=parse.tree_budget("--tree-budget", value))
        case "vram":
            return _choosing(request, vram_bytes=parse.size("--vram", value))
        case "ctx":
            return _choosing(request, ctx=whole("--ctx", value, 1))
        case "slots":
            return _choosing(request, slots=whole("--sweep slots", value, 1))
        case "quant":
            return _choosing(request, quant=parse.quant("--sweep quant", value))
    return replace(request, draft=value)


def _job(
    options: BenchOptions, point: _Point, questions: "tuple[Question, ...]", num_points: int, say: "Talk"
) -> "Job":
    from specchat.bench.measure import Job
    from specchat.bench.setup import check_baselines, left_out
    from specchat.cli.bench_limit import check_limit
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.models.hf.tokenizer import load_tokenizer
    from specchat.ui.progress import TalkReporter

    reporter = TalkReporter(say)
    planned = planning.make_plan(point.request, point.models, reporter, as_given=True)
    target, draft = planned.models.target, planned.models.draft
    default = () if options.sweep else ("plain",)
    baselines = default if options.baselines is None else options.baselines
    check_baselines(baselines, target, draft)
    planned = _shared(planned, point.request, baselines, reporter)
    plan = planned.plan if point.trees is None else _with_trees(planned, *point.trees)
    if options.cold or OFFLOADED & set(baselines):
        plan = replace(plan, stages=())  # the baselines keep their layers where the plan's placement says
    without = left_out(baselines, plan)
    for name, why in without.items():
        say.warn(f"the baseline '{name}' is left out: {why}")
    _check_cold(options, plan)
    names = tuple(name for name in baselines if name not in without)
    whole = _whole_layers(point, plan, reporter) if LAYERS in names else None
    check_limit(options.limit_memory, [plan] if whole is None else [plan, whole.plan])
    packs = make_packs(target, draft, plan, reporter)
    tokenizer = load_tokenizer(target.path)
    defaults = load_generation_defaults(target.path)
    for line in defaults.ignored:
        say.warn(line)
    return Job(
        plan=plan,
        target=target,
        draft=draft,
        tokenizer=tokenizer,
        stop_ids=stop_ids(defaults, tokenizer),
        questions=questions,
        settings=_settings(options, num_points),
        baselines=names,
        cold=options.cold,
        passes=options.passes or options.cold,
        packs=packs,
        files=_files(target, plan, packs[0]),
        warn=say.warn,
        counts_memory=options.sweep is not None,
        layers=whole,
        workers=point.request.workers,
    )


def _whole_layers(point: _Point, plan: Plan, reporter: Reporter) -> "WholeLayers":
    """Return the best plan over whole layers with the precision of the measured plan, and its packs."""
    from specchat.bench.setup import WholeLayers

    same = _choosing(point.request, quant=own_quant(plan.quant), vram_bytes=plan.vram_bytes)
    plans = [
        planning.make_plan(_choosing(same, slots=slots), point.models, reporter, as_given=True) for slots in (2, 3)
    ]
    best = max(plans, key=lambda planned: planned.chosen.prediction.tok_per_s)
    whole, draft = replace(best.plan, stages=()), best.models.draft
    return WholeLayers(whole, draft, make_packs(best.models.target, draft, whole, reporter))


def _shared(
    planned: planning.Planned, request: ModelRequest, baselines: Sequence[str], reporter: Reporter
) -> planning.Planned:
    """Return the plan to measure. On a GPU, offloading baselines hold their layers beside specchat's.

    So unless the user set a budget, each system gets an equal share of the device memory.

    Args:
        planned: plan that has the device for itself.
        request: request that the plan was made from.
        baselines: systems to compare with.
        reporter: receives a warning about the share.
    """
    plan, num_others = planned.plan, len(OFFLOADED & set(baselines))
    if plan.work.device == "cpu" or request.choices.vram_bytes is not None or not num_others:
        return planned
    share = plan.vram_bytes // (1 + num_others)
    reporter.warn(f"the baselines hold layers on {plan.work.device}, too: each system gets {format_bytes(share)}")
    return planning.make_plan(_choosing(request, vram_bytes=share), planned.models, reporter, as_given=True)


def _with_trees(planned: planning.Planned, tree_budget: int, head_rows: int | None) -> Plan:
    """Return the plan with other tree sizes, which a sweep over generation memory sets.

    Args:
        planned: plan to change.
        tree_budget: nodes of every tree.
        head_rows: nodes scored per block; None for the usual number.

    Raises:
        UsageError: there is no draft.
    """
    from specchat.models.sizes.describe import describe
    from specchat.planner.memory import with_trees

    plan, models = planned.plan, planned.models
    if models.draft is None:
        raise UsageError("--sweep memory compares tree sizes, and there is no draft", hint="name one with --draft")
    target = describe(models.target, own_quant(plan.quant))
    draft = describe(models.draft, own_quant(plan.draft_quant))
    return with_trees(plan, target, draft, tree_budget, plan.work.head_rows if head_rows is None else head_rows)


def _files(target: ModelSource, plan: Plan, pack: "Pack | None") -> "PassFiles":
    """Return the files that specchat's passes read, and those that the baselines' passes read."""
    from specchat.bench.cold import PassFiles
    from specchat.models.checkpoint.safetensors import weight_files

    theirs = weight_files(target.path)
    own = theirs if pack is None else [pack.layers[index].path for index in plan.placement.streamed]
    return PassFiles(own, sorted({*own, *theirs}))


def _settings(options: BenchOptions, num_points: int) -> "BenchSettings":
    from specchat.bench.records import BenchSettings

    return BenchSettings(
        max_tokens=options.max_tokens or _DEFAULT_MAX_TOKENS,
        repeats=options.repeats or _DEFAULT_REPEATS,
        seed=_DEFAULT_SEED if options.seed is None else options.seed,
        time_box_s=_TIME_BOX_S / num_points if options.limit is None else None,
        limit_memory_bytes=options.limit_memory,
    )


def _check_cold(options: BenchOptions, plan: Plan) -> None:
    if options.cold and plan.work.device != "cpu":
        raise UsageError(
            f"--cold measures streaming from disk, but {plan.work.device} streams from RAM", "use --device cpu"
        )
    if options.cold and plan.placement.experts is not None:
        raise UsageError("--cold measures whole layers from disk, but single experts are read", "leave out --cold")
    if options.cold and not plan.placement.streamed:
        raise UsageError("--cold measures streaming from disk, but every layer stays in memory", "use a smaller --vram")


# --- the report --------------------------------------------------------------------------------------------------


def _report(
    options: BenchOptions, measured: "Sequence[tuple[_Point, Job, CountedOutcome]]", not_begun: Sequence[str]
) -> dict[str, Any]:
    """Return the report. In a sweep, its plan and answers are those of the fastest point."""
    from specchat.bench import report
    from specchat.bench.generation import generation_object

    objects = [report.outcome_object(outcome, job.target) for _, job, outcome in measured]
    speeds = [each["summary"]["tok_per_s"]["mean"] or 0.0 for each in objects]
    best = speeds.index(max(speeds))
    point, job, outcome = measured[best]
    sweep = None
    if options.sweep is not None:
        first = measured[0][2]
        points = [
            {"value": each.value, **made, "generation": generation_object(outcome, first)}
            for (each, _, outcome), made in zip(measured, objects, strict=True)
        ]
        sweep = {"option": options.sweep[0], "best": point.value, "points": points}
    measurements = [each.measurement for _, _, each in measured]
    missing = dict.fromkeys(what for each in measurements for what in each.missing)
    interruption = {
        "partial": bool(not_begun) or any(each.partial for each in measurements),
        "missing": [*missing, *not_begun],
    }
    return report.report_object(
        _head(options, job, outcome) | interruption,
        {
            **objects[best],
            "disk_passes": report.disk_passes_object(outcome.disk_passes, outcome.page_cache_passes),
            "sweep": sweep,
        },
    )


def _head(options: BenchOptions, job: "Job", outcome: "Outcome") -> dict[str, Any]:
    from specchat.bench import report
    from specchat.bench.machine import machine_object, versions_object

    prompts = "built-in" if options.prompts is None else options.prompts.name
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(("specchat", *options.command)),
        "model": job.target.name,
        "revision": job.target.revision,
        "label": job.target.label,
        "machine": machine_object(outcome.plan.work.device),
        "versions": versions_object(),
        "settings": report.settings_object(job.settings, prompts=prompts, limit=options.limit),
        "questions": report.counts_object(outcome.measurement),
    }


def _print_report(options: BenchOptions, report: dict[str, Any]) -> None:
    from specchat.bench import export

    match options.output:
        case "table":
            _view().report(report)
        case "md":
            print_line(export.markdown(report))
        case "json":
            print_line(to_json(report))
        case "jsonl":
            print_line(export.json_lines(report))
        case "csv":
            print_line(export.comma_separated(report))


def _view() -> "ReportView":
    from specchat.ui.bench_view import ReportView

    return ReportView(sys.stdout)
