"""The command line: commands, arguments and options. The work itself is done elsewhere."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from specchat.chat.settings import whole
from specchat.cli import bench_options, completion, options, settings
from specchat.cli.exit_status import guarded, leave
from specchat.cli.settings import Settings
from specchat.errors import UsageError
from specchat.loading.request import ModelRequest
from specchat.loading.sampling import SamplingChoices
from specchat.models.catalog.suggest import looks_like_prompt
from specchat.records.model import QUANTS
from specchat.records.plan import PlanChoices
from specchat.version import __version__

# What a command returns: its work, to be called after typer has returned. Typer handles interrupts and closed pipes in
# its own way, which must not apply to the work.
_Action = Callable[[], int]

# Base class of all errors of typer's parser. The class has no public name, but its direct subclass BadParameter has.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="specchat",
    help="Chat with a language model that is larger than your GPU's memory.",
    add_completion=False,  # see completion.py
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Commands of similar tools, and what does the same here.
_ELSEWHERE = {
    **dict.fromkeys(("list", "ls", "models"), "`specchat run` without MODEL lists the models on this disk"),
    **dict.fromkeys(("pull", "download", "get"), "`specchat run MODEL` downloads a missing model after asking"),
    **dict.fromkeys(("rm", "remove", "delete"), "models lie in the cache of the hub: `hf cache rm` removes them"),
    **dict.fromkeys(("show", "info"), "`specchat probe MODEL` shows the plan and the speed of a model"),
    **dict.fromkeys(("chat", "generate", "start"), "`specchat run MODEL` starts a chat"),
    "serve": "this version has no server; `specchat run MODEL` starts a chat",
    "help": "`specchat --help` lists the commands",
    "version": "`specchat --version` prints the version",
}

# Options that several commands share.
_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completion.models,
        help="demo, a folder (./x, /x, ~/x), a hub id (org/name) or shape:NAME.",
    ),
]
_Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        autocompletion=completion.drafts,
        help="Draft model: a MODEL, auto or none. [default: auto]",
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        autocompletion=completion.words("auto", "cpu", "cuda"),
        help="Compute device: auto, cpu, cuda or cuda:N. [default: auto]",
    ),
]
_Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Device memory to use, for example 8GiB; RAM on the CPU. [default: free memory minus a reserve]",
    ),
]
_Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Host memory for streamed layers; the rest is read from disk. [default: free memory minus a reserve]",
    ),
]
_Ctx = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Context length in tokens, answers included. [default: 8192, or less if memory is short]"
    ),
]
_TreeBudget = Annotated[
    str | None, typer.Option(metavar="N", help="Most draft tokens that one pass checks, or auto. [default: auto]")
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words(*options.DTYPES),
        help="Precision of the computation: auto, bf16, fp16 or fp32. [default: auto]",
    ),
]
_Quant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="Quantize the model: auto, none, int8 or int4. [default: auto]",
    ),
]
_DraftQuant = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        autocompletion=completion.words("auto", *QUANTS),
        help="Quantize the draft; the text stays the same. [default: auto]",
    ),
]
_Config = Annotated[
    str | None, typer.Option(metavar="FILE", help="Read settings from FILE. [default: ~/.config/specchat/config.toml]")
]
_Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Download without asking.")]


def _shared_settings(config: str | None, parameters: Mapping[str, Any]) -> Settings:
    """Return the shared settings. Flags override the environment, and the environment overrides config.toml.

    Args:
        config: value of --config, or None.
        parameters: parameters of the command, by name.
    """
    file, aliases = settings.config_file(config)
    layers = [_flags(parameters, settings.SHARED_KEYS), settings.environment(), file]
    return settings.resolve(settings.SHARED_KEYS, layers, aliases)


def _flags(parameters: Mapping[str, Any], keys: Sequence[settings.Key]) -> settings.Layer:
    """Return the parameters that are settings, as a layer."""
    return settings.flags({key.name: parameters[key.name] for key in keys if key.name in parameters})


def _model_request(chosen: Settings, model: str | None) -> ModelRequest:
    return ModelRequest(
        model=model if model is None else chosen.aliases.get(model, model),
        draft=chosen.model("draft") or "auto",
        choices=PlanChoices(
            device=chosen.get("device", "auto"),
            dtype=chosen.get("dtype", "auto"),
            vram_bytes=chosen.get("vram"),
            ram_bytes=chosen.get("ram"),
            ctx=chosen.get("ctx"),
            tree_budget=chosen.get("tree_budget"),
            quant=chosen.get("quant", "auto"),
            draft_quant=chosen.get("draft_quant", "auto"),
        ),
        offline=chosen.get("offline", False),
        aliases=tuple(chosen.aliases),
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
    model: _Model = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Answer PROMPT and exit; without PROMPT, chat.")
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
    temperature: Annotated[
        str | None,
        typer.Option(metavar="T", help="Sampling temperature; 0 is greedy. [default: the model's, else 0]"),
    ] = None,
    top_p: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Sample from the likeliest tokens with total probability P. [default: the model's, else 1]",
        ),
    ] = None,
    top_k: Annotated[
        str | None,
        typer.Option(
            metavar="K", help="Sample from the K likeliest tokens; 0 keeps all. [default: the model's, else 0]"
        ),
    ] = None,
    min_p: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Drop tokens less likely than P times the likeliest one. [default: the model's, else 0]",
        ),
    ] = None,
    repetition_penalty: Annotated[
        str | None,
        typer.Option(metavar="R", help="Values above 1 make repetition less likely. [default: the model's, else 1]"),
    ] = None,
    seed: Annotated[
        str | None, typer.Option(metavar="N", help="Seed of the sampling, to repeat an answer. [default: random]")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Longest answer in tokens. [default: what the context allows]")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before TEXT; may be repeated. [default: none]"),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT|@FILE", help="System prompt, or @ and the file with it. [default: none]"),
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Turn thinking on or off, if the chat template can. [default: as the template sets it]",
        ),
    ] = None,
    overflow: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            autocompletion=completion.words(*options.OVERFLOWS),
            help="When the context is full: stop or drop-oldest. [default: stop]",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Continue the prompt without a chat template, for base models.")
    ] = False,
    continue_: Annotated[bool, typer.Option("--continue", "-c", help="Resume the last saved chat.")] = False,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            autocompletion=completion.sessions,
            help="Resume the chat with this name, or start one. [default: a new name]",
        ),
    ] = None,
    save: Annotated[
        bool | None, typer.Option("--save/--no-save", help="Save the chat, or do not. [default: save]")
    ] = None,
    raw: Annotated[
        bool | None, typer.Option("--raw/--no-raw", help="Show answers without Markdown layout. [default: no-raw]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the answer.")] = False,
    json_stream: Annotated[
        bool, typer.Option("--json-stream", help="Print one JSON object per line while the answer is written.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan and its predicted speed; load nothing.")] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print one line for each pass, on stderr.")] = False,
) -> _Action:
    """Chat with MODEL, or answer one PROMPT and exit."""
    parameters = locals()  # settings are looked up here by name
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
        models=_model_request(chosen, chosen.model("model")),
        seed=chosen.get("seed"),
        yes=yes,
        quiet=quiet,
        prompt=prompt,
        sampling=SamplingChoices(
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
        str | None,
        typer.Option(metavar="FILE", help="Questions as JSON lines, as in MT-Bench. [default: built-in questions]"),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(metavar="N", help="Ask N questions. [default: as many as two minutes allow]"),
    ] = None,
    repeats: Annotated[
        str | None, typer.Option("--repeats", "-r", metavar="N", help="Measure N times. [default: 3]")
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="N", help="Longest answer in tokens. [default: 64]")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seed of the sampling. [default: 0]")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Compare with plain, accelerate, assisted, or none. [default: plain]"),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the model's files from the page cache before every pass.")
    ] = False,
    passes: Annotated[
        bool, typer.Option("--passes", help="Also time single passes, and raw reads of the model's files.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="OPTION=A,B,C",
            help="Measure each value of tree-budget, vram, ctx, draft, quant, slots or memory. [default: none]",
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the sweep into an .svg or .png file. [default: none]")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A.json B.json", help="Compare two reports; measure nothing. [default: none]"),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FORM", help="Report format: table, md, json, jsonl or csv. [default: table]"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; short for -o json.")] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report and errors.")] = False,
) -> _Action:
    """Measure how fast MODEL is and check that its text is exact."""
    parameters = locals()
    from specchat.cli.bench import bench

    chosen = _shared_settings(config, parameters)
    checked = bench_options.BenchOptions(
        models=_model_request(chosen, model),
        seed=options.seed(seed),
        yes=yes,
        quiet=quiet,
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
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a bug report.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of using saved rates.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every pack against its checksums; exit 3 if one is damaged.")
    ] = False,
    config: _Config = None,
    offline: _Offline = None,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report and errors.")] = False,
) -> _Action:
    """Report what this machine can run, or the plan for MODEL."""
    parameters = locals()
    from specchat.cli.probe import ProbeOptions, check_combination, probe

    chosen = _shared_settings(config, parameters)
    checked = ProbeOptions(
        models=_model_request(chosen, model),
        yes=yes,
        quiet=quiet,
        json=json,
        markdown=markdown,
        refresh=refresh,
        verify=verify,
    )
    return partial(probe, check_combination(checked))


def _parse(arguments: Sequence[str]) -> int | _Action | None:
    """Parse the arguments. Return the work to do, or the exit code of work already done, such as --help.

    Raises:
        UsageError: typer's parser rejects the arguments.
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
    if message.startswith("No such command") and (hint := _command_hint(arguments)):
        return UsageError(f"there is no command '{arguments[0]}'", hint=hint)
    command = f"specchat {arguments[0]}" if arguments and arguments[0] in ("run", "bench", "probe") else "specchat"
    return UsageError(message[:1].lower() + message[1:], hint=f"{command} --help lists what it takes")


def _command_hint(arguments: Sequence[str]) -> str | None:
    """Return the hint for a model, a prompt or another tool's command in a command's place; None for other words."""
    word = arguments[0]
    if word == "demo" or "/" in word:
        return f"did you mean specchat run {shlex.quote(word)}?"
    return "usage: specchat run MODEL [PROMPT]" if looks_like_prompt(word) else _ELSEWHERE.get(word)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run `specchat` with these arguments and return the exit code."""

    def act() -> int:
        action = _parse(arguments)
        return action() if callable(action) else action or 0

    return guarded(act)


def main() -> NoReturn:
    """Run the `specchat` command and end the process."""
    leave(run_command_line(sys.argv[1:]))
