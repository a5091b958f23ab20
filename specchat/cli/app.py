"""The command line: what can be typed, and nothing of what it does."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from specchat import __version__
from specchat.cli import bench_options, options
from specchat.cli.exit_status import guarded, leave
from specchat.errors import UsageError

# What a command returns: the work itself, done after typer is out of the way, for typer has ideas of its own about
# interrupts and closed pipes.
_Action = Callable[[], int]

# The base of all complaints of typer's parser, which has no public name; BadParameter, a direct child, has one.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="specchat",
    help="Chat, on your own GPU or none, with a language model that does not fit in its memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that several commands have, each declared once.
_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="demo, a folder (./x, /x, ~/x), or a hub id (org/name).")
]
_Draft = Annotated[str, typer.Option(metavar="MODEL", help="Small model that drafts ahead: a MODEL, auto, or none.")]
_Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
_Vram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory budget on the device, such as 900MiB or 8GiB; RAM on the CPU."),
]
_Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Host memory for streamed layers; what does not fit is read from disk."),
]
_Ctx = Annotated[str | None, typer.Option(metavar="N", help="Context: tokens of chat and answer together.")]
_TreeBudget = Annotated[str, typer.Option(metavar="N", help="Draft tokens checked in one pass, or auto.")]
_Dtype = Annotated[str, typer.Option(metavar="TYPE", help="auto, bf16, fp16 or fp32.")]
_Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Download without asking.")]


def _model_options(
    *,
    model: str | None,
    draft: str,
    device: str,
    vram: str | None,
    ram: str | None,
    ctx: str | None,
    tree_budget: str,
    dtype: str,
    seed: str | None,
    offline: bool,
    yes: bool,
    quiet: bool,
) -> options.ModelOptions:
    return options.ModelOptions(
        model=model,
        draft=draft,
        device=options.device(device),
        vram_bytes=options.size("--vram", vram),
        ram_bytes=options.size("--ram", ram),
        ctx=options.whole("--ctx", ctx, 1),
        tree_budget=options.tree_budget(tree_budget),
        dtype=options.dtype(dtype),
        seed=options.seed(seed),
        offline=offline,
        yes=yes,
        quiet=quiet,
    )


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"specchat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _specchat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
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
    draft: _Draft = "auto",
    device: _Device = "auto",
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = "auto",
    dtype: _Dtype = "auto",
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
    base: Annotated[
        bool, typer.Option("--base", help="Continue the prompt as it stands, without a chat template.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the answer.")] = False,
    json_stream: Annotated[
        bool, typer.Option("--json-stream", help="Print JSON objects, one a line, as the answer comes.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print where everything would go, and load nothing.")] = False,
    offline: _Offline = False,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer, and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line on stderr for each pass.")] = False,
) -> _Action:
    """Chat with MODEL, or answer one PROMPT (or stdin) and exit."""
    from specchat.cli.run import run

    checked = options.RunOptions(
        models=_model_options(
            model=model,
            draft=draft,
            device=device,
            vram=vram,
            ram=ram,
            ctx=ctx,
            tree_budget=tree_budget,
            dtype=dtype,
            seed=seed,
            offline=offline,
            yes=yes,
            quiet=quiet,
        ),
        prompt=prompt,
        sampling=options.sampling_flags(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        stops=options.stop_strings(stop),
        max_tokens=options.whole("--max-tokens", max_tokens, 1),
        system=options.system_prompt(system),
        base=base,
        json=json,
        json_stream=json_stream,
        plan=plan,
        verbose=verbose,
    )
    return partial(run, options.check_combination(checked))


@app.command("bench")
def _bench(
    *,
    model: _Model = None,
    draft: _Draft = "auto",
    device: _Device = "auto",
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = "auto",
    dtype: _Dtype = "auto",
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
        typer.Option(metavar="OPTION=A,B,C", help="Measure once for each value of tree-budget, vram, ctx or draft."),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing; say how report B differs from report A."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FORM", help="table, md, json, jsonl or csv.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    offline: _Offline = False,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the report, and errors.")] = False,
) -> _Action:
    """Measure MODEL: how fast it is here, why, against what, and whether the text stays the target's own."""
    from specchat.cli.bench import bench

    checked = bench_options.BenchOptions(
        models=_model_options(
            model=model,
            draft=draft,
            device=device,
            vram=vram,
            ram=ram,
            ctx=ctx,
            tree_budget=tree_budget,
            dtype=dtype,
            seed=seed,
            offline=offline,
            yes=yes,
            quiet=quiet,
        ),
        max_tokens=options.whole("--max-tokens", max_tokens, 1),
        prompts=None if prompts is None else Path(prompts).expanduser(),
        limit=options.whole("--limit", limit, 1),
        baselines=bench_options.baselines(baseline),
        repeats=options.whole("--repeats", repeats, 1),
        cold=cold,
        passes=passes,
        sweep=bench_options.sweep(sweep),
        compare=bench_options.compared(compare),
        output=bench_options.output(output, json=json),
        command=tuple(sys.argv[1:]),
    )
    return partial(bench, bench_options.check_combination(checked))


@app.command("probe")
def _probe(
    *,
    model: _Model = None,
    draft: _Draft = "auto",
    device: _Device = "auto",
    vram: _Vram = None,
    ram: _Ram = None,
    ctx: _Ctx = None,
    tree_budget: _TreeBudget = "auto",
    dtype: _Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a bug report.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what was measured before.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every pack and check it; exit code 3 if one is damaged.")
    ] = False,
    offline: _Offline = False,
    yes: _Yes = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the report, and errors.")] = False,
) -> _Action:
    """Report what this machine has and how fast it is, and the plan that MODEL would get here."""
    from specchat.cli.probe import ProbeOptions, check_combination, probe

    checked = ProbeOptions(
        models=_model_options(
            model=model,
            draft=draft,
            device=device,
            vram=vram,
            ram=ram,
            ctx=ctx,
            tree_budget=tree_budget,
            dtype=dtype,
            seed=None,
            offline=offline,
            yes=yes,
            quiet=quiet,
        ),
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
