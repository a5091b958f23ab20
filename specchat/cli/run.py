"""`specchat run`: one answer or a chat, from checked options."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

from specchat.chat.settings import random_seed
from specchat.cli.ask import asker
from specchat.cli.loading import load_watched
from specchat.cli.offer import with_offered_model
from specchat.cli.options import RunOptions, sampling_sources, without_effect
from specchat.cli.output import print_line
from specchat.cli.plan import print_plan
from specchat.cli.sessions import lasting, model_of, new_chat_note, path_for, resume_command, was_with
from specchat.cli.stdin import read_stdin
from specchat.cli.switching import switched
from specchat.errors import EmptyPromptError, ModelError, SpecchatError, UsageError
from specchat.json_lines import to_json
from specchat.loading import planning
from specchat.loading.engine import load_engine, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models, sketch_models
from specchat.loading.models import Models
from specchat.loading.sampling import resolve_sampling
from specchat.models.catalog.ref import DEMO, DEMO_PROMPTS
from specchat.models.locate import look_up_folder
from specchat.paths import state_folder
from specchat.records.chat import Setting
from specchat.records.generation import Sampling, Step
from specchat.records.plan import Plan
from specchat.units import format_bytes
from specchat.version import __version__

if TYPE_CHECKING:
    from specchat.chat.answer import Delta, Turn
    from specchat.chat.session import ChatSession
    from specchat.chat.transcript import Saved, Transcript
    from specchat.engine.engine import Engine
    from specchat.loading.planning import Planned
    from specchat.loading.request import Reporter
    from specchat.models.checkpoint.generation_config import GenerationDefaults
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import Talk

_FAILED, _INTERRUPTED = 1, 130


def run(options: RunOptions) -> int:
    """Run `specchat run` and return the exit code."""
    if options.prompts is not None:
        from specchat.cli.batch import run_prompts

        return run_prompts(options)
    from specchat.chat.templates import check_can_chat
    from specchat.loading.known import plan_known
    from specchat.ui.console import talk
    from specchat.ui.progress import TalkReporter

    say = talk(quiet=options.quiet)
    if options.models.model is None and not options.plan:
        options = with_offered_model(options, say)
    refs = parse_models(options.models)
    prompt = None if options.plan else _prompt(options, say)
    temperature = options.sampling.temperature
    prepare_libraries()
    reporter, ask = TalkReporter(say), asker(yes=options.yes)
    if options.plan:
        with TemporaryDirectory(prefix="specchat-") as folder:
            try:
                models = sketch_models(options.models, refs, reporter, ask, Path(folder))
            except ModelError as error:
                planned = plan_known(options.models, refs, error, reporter, temperature)
            else:
                planned = planning.make_plan(options.models, models, reporter, temperature=temperature)
                check_can_chat(planned.models.target.path, base=options.base)
            print_plan(planned, as_json=options.json)
        return 0
    models = locate_models(options.models, refs, reporter, ask)
    planned = planning.make_plan(options.models, models, reporter, temperature=temperature)
    check_can_chat(planned.models.target.path, base=options.base)
    return _chat(options, planned, prompt, say)


# --- the prompt --------------------------------------------------------------------------------------------------


def _prompt(options: RunOptions, say: "Talk") -> str | None:
    """Return the prompt from the arguments and stdin, or None for an interactive chat.

    Raises:
        EmptyPromptError: neither the arguments nor stdin have a prompt.
        UsageError: stdin is not text, or an interactive chat was asked for JSON.
    """
    can_type = sys.stdin is not None and sys.stdin.isatty()
    if options.prompt is None and can_type and sys.stdout.isatty():
        if options.json or options.json_stream:
            raise UsageError("--json and --json-stream need a PROMPT or a prompt on stdin")
        return None
    if options.prompt is None and can_type:
        say.say("reading the prompt from the terminal; end it with Ctrl-D on a line of its own")
    piped = "" if options.prompt is not None and can_type else read_stdin(say)
    prompt = _joined(piped, options.prompt)
    if prompt.strip():
        prompt = "\n\n".join([*(text for _, text in options.files), prompt])
    if not prompt.strip():
        raise EmptyPromptError("the prompt is empty", hint='use specchat run MODEL "QUESTION", or pipe the prompt in')
    return prompt


def _joined(piped: str, prompt: str | None) -> str:
    """Join the text from stdin and the PROMPT argument with a blank line."""
    if not prompt:
        return piped
    text = piped.rstrip("\n")
    return f"{text}\n\n{prompt}" if text else prompt


# --- the chat ----------------------------------------------------------------------------------------------------


def _chat(options: RunOptions, planned: "Planned", prompt: str | None, say: "Talk") -> int:
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream

    models, plan = planned.models, planned.plan
    defaults = load_generation_defaults(models.target.path)
    seed = random_seed() if options.seed is None else options.seed
    sampling = resolve_sampling(options.sampling, defaults, seed)
    sources = sampling_sources(options.sources, defaults)
    view = ChatView(answer_stream(), say, verbose=options.verbose, raw=options.raw)
    details = "/info" if prompt is None else "--plan"
    view.banner(models.target, planned.chosen, models.draft_note, details=details)
    if models.target.name == DEMO and prompt is None and options.resume is None:
        view.suggest(DEMO_PROMPTS)
    for notice in [*defaults.ignored, *without_effect(sampling, sources), *_notices(options, plan, models)]:
        say.warn(notice)
    with _transcript(options, say, interactive=prompt is None) as transcript:
        parts = _Parts(options, models, plan, sampling, sources, defaults, transcript)
        if prompt is None:
            model = _interactive(parts, view)
            return 0 if model is None else _switch(options, model, transcript, say)
        session = load_watched(parts.load, view)
        with closing(session.engine):
            return _answer(options, models, session, view, prompt)


@dataclass(frozen=True)
class _Parts:
    """The parts of a chat, from which it can be loaded."""

    options: RunOptions
    models: Models
    plan: Plan
    sampling: Sampling
    sources: Mapping[str, str]
    defaults: "GenerationDefaults"
    transcript: "Transcript"

    def load(self, reporter: "Reporter") -> "ChatSession":
        """Load the models and return the new or resumed chat.

        Raises:
            UsageError: the target has no chat template, and --base was not given.
        """
        from specchat.chat.prompt import check_has_template
        from specchat.models.hf.light_imports import import_lightly
        from specchat.models.hf.tokenizer import load_tokenizer

        import_lightly()
        tokenizer = load_tokenizer(self.models.target.path)
        check_has_template(tokenizer, base=self.options.base)
        temperature = self.sampling.temperature
        engine = load_engine(self.options.models, self.models, self.plan, reporter, temperature)
        try:
            return self._opened(self._session(engine, tokenizer), reporter)
        except BaseException:
            engine.close()
            raise

    def settings(self, session: "ChatSession") -> list[Setting]:
        """Return all settings with their origins, for /info."""
        return [*_model_settings(self.options, session.engine.plan), *session.settings()]

    def _opened(self, session: "ChatSession", reporter: "Reporter") -> "ChatSession":
        """Record the setup of the chat in its transcript, and return the chat."""
        from specchat.chat.state import Opened

        options = self.options
        if self.sources.get("think", "").startswith("--") and not session.can_switch_thinking:
            flag = self.sources["think"]
            reporter.warn(f"{flag} has no effect: this model's chat template has no switch for thinking")
        self.transcript(Opened(self._setup(), session.system, self.sampling, options.max_tokens, options.think))
        return session

    def _session(self, engine: "Engine", tokenizer: "Tokenizer") -> "ChatSession":
        from specchat.chat.session import ChatSession

        options = self.options
        return ChatSession(
            engine,
            tokenizer,
            sampling=self.sampling,
            stop_ids=stop_ids(self.defaults, tokenizer),
            stop_texts=options.stops,
            max_tokens=options.max_tokens,
            system=None if options.base else options.system,
            base=options.base,
            thinking=options.think,
            overflow=options.overflow,
            exchanges=options.resume.state.exchanges if options.resume else (),
            sources=self.sources,
            journal=self.transcript,
            observe=partial(_keep_statistics, engine, engine.plan) if options.saves else _keep_nothing,
        )

    def _setup(self) -> dict[str, Any]:
        """Return the settings that a resumed chat needs to continue in the same way."""
        target, plan, options = self.models.target, self.plan, self.options
        return {
            "specchat": __version__,
            "model": lasting(target.name),
            "revision": target.revision,
            "draft": options.models.draft,
            "quant": plan.quant,
            "dtype": plan.work.dtype,
            "device": plan.work.device,
            "ctx": options.models.choices.ctx,
            "stop": list(options.stops),
            "overflow": options.overflow,
            "base": options.base,
        }


def _model_settings(options: RunOptions, plan: Plan) -> list[Setting]:
    """Return the settings of the models."""
    values = {
        "model": plan.target,
        "draft": plan.sources,
        "quant": plan.quant,
        "device": plan.work.device,
        "dtype": plan.work.dtype,
        "ctx": f"{plan.work.ctx:,}",
        "tree_budget": f"{plan.work.tree_budget:,}",
        "vram": format_bytes(plan.vram_bytes),
    }
    return [Setting(name, value, options.sources.get(name, "default")) for name, value in values.items()]


def _keep_statistics(engine: "Engine", plan: Plan, steps: Sequence[Step], temperature: float) -> None:
    """Save tokens per step and times for the next plan of these models, and no text.

    Once layers were given back, the times are not those of the plan any more.
    """
    from specchat.planner.statistics import record

    if engine.plan is plan:
        record(state_folder(), plan, temperature, steps)


def _keep_nothing(_steps: Sequence[Step], _temperature: float) -> None:
    """Save nothing, for a chat that is not saved."""


@contextmanager
def _transcript(options: RunOptions, say: "Talk", *, interactive: bool) -> "Iterator[Transcript]":
    """Open the file that the chat is appended to, locked against other processes."""
    from specchat.chat.transcript import Transcript

    saved = options.resume
    if saved is not None and options.saves:
        say.say(f"session {saved.session_id}: {_turns(saved)} so far", "dim")
        if saved.repair is not None:
            say.warn(saved.repair)
    elif saved is None and options.session_id is not None:
        say.say(new_chat_note(options.session_id), "dim")
    transcript = Transcript(path_for(options, interactive=interactive), saved)
    try:
        yield transcript
    finally:
        transcript.close()


def _turns(saved: "Saved") -> str:
    num_turns = len(saved.state.exchanges)
    return "1 turn" if num_turns == 1 else f"{num_turns} turns"


def _notices(options: RunOptions, plan: Plan, models: Models) -> list[str]:
    """Return a warning for each option that has no effect, and for a resumed chat with another model."""
    notices = []
    if options.models.choices.tree_budget is not None and plan.sources == "none":
        notices.append(f"{options.sources['tree_budget']} has no effect: there is no draft")
    if options.base and options.system is not None:
        notices.append("the system prompt has no effect: --base uses no chat template")
    if options.resume is not None and not was_with(options.resume, models.target):
        notices.append(f"this chat used {model_of(options.resume)} so far")
    return notices


def _answer(options: RunOptions, models: Models, session: "ChatSession", view: "ChatView", prompt: str) -> int:
    if options.json or options.json_stream:
        return _answer_as_json(options, models, session, view, prompt)
    return _answer_as_text(session, view, prompt)


def _switch(options: RunOptions, model: str, transcript: "Transcript", say: "Talk") -> int:
    """Go on with the chat and another model; if it cannot be loaded, with the model so far."""
    from specchat.engine.device import release_memory

    transcript.close()
    release_memory()  # of the model so far
    try:
        return run(switched(options, model, transcript))
    except SpecchatError as error:
        say.error(error.message, error.hint)
        say.say(f"going on with {options.models.model}")
    return run(replace(switched(options, model, transcript), models=options.models))


def _interactive(parts: _Parts, view: "ChatView") -> str | None:
    """Run a chat on the terminal, and return the model to go on with, or None."""
    from specchat.chat.transcript import history_file
    from specchat.ui.desk import Chat
    from specchat.ui.loading import BackgroundLoad
    from specchat.ui.repl import open_chat

    history = history_file() if parts.options.keeps_history else None
    loading = BackgroundLoad(parts.load)
    options, model = parts.options, None
    chat = Chat(
        loading,
        parts.transcript,
        parts.settings,
        check_model=lambda name: _check_model(options, name),
        files=options.files,
        rings=options.bell,
    )
    with ExitStack() as stack:
        stack.callback(loading.close, lambda session: session.engine.close())  # even if nothing can be said any more
        try:
            model = open_chat(chat, view, history_file=history, vi=options.vi)
        finally:
            if model is None:
                _say_how_to_resume(parts.transcript, view.talk)
    return model


def _check_model(options: RunOptions, name: str) -> None:
    """Refuse a name that cannot be a model, and a path with nothing there."""
    target = parse_models(replace(options.models, model=options.aliases.get(name, name), draft="none")).target
    if target.kind == "folder":
        look_up_folder(target)


def _say_how_to_resume(transcript: "Transcript", say: "Talk") -> None:
    """Name the command that resumes the chat, if anything of it was saved."""
    if transcript.session_id is not None and transcript.is_on_disk:
        say.say(f"resume this chat with: {resume_command(transcript.session_id)}", "dim")


def _answer_as_text(session: "ChatSession", view: "ChatView", prompt: str) -> int:
    from specchat.ui.interrupts import Interrupts

    cancel = Event()
    with Interrupts().setting(cancel):
        turn = view.follow(session, session.ask(prompt, cancel), cancel)
    view.end(turn, session.engine.plan)
    return _code(turn)


def _answer_as_json(options: RunOptions, models: Models, session: "ChatSession", view: "ChatView", prompt: str) -> int:
    from specchat.chat.result import done_object, run_object
    from specchat.ui.interrupts import Interrupts

    cancel = Event()
    show = _print_delta if options.json_stream else _ignore
    with Interrupts().setting(cancel):
        turn = view.follow(session, session.ask(prompt, cancel), cancel, show)
    if turn.unsaved is not None:
        view.talk.error(turn.unsaved, None)
    result = run_object(turn, target=models.target, plan=session.engine.plan, seed=session.sampling.seed)
    print_line(to_json(done_object(result) if options.json_stream else result))
    return _code(turn)


def _print_delta(delta: "Delta") -> None:
    from specchat.chat.result import delta_object

    if delta.text or delta.token_ids:
        print_line(to_json(delta_object(delta)))


def _ignore(delta: "Delta") -> None:
    """Print nothing: with --json the text is printed at the end."""


def _code(turn: "Turn") -> int:
    if turn.finish_reason == "interrupt":
        return _INTERRUPTED
    return 0 if turn.unsaved is None else _FAILED
