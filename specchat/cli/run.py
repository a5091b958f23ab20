"""`specchat run`: from checked options to an answer, or to a chat."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from specchat.cli import models as shared
from specchat.cli.models import Models
from specchat.cli.options import RunOptions, random_seed, resolve_sampling
from specchat.cli.output import print_line, to_json
from specchat.config import Plan, Sampling
from specchat.errors import EmptyPromptError, UsageError

if TYPE_CHECKING:
    from specchat.chat.session import ChatSession, Delta, Turn
    from specchat.models.hf_compat import GenerationDefaults
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import Talk

_INTERRUPTED = 130


def run(options: RunOptions) -> int:
    """Does what `specchat run` was asked to; returns the exit code."""
    from specchat.ui.console import talk

    say = talk(quiet=options.models.quiet)
    refs = shared.parse_models(options.models)
    prompt = None if options.plan else _prompt(options, say)
    shared.prepare_libraries()
    if options.plan:
        with TemporaryDirectory(prefix="specchat-") as folder:
            models = shared.sketch_models(options.models, refs, say, Path(folder))
            _print_plan(options, models, shared.make_plan(options.models, models))
        return 0
    models = shared.locate_models(options.models, refs, say)
    return _chat(options, models, shared.make_plan(options.models, models), prompt, say)


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


# --- the plan ----------------------------------------------------------------------------------------------------


def _print_plan(options: RunOptions, models: Models, plan: Plan) -> None:
    from specchat.chat.result import plan_object
    from specchat.ui.chat_view import plan_table

    print_line(to_json(plan_object(plan)) if options.json else plan_table(models.target, plan, models.draft_note))


# --- the answer --------------------------------------------------------------------------------------------------


def _chat(options: RunOptions, models: Models, plan: Plan, prompt: str | None, say: "Talk") -> int:
    from specchat.chat.session import ChatSession, check_has_template
    from specchat.models.hf_compat import load_generation_defaults, load_tokenizer
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream

    defaults = load_generation_defaults(models.target.path)
    sampling = _sampling(options, defaults, plan, say)
    view = ChatView(answer_stream(), say, verbose=options.verbose)
    view.banner(models.target, plan, models.draft_note)
    tokenizer = load_tokenizer(models.target.path)
    check_has_template(tokenizer, base=options.base)
    with shared.load_engine(options.models, models, plan, say) as engine:
        session = ChatSession(
            engine,
            tokenizer,
            sampling=sampling,
            stop_ids=shared.stop_ids(defaults, tokenizer),
            stop_texts=options.stops,
            max_tokens=options.max_tokens,
            system=options.system,
            base=options.base,
        )
        return _converse(options, models, session, view, prompt)


def _sampling(options: RunOptions, defaults: "GenerationDefaults", plan: Plan, say: "Talk") -> Sampling:
    seed = random_seed() if options.models.seed is None else options.models.seed
    sampling, notices = resolve_sampling(options.sampling, defaults, seed)
    if options.models.tree_budget is not None and plan.draft is None:
        notices.append("--tree-budget has no effect: there is no draft")
    for notice in notices:
        say.warn(notice)
    return sampling


def _converse(options: RunOptions, models: Models, session: "ChatSession", view: "ChatView", prompt: str | None) -> int:
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


def _answer_as_json(options: RunOptions, models: Models, session: "ChatSession", view: "ChatView", prompt: str) -> int:
    from specchat.chat.result import done_object, run_object
    from specchat.ui.interrupts import Interrupts

    cancel = Event()
    show = _print_delta if options.json_stream else _ignore
    with Interrupts().setting(cancel):
        turn = view.show(session.ask(prompt, cancel), show)
    result = run_object(turn, target=models.target, plan=session.engine.plan, seed=session.sampling.seed)
    print_line(to_json(done_object(result) if options.json_stream else result))
    return _code(turn)


def _print_delta(delta: "Delta") -> None:
    from specchat.chat.result import delta_object

    if delta.text or delta.token_ids:
        print_line(to_json(delta_object(delta)))


def _ignore(delta: "Delta") -> None:
    """With --json, the text comes at the end."""


def _code(turn: "Turn") -> int:
    return _INTERRUPTED if turn.finish_reason == "interrupt" else 0
