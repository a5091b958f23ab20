"""`specchat serve`: an HTTP server that speaks OpenAI's protocol."""

import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from specchat.cli.ask import asker
from specchat.cli.loading import load_watched
from specchat.cli.settings import Settings
from specchat.loading.engine import load_engine, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.planning import Planned, make_plan
from specchat.loading.request import ModelRequest
from specchat.loading.sampling import SamplingChoices
from specchat.paths import state_folder
from specchat.planner.learning import Learning
from specchat.planner.statistics import SharedPass
from specchat.serve.installed import check_installed

if TYPE_CHECKING:
    import socket

    from specchat.engine.engine import Engine
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.serve.app import Api
    from specchat.serve.errors import ApiError
    from specchat.serve.objects import ServedModel
    from specchat.serve.worker import AnswerWorker, Job
    from specchat.ui.console import Talk

_HOST, _PORT = "127.0.0.1", 8000
_MOST_WAITING = 64


@dataclass(frozen=True)
class ServeOptions:
    """Checked options of `specchat serve`.

    Attributes:
        models: options about models, memory and device; its seats are the answers at once.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key: key that requests must have, or None.
        origins: origins of web pages that may use the server.
        sampling: sampling values for what a client leaves open.
        max_tokens: most tokens of an answer, or None.
        think: value of the chat template's thinking switch, or None.
        aliases: models by the names that the user gave them.
        yes: whether to download without asking.
        quiet: whether only errors are shown.
        saves: whether speeds are saved for later plans.
    """

    models: ModelRequest
    host: str = _HOST
    port: int = _PORT
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    sampling: SamplingChoices = field(default_factory=SamplingChoices)
    max_tokens: int | None = None
    think: bool | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    yes: bool = False
    quiet: bool = False
    saves: bool = True


def serve_options(models: ModelRequest, chosen: Settings, *, yes: bool, quiet: bool) -> ServeOptions:
    """Return the options that the settings name."""
    return ServeOptions(
        models=replace(models, choices=replace(models.choices, seats=chosen.get("parallel", 1))),
        host=chosen.get("host", _HOST),
        port=chosen.get("port", _PORT),
        api_key=chosen.get("api_key"),
        origins=chosen.get("allow_origin", ()),
        sampling=chosen.sampling(),
        max_tokens=chosen.get("max_tokens"),
        think=chosen.get("think"),
        aliases=chosen.aliases,
        yes=yes,
        quiet=quiet,
        saves=chosen.get("save", True),
    )


def serve(options: ServeOptions) -> int:
    """Run `specchat serve` until a signal ends it, and return the exit code.

    Raises:
        NotAvailableError: the packages of the extra `serve` are not installed.
        AddressUnusableError: the port is in use, or the address is not one of this machine.
    """
    check_installed()
    from specchat.serve.http import bound_socket
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream, talk
    from specchat.ui.progress import TalkReporter

    say = talk(quiet=options.quiet)
    refs = parse_models(options.models)
    with closing(bound_socket(options.host, options.port)) as bound:
        _warn_if_open(options, bound, say)
        prepare_libraries()
        reporter, temperature = TalkReporter(say), options.sampling.temperature
        models = locate_models(options.models, refs, reporter, asker(yes=options.yes))
        planned = make_plan(options.models, models, reporter, temperature=temperature)
        view = ChatView(answer_stream(), say, raw=True)
        target = planned.models.target
        view.banner(target, planned.chosen, planned.models.draft_note, details=f"specchat probe {target.name}")
        tokenizer, engine = load_watched(
            lambda progress: (
                _tokenizer(planned),
                load_engine(options.models, planned.models, planned.plan, progress, temperature),
            ),
            view,
        )
        with closing(engine):
            return _serve(options, planned, engine, tokenizer, bound, say)


def _tokenizer(planned: Planned) -> "Tokenizer":
    from specchat.models.hf.tokenizer import load_tokenizer

    return load_tokenizer(planned.models.target.path)


def _warn_if_open(options: ServeOptions, bound: "socket.socket", say: "Talk") -> None:
    """Warn about a server that strangers can use."""
    from specchat.serve.http import is_loopback

    if options.api_key is None and not is_loopback(bound):
        say.warn(f"everyone who reaches {options.host} can use this server: set --api-key, or keep to 127.0.0.1")


def _serve(
    options: ServeOptions,
    planned: Planned,
    engine: "Engine",
    tokenizer: "Tokenizer",
    bound: "socket.socket",
    say: "Talk",
) -> int:
    """Answer requests until a signal ends the server."""
    from specchat.serve.http import HttpServer, start_listening, url_of
    from specchat.serve.worker import AnswerWorker

    def learn(shared: SharedPass) -> None:
        if options.saves and engine.plan is plan:  # else layers were given back, and passes take other times
            learning.add(shared)

    plan = engine.plan
    with (
        Learning(state_folder(), plan) as learning,
        AnswerWorker(
            engine,
            most_waiting=_MOST_WAITING,
            observe=lambda job, error: _note(job, error, say),
            learn=learn,
            warn=say.warn,
        ) as worker,
    ):
        worker.start()
        server = HttpServer(_api(options, planned, engine, tokenizer, worker, say).app(), worker.stop)
        start_listening(bound)
        say.say(f"serving {planned.models.target.name} at {url_of(bound)} · Ctrl-C ends the server")
        server.run(sockets=[bound])
    return 0 if server.ended_by is None else 128 + signal.Signals(server.ended_by)


def _api(
    options: ServeOptions,
    planned: Planned,
    engine: "Engine",
    tokenizer: "Tokenizer",
    worker: "AnswerWorker",
    say: "Talk",
) -> "Api":
    """Return the endpoints of the loaded model."""
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.serve.access import Access
    from specchat.serve.app import Api
    from specchat.serve.preparing import Preparer, ServerDefaults

    model_defaults = load_generation_defaults(planned.models.target.path)
    for line in model_defaults.ignored:
        say.warn(line)
    if not tokenizer.has_chat_template:
        say.warn("this model has no chat template, so it can only continue texts: /v1/completions")
    preparer = Preparer(
        tokenizer,
        model_defaults,
        stop_ids(model_defaults, tokenizer),
        engine.plan,
        engine.target.vocab_size,
        ServerDefaults(options.sampling, options.max_tokens, options.think),
    )
    access = Access(options.api_key, options.origins)
    return Api(_served_model(options, planned, engine), preparer, worker, access, say.warn)


def _served_model(options: ServeOptions, planned: Planned, engine: "Engine") -> "ServedModel":
    """Return the model with all names that it has here."""
    from specchat.serve.objects import ServedModel

    name, given = planned.models.target.name, options.models.model or ""
    aliases = [alias for alias, model in options.aliases.items() if model == given]
    last_part = name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    names = frozenset({name, name.partition("@")[0], given, last_part, *aliases, "specchat", "default"})
    return ServedModel(name, names, engine.plan.work.ctx, int(time.time()))


def _note(job: "Job", error: "ApiError | None", say: "Talk") -> None:
    """Print one line about a finished answer: figures only, no text."""
    answer = job.answer
    usage = answer.usage(len(job.request.prompt_ids))
    if error is not None:
        say.say(f"answer not finished: {error.message}", "dim")
        return
    how = "" if answer.finish_reason is not None else " · the client left"
    new = usage.prompt_tokens - usage.cached_tokens
    speed = answer.timings(load_s=0.0).tok_per_s if answer.token_ids else 0.0
    say.say(
        f"answer: {usage.completion_tokens:,} tok · {speed:.1f} tok/s · "
        f"prompt {new:,} new + {usage.cached_tokens:,} cached · waited {job.queue_s:.1f} s{how}",
        "dim",
    )
