"""What generating takes beside weights, and how fast it is, from point to point of a sweep (arXiv 2506.01986)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specchat.bench import summary
from specchat.bench.records import OWN
from specchat.bench.report import Outcome


@dataclass(frozen=True)
class CountedOutcome(Outcome):
    """An outcome with its memory counted.

    Attributes:
        generation_peak_bytes: the most that a short answer took beside weights, or None if that was not counted.
    """

    generation_peak_bytes: int | None = None


def generation_object(outcome: CountedOutcome, first: CountedOutcome) -> dict[str, Any]:
    """A point's generation memory and speed, beside those of the first one."""
    ours, theirs = outcome.measurement.of(OWN), first.measurement.of(OWN)
    speed = summary.speedup(ours, theirs)
    return {
        "planned_bytes": outcome.plan.generation_bytes,
        "peak_bytes": outcome.generation_peak_bytes,
        "share_of_first": outcome.plan.generation_bytes / first.plan.generation_bytes,
        "speed_over_first": None if speed is None else asdict(speed),
    }
