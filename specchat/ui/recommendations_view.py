"""The models that this machine can run: two lines per model on the screen, one row in Markdown."""

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from specchat.planner.recommendations import READING_TOK_PER_S, Recommendation, Recommendations
from specchat.units import format_bytes

_MOST_SHOWN = 12
_MOST_SLOW_SHOWN = 4
_INDENT = 12


def offer_lines(offers: Recommendations, flags: str) -> list[RenderableType]:
    """Return the best recommendations with command and details, then the number of the others.

    Args:
        offers: recommendations for this machine.
        flags: further flags of the user, appended to each command.
    """
    fast, slow = _shown(offers)
    lines: list[RenderableType] = [Text("What this machine can run, best first; speeds are predicted", "bold")]
    for offer in fast:
        lines += _offer_lines(offer, flags)
    if slow:
        lines.append(Text(f"{'also' if fast else 'only'} slower than reading speed ({READING_TOK_PER_S:.0f} tok/s):"))
        for offer in slow:
            lines += _offer_lines(offer, flags)
    return [*lines, Text(_rest(offers, len(fast) + len(slow)), "dim")]


def offer_table(offers: Recommendations, flags: str) -> list[str]:
    """Return the best recommendations as a Markdown table, then the number of the others."""
    rows = [f"| {_speed(offer)} | `{offer.command}{flags}` | {_details(offer)} |" for offer in _both(_shown(offers))]
    head = ["What this machine can run, best first; speeds are predicted:", ""]
    return [*head, "| tok/s | command | how |", "|---|---|---|", *rows, "", _rest(offers, len(rows))]


def _shown(offers: Recommendations) -> tuple[list[Recommendation], list[Recommendation]]:
    """Return the fast and the slow models to show: the first of each size and storage format, and all cached ones."""
    distinct = [each for each in offers.best if each.is_cached or each.model.stored or not each.model.like]
    fast = [each for each in distinct if each.reads_well]
    slow = [each for each in distinct if not each.reads_well]
    return _first(fast, _MOST_SHOWN), _first(slow, _MOST_SLOW_SHOWN)


def _first(offers: Sequence[Recommendation], most: int) -> list[Recommendation]:
    return [offer for i, offer in enumerate(offers) if i < most or offer.is_cached]


def _both(shown: tuple[Sequence[Recommendation], Sequence[Recommendation]]) -> Iterable[Recommendation]:
    return (*shown[0], *shown[1])


def _offer_lines(offer: Recommendation, flags: str) -> list[RenderableType]:
    return [
        Text.assemble((f"{_speed(offer):>5} tok/s ", "cyan"), (f"{offer.command}{flags}", "bold")),
        Padding(Text(_details(offer), "dim"), (0, 0, 0, _INDENT)),
    ]


def _speed(offer: Recommendation) -> str:
    speed = offer.prediction.tok_per_s
    return f"{speed:.0f}" if speed >= 20 else f"{speed:.1f}"


def _details(offer: Recommendation) -> str:
    plan = offer.plan
    weights = plan.work.dtype if plan.quant == "none" else plan.quant
    draft = "no draft" if offer.draft is None else f"draft {offer.draft.id}"
    licence = ("gated",) if offer.model.gated and not offer.is_cached else ()
    parts = (weights, _download(offer), _place(offer), f"context {plan.work.ctx:,}", draft, *licence)
    return f"{', '.join(parts)} ({offer.prediction.basis})"


def _download(offer: Recommendation) -> str:
    if offer.download_bytes == 0:
        return "already downloaded"
    what = " for the draft" if offer.is_cached else ""
    return f"{format_bytes(offer.download_bytes)} to download{what}"


def _place(offer: Recommendation) -> str:
    """Return the places of the model's layers between passes."""
    tiers = offer.plan.placement.tiers
    on_cpu = offer.plan.work.device == "cpu"
    counts = {
        "in VRAM": 0 if on_cpu else tiers.count("device"),
        "in RAM": tiers.count("ram") + (tiers.count("device") if on_cpu else 0),
        "on disk": tiers.count("disk"),
    }
    places = [place for place, count in counts.items() if count]
    if len(places) == 1:
        return f"all layers {places[0]}"
    return "layers: " + " + ".join(f"{counts[place]} {place}" for place in places)


def _rest(offers: Recommendations, num_shown: int) -> str:
    parts = []
    if more := len(offers.best) - num_shown:
        parts.append(f"{more} more can run: see specchat probe --json")
    if offers.no_disk:
        parts.append(f"too large for the disk: {len(offers.no_disk)}")
    if offers.too_large:
        parts.append(f"too large for memory: {len(offers.too_large)}")
    return "; ".join(parts)
