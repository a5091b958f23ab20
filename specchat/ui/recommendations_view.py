"""The models that this machine can run: two lines per model on the screen, one row in Markdown."""

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from specchat.planner.recommendations import READING_TOK_PER_S, Recommendation, Recommendations
from specchat.ui.placement_view import expected_hits, kept_experts
from specchat.units import format_bytes

_MOST_SHOWN = 12
_MOST_SLOW_SHOWN = 4
_INDENT = 12


def recommendation_lines(recommendations: Recommendations, flags: str) -> list[RenderableType]:
    """Return the best recommendations with command and details, then the number of the others.

    Args:
        recommendations: recommendations for this machine.
        flags: further flags of the user, appended to each command.
    """
    fast, slow = _shown(recommendations)
    lines: list[RenderableType] = [Text("What this machine can run, best first; speeds are predicted", "bold")]
    for recommendation in fast:
        lines += _lines(recommendation, flags)
    if slow:
        lines.append(Text(f"{'' if fast else 'only '}slower than reading speed ({READING_TOK_PER_S:.0f} tok/s):"))
        for recommendation in slow:
            lines += _lines(recommendation, flags)
    return [*lines, Text(_rest(recommendations, len(fast) + len(slow)), "dim")]


def recommendation_table(recommendations: Recommendations, flags: str) -> list[str]:
    """Return the best recommendations as a Markdown table, then the number of the others."""
    rows = [
        f"| {_speed(recommendation)} | `{recommendation.command}{flags}` | {_details(recommendation)} |"
        for recommendation in _both(_shown(recommendations))
    ]
    head = ["What this machine can run, best first; speeds are predicted:", ""]
    return [*head, "| tok/s | command | how |", "|---|---|---|", *rows, "", _rest(recommendations, len(rows))]


def _shown(recommendations: Recommendations) -> tuple[list[Recommendation], list[Recommendation]]:
    """Return the fast and the slow models to show: the first of each size and storage format, and all cached ones."""
    distinct, seen = list[Recommendation](), set[tuple[str, str]]()
    for each in recommendations.best:
        form = each.model.like, each.model.stored
        if each.is_cached or not each.model.like or (each.model.stored and form not in seen):
            distinct.append(each)
            seen.add(form)
    fast = [each for each in distinct if each.reads_well]
    slow = [each for each in distinct if not each.reads_well]
    return _first(fast, _MOST_SHOWN), _first(slow, _MOST_SLOW_SHOWN)


def _first(recommendations: Sequence[Recommendation], most: int) -> list[Recommendation]:
    return [recommendation for i, recommendation in enumerate(recommendations) if i < most or recommendation.is_cached]


def _both(shown: tuple[Sequence[Recommendation], Sequence[Recommendation]]) -> Iterable[Recommendation]:
    return (*shown[0], *shown[1])


def _lines(recommendation: Recommendation, flags: str) -> list[RenderableType]:
    return [
        Text.assemble((f"{_speed(recommendation):>5} tok/s ", "cyan"), (f"{recommendation.command}{flags}", "bold")),
        Padding(Text(_details(recommendation), "dim"), (0, 0, 0, _INDENT)),
    ]


def _speed(recommendation: Recommendation) -> str:
    speed = recommendation.prediction.tok_per_s
    return f"{speed:.0f}" if speed >= 20 else f"{speed:.1f}"


def _details(recommendation: Recommendation) -> str:
    plan = recommendation.plan
    weights = plan.work.dtype if plan.quant == "none" else plan.quant
    draft = "no draft" if recommendation.draft is None else f"draft {recommendation.draft.id}"
    licence = ("gated",) if recommendation.model.gated and not recommendation.is_cached else ()
    parts = (weights, _download(recommendation), _place(recommendation), f"context {plan.work.ctx:,}", draft, *licence)
    return f"{', '.join(parts)} ({recommendation.prediction.basis})"


def _download(recommendation: Recommendation) -> str:
    if recommendation.download_bytes == 0:
        return "already downloaded"
    what = " for the draft" if recommendation.is_cached else ""
    return f"{format_bytes(recommendation.download_bytes)} to download{what}"


def _place(recommendation: Recommendation) -> str:
    """Return the places of the model's layers between passes."""
    plan = recommendation.plan
    if plan.experts is not None:
        memory = "RAM" if plan.work.device == "cpu" else "VRAM"
        return f"in {memory} with {kept_experts(plan)} ({expected_hits(plan.experts)})"
    tiers = plan.placement.tiers
    on_cpu = recommendation.plan.work.device == "cpu"
    counts = {
        "in VRAM": 0 if on_cpu else tiers.count("device"),
        "in RAM": tiers.count("ram") + (tiers.count("device") if on_cpu else 0),
        "on disk": tiers.count("disk"),
    }
    places = [place for place, count in counts.items() if count]
    if len(places) == 1:
        return f"all layers {places[0]}"
    return "layers: " + " + ".join(f"{counts[place]} {place}" for place in places)


def _rest(recommendations: Recommendations, num_shown: int) -> str:
    parts = []
    if more := len(recommendations.best) - num_shown:
        parts.append(f"{more} more can run: see specchat probe --json")
    if recommendations.no_disk:
        parts.append(f"too large for the disk: {len(recommendations.no_disk)}")
    if recommendations.too_large:
        parts.append(f"too large for memory: {len(recommendations.too_large)}")
    return "; ".join(parts)
