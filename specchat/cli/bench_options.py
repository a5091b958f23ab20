"""Options of `specchat bench`. Every value is checked before slow work begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specchat.chat.settings import whole
from specchat.cli.options import tree_budget
from specchat.errors import UsageError
from specchat.loading.request import ModelRequest
from specchat.loading.torchrun import find_ranks

Format = Literal["table", "md", "json", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("table", "md", "json", "jsonl", "csv")
LAYERS = "layers"
LLAMA_BASELINES = ("llama.cpp", "llama.cpp-ngram", "llama.cpp-draft")
BASELINES = ("plain", LAYERS, "accelerate", "assisted", *LLAMA_BASELINES)
# "memory" varies the tree size but keeps the layer split of the first value, so only generation memory changes.
SWEEPS = ("tree-budget", "vram", "ctx", "draft", "quant", "slots", "memory")
_WHOLE_HEAD = "+head"  # suffix of a tree budget: score all nodes at once


@dataclass(frozen=True)
class BenchOptions:
    """Checked options of `specchat bench`.

    Attributes:
        models: options about models, memory and device, as for `run`.
        seed: seed of the sampling, or None for 0.
        yes: whether to download without asking.
        quiet: whether only the report and errors are shown.
        max_tokens: longest answer in tokens; None for 64.
        prompts: file of questions, or None for the built-in ones.
        limit: number of questions; None for as many as two minutes allow.
        baselines: names of the baselines; None for `plain`, or for no baseline in a sweep.
        repeats: number of repetitions; None for 3.
        cold: whether to measure with an empty page cache.
        passes: whether to time single passes too; `cold` always does.
        sweep: swept option and its values; None for no sweep.
        plot: image file to draw the sweep into, or None.
        compare: two reports to compare instead of measuring.
        batches: numbers of answers that share a pass, or None to measure one answer at a time.
        limit_memory: limit of memory and page cache of each system, in bytes; None for no limit.
        output: format of the report.
        command: command line as typed, without the program's name.
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
    batches: tuple[int, ...] | None = None
    limit_memory: int | None = None
    output: Format = "table"
    command: tuple[str, ...] = ()


def check_combination(options: BenchOptions) -> BenchOptions:
    """Refuse flags that contradict each other, and return the options unchanged.

    Raises:
        UsageError: two flags contradict each other, or a flag has no effect.
    """
    _check_workers(options)
    if options.compare is not None and options.output in ("jsonl", "csv"):
        raise UsageError(f"--compare cannot be printed as {options.output}", hint="use -o table, md or json")
    if options.compare is not None and options.models.model is not None:
        raise UsageError("--compare measures nothing, so it takes no MODEL", hint="leave MODEL out")
    for flag, given in (("--cold", options.cold), ("--passes", options.passes)):
        if options.sweep is not None and given:
            raise UsageError(f"{flag} and --sweep cannot be combined", hint=f"leave {flag} or --sweep out")
    if options.cold and any(name in LLAMA_BASELINES for name in options.baselines or ()):
        raise UsageError("--cold cannot be combined with llama.cpp, whose passes run in another program")
    if options.batches is not None:
        _check_batches(options)
    if options.plot is not None and options.sweep is None:
        raise UsageError("--plot draws a sweep", hint="add --sweep OPTION=A,B,C")
    return options


def _check_workers(options: BenchOptions) -> None:
    """Refuse what cannot be measured with layers on other machines, whether they were named or torchrun starts them.

    Raises:
        UsageError: a flag that concerns this machine alone.
    """
    if options.models.workers is None and find_ranks() is None:
        return
    for flag, given in (("--cold", options.cold), ("--limit-memory", options.limit_memory is not None)):
        if given:
            raise UsageError(f"{flag} does not reach workers", hint=f"leave {flag} out, or measure without workers")


def _check_batches(options: BenchOptions) -> None:
    given = {
        "--cold": options.cold,
        "--passes": options.passes,
        "--sweep": options.sweep is not None,
        "--compare": options.compare is not None,
        "--limit-memory": options.limit_memory is not None,
        "--baseline": options.baselines not in (None, ("plain",)),
    }
    for flag, is_given in given.items():
        if is_given:
            raise UsageError(f"--batch and {flag} cannot be combined", hint=f"leave --batch or {flag} out")
    if options.output in ("jsonl", "csv"):
        raise UsageError(f"--batch cannot be printed as {options.output}", hint="use -o table, md or json")


def batches(text: str | None) -> tuple[int, ...] | None:
    """Parse the numbers of answers that share a pass, such as 1,4,10."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(whole("--batch", each.strip(), 1) or 1 for each in text.split(",")))
    return tuple(sorted(found))


def output(text: str | None, *, json: bool) -> Format:
    """Return the format of the report."""
    if json and text not in (None, "json"):
        raise UsageError(f"--json and -o {text} cannot be combined", hint=f"leave --json or -o {text} out")
    if json or text is None:
        return "json" if json else "table"
    for name in FORMATS:
        if text == name:
            return name
    raise UsageError(f"--output must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, not '{text}'")


def baselines(text: str | None) -> tuple[str, ...] | None:
    """Parse a list of baselines and drop repeated names; "none" gives an empty tuple."""
    if text is None or text == "none":
        return None if text is None else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"'{name}' is not a baseline", hint=f"--baseline takes {', '.join(BASELINES)} or none")
    return names


def sweep(text: str | None) -> tuple[str, tuple[str, ...]] | None:
    """Parse a sweep into the option and its values; the values are checked later, by that option."""
    if text is None:
        return None
    name, _, rest = text.removeprefix("--").partition("=")
    values = tuple(dict.fromkeys(value.strip() for value in rest.split(",") if value.strip()))
    if name not in SWEEPS or not values:
        raise UsageError(f"--sweep cannot vary '{text}'", hint=f"write OPTION=A,B,C with one of {', '.join(SWEEPS)}")
    return name, values


def trees(value: str) -> tuple[int, int | None]:
    """Parse a value of `--sweep memory` into a tree budget and the rows of the head (None for the usual number).

    Raises:
        UsageError: the value is not N or N+head.
    """
    budget = tree_budget("--sweep memory", value.removesuffix(_WHOLE_HEAD))
    if budget is None:
        raise UsageError("--sweep memory takes tree sizes, not 'auto'")
    return budget, 1 + budget if value.endswith(_WHOLE_HEAD) else None


def compared(paths: tuple[str, str] | None) -> tuple[Path, Path] | None:
    """Return the paths of the two reports, or None."""
    return None if paths is None else (Path(paths[0]), Path(paths[1]))
