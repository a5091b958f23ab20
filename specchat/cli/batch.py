"""`specchat run --prompts`: answer the prompts of a file, many at once."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from specchat.batch.job import Job, Progress, Renderer
from specchat.batch.prompts import PromptLine, read_prompts
from specchat.batch.results import JobSettings, Results, first_settings, line_digest
from specchat.cli.ask import asker
from specchat.cli.options import RunOptions
from specchat.cli.plan import print_plan
from specchat.loading.batch import make_batch_plan
from specchat.loading.engine import load_engine, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models, sketch_models
from specchat.loading.models import Models, Refs
from specchat.loading.planning import Planned
from specchat.loading.request import ModelRequest
from specchat.models.checkpoint.safetensors import has_weights
from specchat.paths import state_folder
from specchat.planner.learning import Learning
from specchat.planner.statistics import SharedPass
from specchat.records.model import DTYPE_BYTES, QUANTS
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.engine.engine import Engine
    from specchat.loading.request import Reporter
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.ui.console import Talk

_INTERRUPTED, _FAILED = 130, 1
# Contexts are planned in steps, so that jobs of about equal lengths have equal plans.
_CTX_STEP = 64
_WHY_CTX = "the longest prompt and its answer"


def run_prompts(options: RunOptions) -> int:
    """Run `specchat run --prompts` and return the exit code."""
    from specchat.ui.console import talk
    from specchat.ui.progress import TalkReporter

    assert options.prompts is not None
    say = talk(quiet=options.quiet)
    lines = read_prompts(options.prompts)
    refs = parse_models(options.models)
    prepare_libraries()
    reporter, ask = TalkReporter(say), asker(yes=options.yes)
    if options.plan:
        with TemporaryDirectory(prefix="specchat-") as folder:
            models = sketch_models(options.models, refs, reporter, ask, Path(folder))
            request = _request_for_plan(options, refs, models, lines, reporter)
            print_plan(_planned(options, request, models, reporter, len(lines)), as_json=options.json)
        return 0
    return _answer(options, locate_models(options.models, refs, reporter, ask), lines, reporter, say)


def _planned(
    options: RunOptions, request: ModelRequest, models: Models, reporter: "Reporter", num_prompts: int
) -> Planned:
    planned = make_batch_plan(
        request,
        models,
        reporter,
        seats=options.batch,
        num_prompts=num_prompts,
        temperature=options.sampling.temperature,
    )
    if request.choices.ctx == options.models.choices.ctx:
        return planned
    choices = tuple(
        replace(each, why=_WHY_CTX, pinned=False) if each.option == "ctx" else each for each in planned.chosen.choices
    )
    return replace(planned, chosen=replace(planned.chosen, choices=choices))


def _request_for_plan(
    options: RunOptions, refs: Refs, models: Models, lines: Sequence[PromptLine], reporter: "Reporter"
) -> ModelRequest:
    """Return the request as a job would make it; the files of the tokenizer are downloaded if they are missing.

    Raises:
        UsageError: the target has no chat template, and --base was not given.
        ModelError: the tokenizer cannot be downloaded.
    """
    from specchat.chat.prompt import check_has_template
    from specchat.models.hf.tokenizer import load_tokenizer
    from specchat.models.locate import tokenizer_folder

    folder = models.target.path
    if not has_weights(folder) and not any(folder.glob("tokenizer*")):  # there is only a configuration
        if options.models.choices.ctx is not None:
            return options.models
        if refs.target.kind != "hub":
            reporter.warn(f"{folder} has no tokenizer, so the context that the prompts need is not known")
            return options.models
        folder = tokenizer_folder(refs.target, offline=options.models.offline)
    tokenizer = load_tokenizer(folder)
    check_has_template(tokenizer, base=options.base)
    return _with_context(options, models, lines, tokenizer)


def _answer(options: RunOptions, models: Models, lines: Sequence[PromptLine], reporter: "Reporter", say: "Talk") -> int:
    from specchat.chat.prompt import check_has_template
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.models.hf.tokenizer import load_tokenizer
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream

    assert options.results is not None
    tokenizer = load_tokenizer(models.target.path)
    check_has_template(tokenizer, base=options.base)
    request = _with_context(options, models, lines, tokenizer)
    planned = _planned(options, request, models, reporter, len(lines))
    as_begun = _as_begun(options, request, planned)
    if as_begun is not None:
        request = as_begun
        planned = _planned(options, request, models, reporter, len(lines))
    view = ChatView(answer_stream(), say, verbose=options.verbose, raw=True)
    view.banner(planned.models.target, planned.chosen, planned.models.draft_note)
    settings = _settings(options, planned)
    with Results(options.results, settings.digest, {line.number: line_digest(line) for line in lines}) as results:
        if len(results.finished) == len(lines):
            say.say(f"all {len(lines):,} prompts are done in {options.results}")
            return _code(results)
        if results.finished:
            say.say(f"going on with {options.results}: {len(results.finished):,} of {len(lines):,} are done", "dim")
        request = replace(request, choices=replace(request.choices, seats=planned.plan.work.seats))
        defaults = load_generation_defaults(planned.models.target.path)
        engine = load_engine(request, planned.models, planned.plan, reporter, options.sampling.temperature)
        with closing(engine), Learning(state_folder(), engine.plan) as learning:
            observe = partial(_learn, engine, engine.plan, learning) if options.saves else _learn_nothing
            job = Job(engine, tokenizer, defaults, stop_ids(defaults, tokenizer), settings, lines, results, observe)
            interrupted = _run(job, say)
        return _INTERRUPTED if interrupted else _code(results, say)


def _learn(engine: "Engine", plan: Plan, learning: Learning, shared: SharedPass) -> None:
    """Learn from a pass, unless layers were given back: the times are not those of the plan any more."""
    if engine.plan is plan:
        learning.add(shared)


def _learn_nothing(_shared: SharedPass) -> None:
    """Save nothing, for a job with --no-save."""


def _run(job: Job, say: "Talk") -> bool:
    """Run the job with its progress on stderr, and return whether Ctrl-C ended it."""
    from specchat.ui.batch_view import BatchView, summary_text
    from specchat.ui.interrupts import Interrupts

    cancel, view, last = Event(), BatchView(say), None
    with Interrupts().setting(cancel):
        for progress in job.run(cancel):
            view.show(progress)
            last = progress
    view.clear()
    assert isinstance(last, Progress), "a job yields its progress at least once"
    say.say(summary_text(last))
    return cancel.is_set()


def _code(results: Results, say: "Talk | None" = None) -> int:
    """Return the exit code of a finished job, and tell how many prompts failed."""
    from specchat.ui.console import talk

    if not results.num_failed:
        return 0
    what = "1 prompt" if results.num_failed == 1 else f"{results.num_failed:,} prompts"
    (say or talk()).error(f"{what} could not be answered", 'the reasons are in the lines with an "error"')
    return _FAILED


def _as_begun(options: RunOptions, request: ModelRequest, planned: Planned) -> ModelRequest | None:
    """Return the request with the precision that the job began with; None if it is the planned one, or unknown.

    The planner may choose another one now: less memory is free, or statistics have changed.
    """
    assert options.results is not None
    settings, began, choices = _settings(options, planned), first_settings(options.results), request.choices
    if began is None or began == settings.digest:
        return None
    quants = QUANTS if choices.quant == "auto" else (choices.quant,)
    dtypes = tuple(DTYPE_BYTES) if choices.dtype == "auto" else (choices.dtype,)
    for quant, dtype in product(quants, dtypes):
        name = quant if settings.quant in QUANTS else settings.quant  # of a pre-quantized model
        if replace(settings, quant=name, dtype=dtype).digest == began:
            return replace(request, choices=replace(choices, quant=quant, dtype=dtype))
    return None


def _settings(options: RunOptions, planned: Planned) -> JobSettings:
    target, plan = planned.models.target, planned.plan
    return JobSettings(
        model=target.name,
        revision=target.revision,
        quant=plan.quant,
        dtype=plan.work.dtype,
        sampling=options.sampling,
        seed=options.seed or 0,
        max_tokens=options.max_tokens,
        stops=options.stops,
        system=None if options.base else options.system,
        thinking=options.think,
        base=options.base,
    )


def _with_context(
    options: RunOptions, models: Models, lines: Sequence[PromptLine], tokenizer: "Tokenizer"
) -> ModelRequest:
    """Return the request with the context that the longest prompt and its answer need, if the user named none."""
    from specchat.models.hf.config import load_config, max_positions

    request = options.models
    if request.choices.ctx is not None:
        return request
    settings = JobSettings("", None, "", "", max_tokens=options.max_tokens, system=options.system, base=options.base)
    needed = Renderer(tokenizer, replace(settings, thinking=options.think)).context_for(lines)
    if needed is None:
        return request
    ctx = min(-(-needed // _CTX_STEP) * _CTX_STEP, max_positions(load_config(models.target.path)))
    return replace(request, choices=replace(request.choices, ctx=ctx))
