"""`specchat bench --batch`: from checked options to a report."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from threading import Event
from typing import TYPE_CHECKING, Any

from specchat.cli.ask import asker
from specchat.cli.bench_options import BenchOptions
from specchat.cli.output import print_line
from specchat.errors import UsageError
from specchat.json_lines import to_json
from specchat.loading import planning
from specchat.loading.engine import load_planned, stop_ids
from specchat.loading.locate import locate_models, parse_models
from specchat.records.chat import Message
from specchat.records.generation import Sampling

if TYPE_CHECKING:
    from specchat.bench.batch import Asked, BatchRun
    from specchat.bench.records import BenchSettings
    from specchat.engine.engine import Engine
    from specchat.loading.planning import Planned
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.ui.console import Talk

_INTERRUPTED = 130
# Contexts are planned in steps, as for `run --prompts`.
_CTX_STEP = 64


def bench_batches(options: BenchOptions, settings: "BenchSettings", say: "Talk") -> int:
    """Run `specchat bench --batch` and return the exit code."""
    from specchat.bench.batch import ask, measure_batches
    from specchat.bench.prompts import BUILT_IN, read_questions
    from specchat.engine.measuring import without_draft
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.models.hf.tokenizer import load_tokenizer
    from specchat.ui.interrupts import Interrupts
    from specchat.ui.progress import TalkReporter

    assert options.batches is not None
    questions = (BUILT_IN if options.prompts is None else read_questions(options.prompts))[: options.limit]
    refs = parse_models(options.models)
    reporter = TalkReporter(say)
    models = locate_models(options.models, refs, reporter, asker(yes=options.yes))
    tokenizer = load_tokenizer(models.target.path)
    ends = stop_ids(load_generation_defaults(models.target.path), tokenizer)
    asked = ask(questions, lambda text: _encode(tokenizer, text), settings, ends)
    request = _request(options, asked)
    planned = planning.make_plan(request, models, reporter, as_given=True)
    _check_fits(asked, planned)
    cancel = Event()
    with closing(load_planned(models.target, models.draft, planned.plan, reporter, request.workers)) as engine:
        with Interrupts().setting(cancel):
            runs = measure_batches(
                engine,
                asked,
                options.batches,
                settings,
                without_draft=lambda: without_draft(engine),
                cancel=cancel,
                report=say.overwrite,
            )
        say.overwrite("")
        if not runs:
            say.warn("interrupted before anything was measured")
            return _INTERRUPTED
        _print(options, settings, planned, engine, runs)
    return _INTERRUPTED if cancel.is_set() else 0


def _request(options: BenchOptions, asked: "Sequence[Asked]") -> Any:
    """Return the request with a seat for each answer at once and, if the user named none, the context needed."""
    assert options.batches is not None
    choices = replace(options.models.choices, seats=max(options.batches))
    if choices.ctx is None:
        needed = max(len(each.request.prompt_ids) + (each.request.max_tokens or 0) for each in asked)
        choices = replace(choices, ctx=-(-needed // _CTX_STEP) * _CTX_STEP)
    return replace(options.models, choices=choices)


def _check_fits(asked: "Sequence[Asked]", planned: "Planned") -> None:
    ctx = planned.plan.work.ctx
    needed = max(len(each.request.prompt_ids) + (each.request.max_tokens or 0) for each in asked)
    if needed > ctx:
        raise UsageError(
            f"the longest question needs {needed} tokens with its answer, but the context holds {ctx}",
            hint="use a larger --ctx, a smaller --max-tokens, or other --prompts",
        )


def _encode(tokenizer: "Tokenizer", text: str) -> tuple[int, ...]:
    """Return the tokens of a question through the chat template, or of plain text if the model has none."""
    if tokenizer.has_chat_template:
        return tuple(tokenizer.encode(tokenizer.render([Message("user", text)])))
    return tuple(tokenizer.encode(text, add_special_tokens=True))


def _print(
    options: BenchOptions, settings: "BenchSettings", planned: "Planned", engine: "Engine", runs: "list[BatchRun]"
) -> None:
    import shlex
    import sys
    from datetime import UTC, datetime

    from specchat.bench import report
    from specchat.bench.batch import batches_object, batches_table
    from specchat.bench.export import markdown_table
    from specchat.bench.machine import machine_object, versions_object
    from specchat.engine.measuring import margin_after
    from specchat.ui.bench_view import ReportView

    plan = planned.plan

    @cache
    def margin(context: tuple[int, ...], sampling: Sampling) -> tuple[float, float]:
        found = margin_after(engine, context, sampling)
        return found.margin, found.scale

    batches = batches_object(runs, plan.work.dtype, margin)
    table = batches_table(batches, plan.work.seats)
    if options.output == "table":
        ReportView(sys.stdout).table(table)
    elif options.output == "md":
        print_line(markdown_table(table))
    else:
        head = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(("specchat", *options.command)),
            "model": planned.models.target.name,
            "draft": plan.draft,
            "seats": plan.work.seats,
            "ctx": plan.work.ctx,
            "tree_budget": plan.work.tree_budget,
            "resident_layers": len(plan.placement.resident),
            "streamed_layers": len(plan.placement.streamed),
            "machine": machine_object(plan.work.device),
            "versions": versions_object(),
            "settings": report.settings_object(settings, prompts="", limit=options.limit),
        }
        print_line(to_json(report.report_object(head, {"batches": batches})))
