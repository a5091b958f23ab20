"""Plots of sweeps: speed, tokens per pass and seconds per pass over the swept option.

Over the tree budget this is SpecExec's curve (arXiv 2406.02532), over generation memory SpecMemo's (arXiv 2506.01986).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from specchat.bench.tables import temperature_label
from specchat.errors import NotAvailableError, SpecchatError, UsageError
from specchat.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")

_AXES = {
    "tree-budget": "tree budget (nodes)",
    "vram": "device memory budget",  # its values include their units
    "ctx": "context (tokens)",
    "slots": "slots (layers)",
    "draft": "draft",
    "quant": "quantization",
    "memory": "memory without weights (MiB)",
}
_DOUBLING = ("tree-budget", "ctx", "memory")  # options with a logarithmic axis
_KINDS = ("draft", "quant")  # options without an order: no line joins their points
_MARKS = ("o", "s", "^", "d")
_LINES = ("-", "--", ":", "-.")
_APART = 0.06  # horizontal distance of two temperatures at one value
_CAP_POINTS = 3
_TITLE_WIDTH = 72  # names of shapes are long and have no spaces
_INCHES = (6.4, 8.0)
_DOTS_PER_INCH = 150


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written, before anything is measured.

    Raises:
        UsageError: the file is neither .svg nor .png, or its folder does not exist.
        NotAvailableError: matplotlib is not installed.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise UsageError(f"--plot draws .svg or .png, not '{path.name}'")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot cannot write {path}: the folder {path.parent} does not exist")
    if find_spec("matplotlib") is None:
        raise NotAvailableError("--plot needs matplotlib, which is not installed", "run pip install 'specchat[plot]'")


def plot_sweep(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report's sweep into a file, in the format of its suffix.

    Raises:
        SpecchatError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sweep = report["sweep"]
    places = _places(sweep)
    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    speed, tokens, seconds = figure.subplots(3, 1, sharex=True)
    _draw(speed, sweep, places, "tok_per_s", "tok/s")
    _draw(tokens, sweep, places, "tokens_per_step", "tokens per pass")
    _draw(seconds, sweep, places, "pass_s", "seconds per pass")
    seconds.set_xlabel(_AXES[sweep["option"]])
    _mark_values(seconds, sweep, places)
    speed.legend(frameon=False)
    figure.suptitle(_title(report), fontsize="medium", x=0.01, ha="left")
    try:
        with rc_context({"svg.fonttype": "none"}):  # text stays text, for search and screen readers
            figure.savefig(path)
    except OSError as error:
        raise SpecchatError(f"cannot write {path}: {error.strerror}") from error


def _places(sweep: Mapping[str, Any]) -> list[float]:
    """Return the position of each value on the axis."""
    points = sweep["points"]
    match sweep["option"]:
        case "vram":
            return [point["plan"]["device_budget_bytes"] / GIB for point in points]
        case "memory":
            return [point["plan"]["generation_bytes"] / MIB for point in points]
        case "tree-budget":
            return [float(point["plan"]["tree_budget"]) for point in points]
        case "ctx" | "slots":
            return [float(point["value"]) for point in points]
    return [float(number) for number in range(len(points))]


def _draw(axes: Axes, sweep: Mapping[str, Any], places: Sequence[float], key: str, label: str) -> None:
    """Draw one figure over the option: a line for each temperature, with the standard deviation over answers."""
    entries = [point["summary"]["by_temperature"] for point in sweep["points"]]
    temperatures = sorted({entry["temperature"] for point in entries for entry in point})
    is_kind = sweep["option"] in _KINDS
    for number, temperature in enumerate(temperatures):
        mark, line = _MARKS[number % len(_MARKS)], "" if is_kind else _LINES[number % len(_LINES)]
        dots = sorted(
            (place + number * _APART * is_kind, *_mean_and_sd(entry[key]))
            for place, point in zip(places, entries, strict=True)
            for entry in point
            if entry["temperature"] == temperature and _mean_and_sd(entry[key])[0] is not None
        )
        if dots:
            x, y, sd = zip(*dots, strict=True)
            spread = [each or 0.0 for each in sd]
            axes.errorbar(x, y, spread, fmt=mark + line, capsize=_CAP_POINTS, label=temperature_label(temperature))
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _mean_and_sd(figure: Mapping[str, Any] | float | None) -> tuple[float | None, float | None]:
    return (figure["mean"], figure["sd"]) if isinstance(figure, Mapping) else (figure, None)


def _mark_values(axes: Axes, sweep: Mapping[str, Any], places: Sequence[float]) -> None:
    """Label the axis with the measured values as they were typed, and with nothing between them."""
    if sweep["option"] in _DOUBLING:
        axes.set_xscale("log", base=2)
    labels = [point["value"] for point in sweep["points"]]
    if sweep["option"] == "memory":  # large trees need far more, so the labels of small ones are close
        labels = [f"{place:,.0f} ({label})" for place, label in zip(places, labels, strict=True)]
        axes.tick_params(axis="x", rotation=60)
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", which="minor", bottom=False)


def _title(report: Mapping[str, Any]) -> str:
    machine, plan = report["machine"], report["plan"]
    where = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]["name"]
    return f"{fill(report['model'], _TITLE_WIDTH)}\n{plan['dtype']} on {where}"
