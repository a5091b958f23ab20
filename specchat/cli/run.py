"""`specchat run`: from checked options to an answer, or to a chat."""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn

from specchat.cli.options import RunOptions, random_seed, resolve_sampling
from specchat.config import ModelSource, Plan, Sampling
from specchat.errors import EmptyPromptError, NotAvailableError, UsageError

if TYPE_CHECKING:
    from specchat.chat.session import ChatSession, Delta, Turn
    from specchat.models.catalog import ModelRef
    from specchat.models.hf_compat import GenerationDefaults, Tokenizer
    from specchat.models.hub import Download
    from specchat.models.pack import Pack
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import Talk

_INTERRUPTED = 130


@dataclass(frozen=True)
class _Refs:
    """The models of a run, as understood from the arguments; `draft` is None for plain decoding and for auto."""

    target: "ModelRef"
    draft: "ModelRef | None"


@dataclass(frozen=True)
class _Models:
    """The models of a run.

    Attributes:
        draft_note: what to say in the place of a draft when there is none.
    """

    target: ModelSource
    draft: ModelSource | None
    draft_note: str


def run(options: RunOptions) -> int:
    """Does what `specchat run` was asked to; returns the exit code."""
    from specchat.ui.console import talk

    say = talk(quiet=options.quiet)
    refs = _parse_models(options)
    prompt = None if options.plan else _prompt(options, say)
    _prepare_libraries()
    models = _locate_models(options, refs, say)
    plan = _make_plan(options, models)
    if options.plan:
        _print_plan(options, models, plan)
        return 0
    return _chat(options, models, plan, prompt, say)


# --- the prompt --------------------------------------------------------------------------------------------------


def _prompt(options: RunOptions, say: "Talk") -> str | None:
    """What to answer, from the arguments and from stdin; None for an interactive chat.

    Raises:
        EmptyPromptError: there is neither a prompt nor anything on stdin.
        UsageError: stdin is not text, or JSON was asked of an interactive chat.
    """
    can_type = sys.stdin is not None and sys.stdin.isatty()
    if options.prompt is None and can_type and sys.stdout.isatty():
        if options.json or options.json_stream:
            raise UsageError("--json and --json-stream need a PROMPT, or one on stdin")
        return None
    if options.prompt is None and can_type:
        say.say("reading the prompt from the terminal; Ctrl-D on a line of its own ends it")
    piped = "" if options.prompt is not None and can_type else _read_stdin()
    prompt = _joined(piped, options.prompt)
    if not prompt.strip():
        raise EmptyPromptError("the prompt is empty", hint='specchat run MODEL "a question", or pipe one in')
    return prompt


def _joined(piped: str, prompt: str | None) -> str:
    """What came on stdin, a blank line, and the question about it."""
    if not prompt:
        return piped
    text = piped.rstrip("\n")
    return f"{text}\n\n{prompt}" if text else prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError("what came on stdin is not UTF-8 text") from error


# --- the models --------------------------------------------------------------------------------------------------


def _refuse_without_model() -> NoReturn:
    from specchat.models.hub import cached_models

    cached = cached_models()
    shown = ", ".join(["demo (embedded, a toy)", *cached[:8]]) + (f" and {len(cached) - 8} more" * (len(cached) > 8))
    raise UsageError(f"which MODEL? here without a download: {shown}", hint="specchat run demo")


def _parse_models(options: RunOptions) -> _Refs:
    from specchat.models.catalog import parse_model

    if options.model is None:
        _refuse_without_model()
    if options.draft in ("self", "retrieval"):
        raise NotAvailableError(
            f"--draft {options.draft} is not in this version", hint="use --draft MODEL, auto or none"
        )
    draft = None if options.draft in ("auto", "none") else parse_model(options.draft)
    return _Refs(parse_model(options.model), draft)


def _locate_models(options: RunOptions, refs: _Refs, say: "Talk") -> _Models:
    from specchat.models.catalog import known_draft

    target = _locate(refs.target, options, say)
    if refs.draft is not None:
        return _Models(target, _locate(refs.draft, options, say), "")
    if options.draft == "none":
        return _Models(target, None, "no draft")
    return _Models(target, known_draft(refs.target), "plain decoding: no draft known for this model")


def _locate(ref: "ModelRef", options: RunOptions, say: "Talk") -> ModelSource:
    from specchat.models.hub import locate
    from specchat.ui.progress import ProgressLine

    what = "writing" if ref.kind == "shape" else "downloading"
    with ProgressLine(say, f"{what} {ref.text}") as line:
        return locate(
            ref,
            offline=options.offline,
            confirm=lambda download: options.yes or _agreed(download),
            progress=line.update,
            warn=say.warn,
        )


def _agreed(download: "Download") -> bool:
    """Asks before a download; where nobody can be asked, the answer is no."""
    from specchat.units import format_bytes

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    question = (
        f"download {download.name}: {format_bytes(download.missing_bytes)} to {download.folder} "
        f"({format_bytes(download.free_disk_bytes)} free)? [y/N] "
    )
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _prepare_libraries() -> None:
    """Settings that libraries read when they are first imported.

    Their warnings and progress bars mean nothing to a user; SPECCHAT_DEBUG=1 lets them through.
    """
    # OpenMP's threads spin while they wait for each other. With another busy program beside them, one that is not
    # running is waited for all its time slice long: tens of times slower, many times in each layer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("SPECCHAT_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ[variable] = "error"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


# --- the plan ----------------------------------------------------------------------------------------------------


def _make_plan(options: RunOptions, models: _Models) -> Plan:
    from specchat.planner.search import PlanRequest, make_plan

    return make_plan(
        PlanRequest(
            target=models.target,
            draft=models.draft,
            device=options.device,
            dtype=options.dtype,
            vram_bytes=options.vram_bytes,
            ctx=options.ctx,
            tree_budget=options.tree_budget,
            ram_bytes=options.ram_bytes,
        )
    )


def _print_plan(options: RunOptions, models: _Models, plan: Plan) -> None:
    from specchat.chat.result import plan_object
    from specchat.ui.chat_view import plan_table

    _print(_json(plan_object(plan)) if options.json else plan_table(models.target, plan, models.draft_note))


def _pack(target: ModelSource, plan: Plan, say: "Talk") -> "Pack | None":
    """The weights as they will be streamed, if they have to be repacked for that."""
    from specchat.models.prepare import prepare
    from specchat.ui.progress import ProgressLine

    if not plan.streamed:
        return None
    with ProgressLine(say, f"repacking {target.name}") as line:
        return prepare(
            target,
            plan.dtype,
            progress=lambda report: line.update(report.bytes_done, report.bytes_total),
            warn=say.warn,
        )


# --- the answer --------------------------------------------------------------------------------------------------


def _chat(options: RunOptions, models: _Models, plan: Plan, prompt: str | None, say: "Talk") -> int:
    from specchat.chat.session import ChatSession, check_has_template
    from specchat.engine.engine import Engine
    from specchat.models.hf_compat import load_generation_defaults, load_tokenizer
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream

    defaults = load_generation_defaults(models.target.path)
    sampling = _sampling(options, defaults, plan, say)
    view = ChatView(answer_stream(), say, verbose=options.verbose)
    view.banner(models.target, plan, models.draft_note)
    tokenizer = load_tokenizer(models.target.path)
    check_has_template(tokenizer, base=options.base)
    with Engine.load(plan, models.target, models.draft, _pack(models.target, plan, say)) as engine:
        session = ChatSession(
            engine,
            tokenizer,
            sampling=sampling,
            stop_ids=_stop_ids(defaults, tokenizer),
            stop_texts=options.stops,
            max_tokens=options.max_tokens,
            system=options.system,
            base=options.base,
        )
        return _converse(options, models, session, view, prompt)


def _sampling(options: RunOptions, defaults: "GenerationDefaults", plan: Plan, say: "Talk") -> Sampling:
    seed = random_seed() if options.seed is None else options.seed
    sampling, notices = resolve_sampling(options.sampling, defaults, seed)
    if options.tree_budget is not None and plan.draft is None:
        notices.append("--tree-budget has no effect: there is no draft")
    for notice in notices:
        say.warn(notice)
    return sampling


def _stop_ids(defaults: "GenerationDefaults", tokenizer: "Tokenizer") -> frozenset[int]:
    """Chat models often end their turns with the tokenizer's end token where their config only has the base model's."""
    eos = tokenizer.eos_token_id
    return defaults.stop_ids if eos is None else defaults.stop_ids | {eos}


def _converse(
    options: RunOptions, models: _Models, session: "ChatSession", view: "ChatView", prompt: str | None
) -> int:
    if prompt is None:
        return _interactive(session, view)
    if options.json or options.json_stream:
        return _answer_as_json(options, models, session, view, prompt)
    return _answer_as_text(session, view, prompt)


def _interactive(session: "ChatSession", view: "ChatView") -> int:
    from specchat.ui.console import wants_styles
    from specchat.ui.prompt import PromptLine
    from specchat.ui.repl import Repl

    Repl(session, view, PromptLine(styled=wants_styles(sys.stdout))).run()
    return 0


def _answer_as_text(session: "ChatSession", view: "ChatView", prompt: str) -> int:
    from specchat.ui.interrupts import Interrupts

    cancel = Event()
    with Interrupts().setting(cancel):
        turn = view.show(session.ask(prompt, cancel), view.write)
    view.end(turn, session.engine.plan)
    return _code(turn)


def _answer_as_json(options: RunOptions, models: _Models, session: "ChatSession", view: "ChatView", prompt: str) -> int:
    from specchat.chat.result import done_object, run_object
    from specchat.ui.interrupts import Interrupts

    cancel = Event()
    show = _print_delta if options.json_stream else _ignore
    with Interrupts().setting(cancel):
        turn = view.show(session.ask(prompt, cancel), show)
    result = run_object(turn, target=models.target, plan=session.engine.plan, seed=session.sampling.seed)
    _print(_json(done_object(result) if options.json_stream else result))
    return _code(turn)


def _print_delta(delta: "Delta") -> None:
    from specchat.chat.result import delta_object

    if delta.text or delta.token_ids:
        _print(_json(delta_object(delta)))


def _ignore(delta: "Delta") -> None:
    """With --json, the text comes at the end."""


def _code(turn: "Turn") -> int:
    return _INTERRUPTED if turn.finish_reason == "interrupt" else 0


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _print(line: str) -> None:
    sys.stdout.buffer.write(f"{line}\n".encode())
    sys.stdout.buffer.flush()
