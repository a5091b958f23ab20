"""Generation memory against speed over the points of a sweep (SpecMemo, arXiv 2506.01986).

Generation memory is all device memory except the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specchat.bench import summary
from specchat.bench.records import OWN
from specchat.bench.report import Outcome


@dataclass(frozen=True)
class CountedOutcome(Outcome):
    """An outcome with its generation memory.

    Attributes:
        generation_peak_bytes: peak generation memory of a short answer, or None if it was not counted.
    """

    generation_peak_bytes: int | None = None


def generation_object(outcome: CountedOutcome, first: CountedOutcome) -> dict[str, Any]:
    """Return a point's generation memory and speed, with their ratios to the first point's."""
    ours, theirs = outcome.measurement.of(OWN), first.measurement.of(OWN)
    speed = summary.speedup(ours, theirs)
    return {
        "planned_bytes": outcome.plan.generation_bytes,
        "peak_bytes": outcome.generation_peak_bytes,
        "share_of_first": outcome.plan.generation_bytes / first.plan.generation_bytes,
        "speed_over_first": None if speed is None else asdict(speed),
    }
