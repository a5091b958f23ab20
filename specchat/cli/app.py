"""The command line: what can be typed, and nothing of what it does."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from specchat import __version__
from specchat.chat.settings import whole
from specchat.cli import bench_options, completion, options, settings
from specchat.cli.exit_status import guarded, leave
from specchat.cli.settings import Settings
from specchat.errors import UsageError
from specchat.records.model import QUANTS

# What a command returns: the work itself, done after typer is out of the way, for typer has ideas of its own about
# interrupts and closed pipes.
_Action = Callable[[], int]

# The base of all complaints of typer's parser, which has no public name; BadParameter, a direct child, has one.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="specchat",
    help="Chat, on your own GPU or none, with a language model that does not fit in its memory.",
    add_completion=False,  # see completion.py
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that several commands have, each declared once.
_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", autocompletion=completion.models, help="demo, a folder (./x, /x, ~/x), or a hub id (org/name)."
    ),
]
_Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        autocompletion=completion.drafts,
        help="Small model that drafts ahead: a MODEL, auto (the default), or none.",
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        autocompletion=completion.words("auto", "cpu", "cuda"),
        help="auto (the default), cpu, cuda or cuda:N.",
    ),
]
_Vram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory budget on the device, such as 900MiB or 8GiB; RAM on the CPU."),
]
_Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Host memory for streamed layers; what does not fit is read from disk."),
]
_Ctx = Annotated[str | None, typer.Option(metavar="N", help="Context: tokens of chat and answer together.")]
_TreeBudget = Annotated[
    str | None, typer.Option(metavar="N", help="Draft tokens checked in one pass, or auto (the default).")
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", autocompletion=completion.words(*options.DTYPES), help="auto (the default), bf16, fp16 or fp32."
    ),
]
_Quant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="Store the model's matrices as none (as they are), int8 or int4; or auto (the default).",
    ),
]
_DraftQuant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="The same for the draft, whose precision changes nothing of the text: auto, none, int8 or int4.",
    ),
]
_Config = Annotated[
    str | None, typer.Option(metavar="FILE", help="Settings from FILE in place of the usual config.toml.")
]
_Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Download without asking.")]


def _shared_settings(config: str | None, parameters: Mapping[str, Any]) -> Settings:
    """What holds of the settings that every command has: flags before the environment before config.toml.

    Args:
        config: --config.
        parameters: the command's own, by name.
    """
    file, aliases = settings.config_file(config)
    layers = [_flags(parameters, settings.SHARED_KEYS), settings.environment(), file]
    return settings.resolve(settings.SHARED_KEYS, layers, aliases)


def _flags(parameters: Mapping[str, Any], keys: Sequence[settings.Key]) -> settings.Layer:
    """Those of a command's parameters that are settings, under the same names."""
    return settings.flags({key.name: parameters[key.name] for key in keys if key.name in parameters})


def _model_options(
    chosen: Settings, *, model: str | None, seed: int | None, yes: bool, quiet: bool
) -> options.ModelOptions:
    return options.ModelOptions(
        model=model if model is None else chosen.aliases.get(model, model),
        draft=chosen.model("draft") or "auto",
        device=chosen.get("device", "auto"),
        vram_bytes=chosen.get("vram"),
        ram_bytes=chosen.get("ram"),
        ctx=chosen.get("ctx"),
        tree_budget=chosen.get("tree_budget"),
        dtype=chosen.get("dtype", "auto"),
        quant=chosen.get("quant", "auto"),
        draft_quant=chosen.get("draft_quant", "auto"),
        seed=seed,
        offline=chosen.get("offline", False),
        yes=yes,
        quiet=quiet,
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
            help="Print what bash, zsh or fish need to complete specchat's words, and exit.",
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
    model: _Model = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Answer this and exit; without it, chat.")
    ] = None,
    draft: _Draft = None,
    device: _Device = None,
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = None,
    dtype: _Dtype = None,
    quant: _Quant = None,
    draft_quant: _DraftQuant = None,
    temperature: Annotated[str | None, typer.Option(metavar="T", help="0 is greedy.")] = None,
    top_p: Annotated[str | None, typer.Option(metavar="P", help="Keep the likeliest tokens up to this mass.")] = None,
    top_k: Annotated[str | None, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")] = None,
    min_p: Annotated[
        str | None, typer.Option(metavar="P", help="Drop tokens below this share of the likeliest one.")
    ] = None,
    repetition_penalty: Annotated[
        str | None, typer.Option(metavar="R", help="Above 1 makes repeating less likely.")
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Makes draws repeatable; random if not given.")] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Longest answer; as long as the context allows if not given.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before TEXT; may be repeated.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT|@FILE", help="System prompt, or the file that holds it.")
    ] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Let the model think first, if its template has a switch.")
    ] = None,
    overflow: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            autocompletion=completion.words(*options.OVERFLOWS),
            help="When the context is full: stop (the default) or drop-oldest.",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Continue the prompt as it stands, without a chat template.")
    ] = False,
    continue_: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last saved chat.")] = False,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID", autocompletion=completion.sessions, help="Go on with the chat of that name, or begin one."
        ),
    ] = None,
    save: Annotated[bool | None, typer.Option("--save/--no-save", help="Whether to save the chat (it is).")] = None,
    raw: Annotated[bool | None, typer.Option("--raw/--no-raw", help="Show answers as they are written.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the answer.")] = False,
    json_stream: Annotated[
        bool, typer.Option("--json-stream", help="Print JSON objects, one a line, as the answer comes.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print where everything would go, and load nothing.")] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer, and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line on stderr for each pass.")] = False,
) -> _Action:
    """Chat with MODEL, or answer one PROMPT (or stdin) and exit."""
    parameters = locals()  # of which settings are looked up by name
    from specchat.cli import sessions
    from specchat.cli.run import run

    resumed = sessions.resumed(session, continues=continue_)
    file, aliases = settings.config_file(config)
    layers = [
        _flags(parameters, settings.RUN_KEYS),
        *sessions.layers(resumed, model and aliases.get(model, model)),
        settings.environment(),
        file,
    ]
    chosen = settings.resolve(settings.RUN_KEYS, layers, aliases)
    checked = options.RunOptions(
        models=_model_options(chosen, model=chosen.model("model"), seed=chosen.get("seed"), yes=yes, quiet=quiet),
        prompt=prompt,
        sampling=options.SamplingFlags(
            temperature=chosen.get("temperature"),
            top_p=chosen.get("top_p"),
            top_k=chosen.get("top_k"),
            min_p=chosen.get("min_p"),
            repetition_penalty=chosen.get("repetition_penalty"),
        ),
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
        resume=resumed,
        session_id=session,
        saves=chosen.get("save", True),
        keeps_history=chosen.get("history", True) and chosen.get("save", True),
        sources=chosen.sources,
    )
    return partial(run, options.check_combination(checked))


@app.command("bench")
def _bench(
    *,
    model: _Model = None,
    draft: _Draft = None,
    device: _Device = None,
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = None,
    dtype: _Dtype = None,
    quant: _Quant = None,
    draft_quant: _DraftQuant = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Questions in MT-Bench's JSONL, instead of the built-in ones.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="N", help="Ask N questions, however long; else for about two minutes.")
    ] = None,
    repeats: Annotated[str | None, typer.Option("--repeats", "-r", metavar="N", help="Measure N times (3).")] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="N", help="Longest answer (64).")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Of all draws (0).")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Compare with plain, accelerate, assisted, or none (plain)."),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Empty the page cache of the model's files before every pass.")
    ] = False,
    passes: Annotated[
        bool, typer.Option("--passes", help="Time passes by themselves, too, beside raw reads of the files.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="OPTION=A,B,C",
            help="Measure once for each value of tree-budget, vram, ctx, draft, quant, slots or memory.",
        ),
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the sweep into an .svg or .png file.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing; say how report B differs from report A."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FORM", help="table, md, json, jsonl or csv.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the report, and errors.")] = False,
) -> _Action:
    """Measure MODEL: how fast it is here, why, against what, and whether the text stays the target's own."""
    parameters = locals()
    from specchat.cli.bench import bench

    chosen = _shared_settings(config, parameters)
    checked = bench_options.BenchOptions(
        models=_model_options(chosen, model=model, seed=options.seed(seed), yes=yes, quiet=quiet),
        max_tokens=whole("--max-tokens", max_tokens, 1),
        prompts=None if prompts is None else Path(prompts).expanduser(),
        limit=whole("--limit", limit, 1),
        baselines=bench_options.baselines(baseline),
        repeats=whole("--repeats", repeats, 1),
        cold=cold,
        passes=passes,
        sweep=bench_options.sweep(sweep),
        plot=None if plot is None else Path(plot).expanduser(),
        compare=bench_options.compared(compare),
        output=bench_options.output(output, json=json),
        command=tuple(sys.argv[1:]),
    )
    return partial(bench, bench_options.check_combination(checked))


@app.command("probe")
def _probe(
    *,
    model: _Model = None,
    draft: _Draft = None,
    device: _Device = None,
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = None,
    dtype: _Dtype = None,
    quant: _Quant = None,
    draft_quant: _DraftQuant = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a bug report.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what was measured before.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every pack and check it; exit code 3 if one is damaged.")
    ] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the report, and errors.")] = False,
) -> _Action:
    """Report what this machine has and how fast it is, and the plan that MODEL would get here."""
    parameters = locals()
    from specchat.cli.probe import ProbeOptions, check_combination, probe

    chosen = _shared_settings(config, parameters)
    checked = ProbeOptions(
        models=_model_options(chosen, model=model, seed=None, yes=yes, quiet=quiet),
        json=json,
        markdown=markdown,
        refresh=refresh,
        verify=verify,
    )
    return partial(probe, check_combination(checked))


def _parse(arguments: Sequence[str]) -> int | _Action | None:
    """What was asked for, or the exit code of something that is done already, such as --help.

    Raises:
        UsageError: typer's parser makes no sense of it.
    """
    completion.prepare()
    command = typer.main.get_command(app)
    try:
        result: int | _Action | None = command.main(list(arguments), prog_name="specchat", standalone_mode=False)
    except _ParserError as error:
        raise _as_usage_error(error, arguments) from error
    return result


def _as_usage_error(error: Exception, arguments: Sequence[str]) -> UsageError:
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split()).rstrip(".")
    command = f"specchat {arguments[0]}" if arguments and arguments[0] in ("run", "bench", "probe") else "specchat"
    return UsageError(message[:1].lower() + message[1:], hint=f"{command} --help lists what there is")


def run_command_line(arguments: Sequence[str]) -> int:
    """Runs `specchat` with these arguments; the exit code."""

    def act() -> int:
        action = _parse(arguments)
        return action() if callable(action) else action or 0

    return guarded(act)


def main() -> NoReturn:
    """The `specchat` command."""
    leave(run_command_line(sys.argv[1:]))
