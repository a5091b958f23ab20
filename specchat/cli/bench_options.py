"""What `specchat bench` was asked for: every flag checked, before anything slow begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specchat.cli.options import tree_budget
from specchat.errors import NotAvailableError, UsageError
from specchat.loading.request import ModelRequest

Format = Literal["table", "md", "json", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("table", "md", "json", "jsonl", "csv")
BASELINES = ("plain", "accelerate", "assisted")
# memory: smaller trees on the layers of the first value's plan, so that nothing but generation memory changes.
SWEEPS = ("tree-budget", "vram", "ctx", "draft", "quant", "slots", "memory")
_WHOLE_HEAD = "+head"  # behind a tree budget: all nodes are scored at once


@dataclass(frozen=True)
class BenchOptions:
    """Everything `specchat bench` can be told, checked.

    Attributes:
        models: which models, memory and the like, as for `run`.
        seed: key of the draws, or None for 0.
        yes: whether to download without asking.
        quiet: whether only the report and errors are shown.
        max_tokens: longest answer; None is 64.
        prompts: a file of questions, or None for the built-in ones.
        limit: questions asked; None for as many as there is time for.
        baselines: names; None is `plain`, or nothing in a sweep.
        repeats: None is 3.
        cold: measure from an empty page cache.
        passes: time passes by themselves, too; `cold` does so anyway.
        sweep: the option that is varied, and its values; None for no sweep.
        plot: a picture to draw of the sweep, or None.
        compare: two reports to compare, in place of a measurement.
        output: form of the report.
        command: as typed, without the program's name.
    """

    models: ModelRequest
    seed: int | None = None
    yes: bool = False
    quiet: bool = False
    max_tokens: int | None = None
    prompts: Path | None = None
    limit: int | None = None
    baselines: tuple[str, ...] | None = None
    repeats: int | None = None
    cold: bool = False
    passes: bool = False
    sweep: tuple[str, tuple[str, ...]] | None = None
    plot: Path | None = None
    compare: tuple[Path, Path] | None = None
    output: Format = "table"
    command: tuple[str, ...] = ()


def check_combination(options: BenchOptions) -> BenchOptions:
    """Refuses flags that contradict each other.

    Raises:
        UsageError: two of them do, or there is nothing to be done.
    """
    if options.compare is not None and options.output in ("jsonl", "csv"):
        raise UsageError(f"--compare cannot be printed as {options.output}", hint="use -o table, md or json")
    if options.compare is not None and options.models.model is not None:
        raise UsageError("--compare measures nothing, so it takes no MODEL", hint="leave MODEL out")
    for flag, given in (("--cold", options.cold), ("--passes", options.passes)):
        if options.sweep is not None and given:
            raise UsageError(f"{flag} and --sweep cannot be combined", hint=f"leave {flag} or --sweep out")
    if options.plot is not None and options.sweep is None:
        raise UsageError("--plot draws a sweep", hint="add --sweep OPTION=A,B,C")
    return options


def output(text: str | None, *, json: bool) -> Format:
    """The form of the report."""
    if json and text not in (None, "json"):
        raise UsageError(f"--json and -o {text} cannot be combined", hint=f"leave --json or -o {text} out")
    if json or text is None:
        return "json" if json else "table"
    for name in FORMATS:
        if text == name:
            return name
    raise UsageError(f"--output must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, not '{text}'")


def baselines(text: str | None) -> tuple[str, ...] | None:
    """The baselines' names, each once; "none" is no baseline."""
    if text is None or text == "none":
        return None if text is None else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name == "llama.cpp":
            raise NotAvailableError(
                "the baseline 'llama.cpp' runs GGUF models, which this version does not read",
                hint=f"--baseline takes {', '.join(BASELINES)} or none",
            )
        if name not in BASELINES:
            raise UsageError(f"'{name}' is not a baseline", hint=f"--baseline takes {', '.join(BASELINES)} or none")
    return names


def sweep(text: str | None) -> tuple[str, tuple[str, ...]] | None:
    """The swept option and its values, which are checked as that option's own."""
    if text is None:
        return None
    name, _, rest = text.removeprefix("--").partition("=")
    values = tuple(dict.fromkeys(value.strip() for value in rest.split(",") if value.strip()))
    if name not in SWEEPS or not values:
        raise UsageError(f"--sweep cannot vary '{text}'", hint=f"write OPTION=A,B,C with one of {', '.join(SWEEPS)}")
    return name, values


def trees(value: str) -> tuple[int, int | None]:
    """Tree budget and rows of the head (None: as always) of a value of `--sweep memory`.

    Raises:
        UsageError: it is not N or N+head.
    """
    budget = tree_budget("--sweep memory", value.removesuffix(_WHOLE_HEAD))
    if budget is None:
        raise UsageError("--sweep memory takes sizes of trees, not 'auto'")
    return budget, 1 + budget if value.endswith(_WHOLE_HEAD) else None


def compared(paths: tuple[str, str] | None) -> tuple[Path, Path] | None:
    """The two reports."""
    return None if paths is None else (Path(paths[0]), Path(paths[1]))
