"""The command line: commands, arguments and options. The work itself is done elsewhere."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from specchat.chat.settings import whole
from specchat.cli import bench_options, completion, options, parameters, settings
from specchat.cli.command_list import CommandList
from specchat.cli.exit_status import guarded, leave
from specchat.cli.misspelt import ParserError, usage_error
from specchat.cli.other_tools import refuse_command
from specchat.cli.settings import Settings
from specchat.cli.torchrun import on_all_ranks, refuse_torchrun
from specchat.errors import UsageError
from specchat.loading.request import ModelRequest
from specchat.loading.tokens import workers_choice
from specchat.paths import user_path
from specchat.records.plan import PlanChoices
from specchat.version import __version__

# What a command returns: its work, to be called after typer has returned. Typer handles interrupts and closed pipes in
# its own way, which must not apply to the work.
_Action = Callable[[], int]

app = typer.Typer(
    name="specchat",
    cls=CommandList,
    help="Chat with a language model that is larger than your GPU's memory.",
    add_completion=False,  # see completion.py
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _shared_settings(config: str | None, given: Mapping[str, Any]) -> Settings:
    """Return the shared settings. Flags override the environment, and the environment overrides config.toml."""
    file, aliases = settings.config_file(config)
    layers = [_flags(given, settings.SHARED_KEYS), settings.environment(), file]
    return settings.resolve(settings.SHARED_KEYS, layers, aliases)


def _flags(given: Mapping[str, Any], keys: Sequence[settings.Key]) -> settings.Layer:
    """Return the parameters that are settings, as a layer."""
    return settings.flags({key.name: given[key.name] for key in keys if key.name in given})


def _model_request(chosen: Settings, model: str | None) -> ModelRequest:
    if chosen.get("workers") and chosen.get("devices"):
        raise UsageError("--workers and --devices cannot be combined", hint="leave --workers or --devices out")
    return ModelRequest(
        model=model if model is None else chosen.aliases.get(model, model),
        draft=chosen.model("draft") or "auto",
        tokenizer=chosen.model("tokenizer"),
        choices=options.on_devices(
            PlanChoices(
                device=chosen.get("device", "auto"),
                devices=chosen.get("devices", ()),
                dtype=chosen.get("dtype", "auto"),
                vram_bytes=chosen.get("vram"),
                ram_bytes=chosen.get("ram"),
                ctx=chosen.get("ctx"),
                tree_budget=chosen.get("tree_budget"),
                quant=chosen.get("quant", "auto"),
                draft_quant=chosen.get("draft_quant", "auto"),
            ),
            chosen.sources,
        ),
        offline=chosen.get("offline", False),
        aliases=tuple(chosen.aliases),
        workers=workers_choice(chosen.get("workers", ()), chosen.get("token_file")),
    )


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"specchat {__version__}")
        raise typer.Exit


def _print_completion(shell: str | None) -> None:
    if shell is not None:
        typer.echo(completion.script(shell))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _specchat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    show_completion: Annotated[
        str | None,
        typer.Option(
            metavar="SHELL",
            help="Print the completion script for bash, zsh or fish, and exit.",
            autocompletion=completion.words(*completion.SHELLS),
            callback=_print_completion,
            is_eager=True,
        ),
    ] = None,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("run")
def _run(
    *,
    model: parameters.Model = None,
    prompt: parameters.Prompt = None,
    draft: parameters.Draft = None,
    tokenizer: parameters.Tokenizer = None,
    device: parameters.Device = None,
    devices: parameters.Devices = None,
    workers: parameters.Workers = None,
    token_file: parameters.TokenFile = None,
    vram: parameters.Vram = None,
    ram: parameters.Ram = None,
    ctx: parameters.Ctx = None,
    tree_budget: parameters.TreeBudget = None,
    dtype: parameters.Dtype = None,
    quant: parameters.Quant = None,
    draft_quant: parameters.DraftQuant = None,
    temperature: parameters.Temperature = None,
    top_p: parameters.TopP = None,
    top_k: parameters.TopK = None,
    min_p: parameters.MinP = None,
    repetition_penalty: parameters.RepetitionPenalty = None,
    seed: parameters.Seed = None,
    max_tokens: parameters.MaxTokens = None,
    stop: parameters.Stop = None,
    system: parameters.System = None,
    file: parameters.File = None,
    think: parameters.Think = None,
    overflow: parameters.Overflow = None,
    base: parameters.Base = False,
    continue_: parameters.Continue = False,
    session: parameters.Session = None,
    save: parameters.Save = None,
    raw: parameters.Raw = None,
    json: parameters.Json = False,
    json_stream: parameters.JsonStream = False,
    prompts: parameters.PromptsFile = None,
    output: parameters.Results = None,
    batch: parameters.Batch = None,
    plan: parameters.Plan = False,
    config: parameters.Config = None,
    offline: parameters.Offline = None,
    yes: parameters.Yes = False,
    quiet: parameters.Quiet = False,
    verbose: parameters.Verbose = False,
) -> _Action:
    """Chat with MODEL, or answer one PROMPT and exit."""
    given = locals()  # settings are looked up here by name
    from specchat.cli import sessions
    from specchat.cli.run import run

    resumed = sessions.resumed(session, continues=continue_)
    config_file, aliases = settings.config_file(config)
    model, prompt = sessions.arguments(model, prompt, resumed, aliases)
    refuse_command(model, aliases)
    given |= {"model": model}
    layers = [
        _flags(given, settings.RUN_KEYS),
        *sessions.layers(resumed, model and aliases.get(model, model)),
        settings.environment(),
        config_file,
    ]
    chosen = settings.resolve(settings.RUN_KEYS, layers, aliases)
    sessions.check_new(session, resumed, chosen.model("model"))
    checked = options.RunOptions(
        models=_model_request(chosen, chosen.model("model")),
        seed=chosen.get("seed"),
        yes=yes,
        quiet=quiet,
        prompt=prompt,
        sampling=chosen.sampling(),
        stops=chosen.get("stop", ()),
        max_tokens=chosen.get("max_tokens"),
        system=chosen.get("system"),
        think=chosen.get("think"),
        overflow=chosen.get("overflow", "stop"),
        base=base or (resumed is not None and bool(resumed.opened.setup["base"])),
        json=json,
        json_stream=json_stream,
        plan=plan,
        verbose=verbose,
        raw=chosen.get("raw", False),
        files=options.files(file),
        vi=chosen.get("vi", False),
        bell=chosen.get("bell", False),
        aliases=aliases,
        resume=resumed,
        session_id=session,
        saves=chosen.get("save", True),
        keeps_history=chosen.get("history", True) and chosen.get("save", True),
        prompts=None if prompts is None else user_path(prompts),
        results=None if output is None else user_path(output),
        batch=options.batch("--batch", batch),
        sources=chosen.sources,
    )
    checked = options.check_combination(checked)
    if prompts is None:
        refuse_torchrun("a chat")
        return partial(run, checked)
    return partial(on_all_ranks, checked, chosen.get("token_file"), run)


@app.command("bench")
def _bench(
    *,
    model: parameters.Model = None,
    draft: parameters.Draft = None,
    tokenizer: parameters.Tokenizer = None,
    device: parameters.Device = None,
    devices: parameters.Devices = None,
    workers: parameters.Workers = None,
    token_file: parameters.TokenFile = None,
    vram: parameters.Vram = None,
    ram: parameters.Ram = None,
    ctx: parameters.Ctx = None,
    tree_budget: parameters.TreeBudget = None,
    dtype: parameters.Dtype = None,
    quant: parameters.Quant = None,
    draft_quant: parameters.DraftQuant = None,
    prompts: parameters.Prompts = None,
    limit: parameters.Limit = None,
    repeats: parameters.Repeats = None,
    max_tokens: parameters.BenchMaxTokens = None,
    seed: parameters.BenchSeed = None,
    baseline: parameters.Baseline = None,
    limit_memory: parameters.LimitMemory = None,
    cold: parameters.Cold = False,
    passes: parameters.Passes = False,
    sweep: parameters.Sweep = None,
    batch: parameters.Batches = None,
    plot: parameters.Plot = None,
    compare: parameters.Compare = None,
    output: parameters.Output = None,
    json: parameters.BenchJson = False,
    config: parameters.Config = None,
    offline: parameters.Offline = None,
    yes: parameters.Yes = False,
    quiet: parameters.BenchQuiet = False,
) -> _Action:
    """Measure how fast MODEL is and check that its text is exact."""
    given = locals()
    from specchat.cli.bench import bench

    chosen = _shared_settings(config, given)
    refuse_command(model, chosen.aliases)
    checked = bench_options.BenchOptions(
        models=_model_request(chosen, model),
        seed=options.seed(seed),
        yes=yes,
        quiet=quiet,
        max_tokens=whole("--max-tokens", max_tokens, 1),
        prompts=None if prompts is None else user_path(prompts),
        limit=whole("--limit", limit, 1),
        baselines=bench_options.baselines(baseline),
        limit_memory=None if limit_memory is None else options.size("--limit-memory", limit_memory),
        repeats=whole("--repeats", repeats, 1),
        cold=cold,
        passes=passes,
        sweep=bench_options.sweep(sweep),
        batches=bench_options.batches(batch),
        plot=None if plot is None else user_path(plot),
        compare=bench_options.compared(compare),
        output=bench_options.output(output, json=json),
        command=tuple(sys.argv[1:]),
    )
    checked = bench_options.check_combination(checked)
    if compare is not None:
        return partial(bench, checked)
    return partial(on_all_ranks, checked, chosen.get("token_file"), bench)


@app.command("probe")
def _probe(
    *,
    model: parameters.Model = None,
    draft: parameters.Draft = None,
    tokenizer: parameters.Tokenizer = None,
    device: parameters.Device = None,
    devices: parameters.Devices = None,
    workers: parameters.Workers = None,
    token_file: parameters.TokenFile = None,
    vram: parameters.Vram = None,
    ram: parameters.Ram = None,
    ctx: parameters.Ctx = None,
    tree_budget: parameters.TreeBudget = None,
    dtype: parameters.Dtype = None,
    quant: parameters.Quant = None,
    draft_quant: parameters.DraftQuant = None,
    json: parameters.ProbeJson = False,
    markdown: parameters.Markdown = False,
    refresh: parameters.Refresh = False,
    verify: parameters.Verify = False,
    config: parameters.Config = None,
    offline: parameters.Offline = None,
    yes: parameters.Yes = False,
    quiet: parameters.ProbeQuiet = False,
) -> _Action:
    """Report what this machine can run, or the plan for MODEL."""
    given = locals()
    from specchat.cli.probe import ProbeOptions, check_combination, probe

    chosen = _shared_settings(config, given)
    refuse_command(model, chosen.aliases)
    checked = ProbeOptions(
        models=_model_request(chosen, model),
        yes=yes,
        quiet=quiet,
        json=json,
        markdown=markdown,
        refresh=refresh,
        verify=verify,
    )
    same_config = [] if config is None else ["--config", config]
    return partial(probe, check_combination(checked), lambda arguments: _perform([*arguments, *same_config]))


@app.command("serve")
def _serve(
    *,
    model: parameters.Model = None,
    host: parameters.Host = None,
    port: parameters.Port = None,
    api_key: parameters.ApiKey = None,
    parallel: parameters.Parallel = None,
    allow_origin: parameters.AllowOrigin = None,
    draft: parameters.Draft = None,
    tokenizer: parameters.Tokenizer = None,
    device: parameters.Device = None,
    devices: parameters.Devices = None,
    workers: parameters.Workers = None,
    token_file: parameters.TokenFile = None,
    vram: parameters.Vram = None,
    ram: parameters.Ram = None,
    ctx: parameters.Ctx = None,
    tree_budget: parameters.TreeBudget = None,
    dtype: parameters.Dtype = None,
    quant: parameters.Quant = None,
    draft_quant: parameters.DraftQuant = None,
    temperature: parameters.Temperature = None,
    top_p: parameters.TopP = None,
    top_k: parameters.TopK = None,
    min_p: parameters.MinP = None,
    repetition_penalty: parameters.RepetitionPenalty = None,
    max_tokens: parameters.MaxTokens = None,
    think: parameters.Think = None,
    config: parameters.Config = None,
    offline: parameters.Offline = None,
    yes: parameters.Yes = False,
    quiet: parameters.ServeQuiet = False,
) -> _Action:
    """Serve MODEL to editors and apps, as OpenAI's API."""
    given = locals()
    from specchat.cli.serve import serve, serve_options

    file, aliases = settings.config_file(config)
    layers = [_flags(given, settings.SERVE_KEYS), settings.environment(), file]
    chosen = settings.resolve(settings.SERVE_KEYS, layers, aliases)
    refuse_command(model, chosen.aliases)
    request = _model_request(chosen, chosen.model("model"))
    refuse_torchrun("a server")
    return partial(serve, serve_options(request, chosen, yes=yes, quiet=quiet))


@app.command("worker")
def _worker(
    *,
    model: parameters.WorkerModel = None,
    listen: parameters.Listen = None,
    token_file: parameters.TokenFile = None,
    device: parameters.Device = None,
    vram: parameters.Vram = None,
    quiet: parameters.ServeQuiet = False,
) -> _Action:
    """Compute layers for a chat on another machine."""
    from specchat.cli.worker import work, worker_options

    return partial(work, worker_options(model, listen, token_file, device, vram, quiet=quiet))


@app.command("models")
def _models(
    *,
    action: parameters.ModelsAction = None,
    name: parameters.InstalledNames = None,
    json: parameters.ProbeJson = False,
    yes: parameters.YesRemove = False,
) -> _Action:
    """List or remove the models on this disk."""
    from specchat.cli.models_command import check, manage_models

    return partial(manage_models, check(action, name, json=json, yes=yes))


@app.command("sessions")
def _sessions(
    *,
    action: parameters.SessionsAction = None,
    words: parameters.SessionWords = None,
    json: parameters.ProbeJson = False,
    yes: parameters.YesRemove = False,
) -> _Action:
    """List, search, show or remove saved chats."""
    from specchat.cli.sessions_command import check, manage_sessions

    return partial(manage_sessions, check(action, words, json=json, yes=yes))


def _parse(arguments: Sequence[str]) -> int | _Action | None:
    """Parse the arguments. Return the work to do, or the exit code of work already done, such as --help.

    Raises:
        UsageError: typer's parser rejects the arguments.
    """
    completion.prepare()
    command = typer.main.get_command(app)
    try:
        result: int | _Action | None = command.main(list(arguments), prog_name="specchat", standalone_mode=False)
    except ParserError as error:
        raise usage_error(error, arguments) from error
    return result


def run_command_line(arguments: Sequence[str]) -> int:
    """Run `specchat` with these arguments and return the exit code."""
    return guarded(partial(_perform, arguments))


def _perform(arguments: Sequence[str]) -> int:
    """Parse the arguments, do their work and return the exit code."""
    action = _parse(arguments)
    return action() if callable(action) else action or 0


def main() -> NoReturn:
    """Run the `specchat` command and end the process."""
    leave(run_command_line(sys.argv[1:]))
