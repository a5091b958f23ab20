"""Statistics of experts on this machine: how often passes used each expert of a model, and how many they had to read.

One small file for each model in the state folder, replaced atomically. It only improves what is kept in memory at first
and what is predicted, so a damaged file is just a warning.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specchat.files import atomic_write_text, read_regular
from specchat.planner.experts import NOTHING_LEARNT, ExpertTier, LearntExperts
from specchat.records.generation import Step
from specchat.records.plan import Plan

_VERSION = 1
_FOLDER = "experts"
# Fewer than _ENOUGH_PASSES passes of about as many rows correct no prediction. Sums of more than _MOST_PASSES are
# halved: recent answers count most.
_ENOUGH_PASSES = 30
_MOST_PASSES = 2000
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

# Sums over passes of about as many rows: passes, rows, used experts of a layer and expected ones, missed experts of a
# layer and expected ones.
_Sums = tuple[float, ...]
_NONE: _Sums = (0.0,) * 6


@dataclass(frozen=True)
class ExpertStatistics:
    """Contents of a model's file.

    Attributes:
        passes: number of passes that were counted.
        counts: passes that used each expert, by layer with experts.
        sums: sums over passes, by the number of bits of their rows.
    """

    passes: float = 0.0
    counts: tuple[tuple[float, ...], ...] = ()
    sums: Mapping[str, _Sums] = field(default_factory=dict)

    def learnt(self) -> LearntExperts:
        """Return the share of passes that use each expert, and corrections where enough passes were counted."""
        factors = {}
        for passes, rows, used, expected_used, missed, expected_missed in self.sums.values():
            if passes >= _ENOUGH_PASSES:
                factors[rows / passes] = used / expected_used, max(missed, 1.0) / max(expected_missed, 1.0)
        uses = tuple(tuple(count / self.passes for count in own) for own in self.counts) if self.passes else ()
        return LearntExperts(uses, dict(sorted(factors.items())))


def load_experts(folder: Path, target: str, warn: Callable[[str], None] = lambda _: None) -> LearntExperts:
    """Load what earlier passes of a model have shown; nothing if the file is missing or damaged.

    Args:
        folder: the state folder.
        target: name of the model.
        warn: receives one line about a damaged file.
    """
    path = _path(folder, target)
    try:
        return _read(path).learnt()
    except FileNotFoundError:
        return NOTHING_LEARNT
    except _UNREADABLE:
        warn(f"cannot read {path}: experts are chosen without the statistics of earlier chats")
        return NOTHING_LEARNT


def record_experts(folder: Path, plan: Plan, passes: Iterable[Sequence[Step]]) -> None:
    """Add passes to the statistics of a model; do nothing if its experts are not read one by one.

    Args:
        folder: the state folder.
        plan: plan that the engine ran under.
        passes: steps of each pass, all that shared it; interrupted ones and those that read a prompt are ignored.

    Raises:
        OSError: the file cannot be written.
    """
    counted = [shared for shared in passes if _counts(shared)]
    if plan.experts is None or not counted:
        return
    path = _path(folder, plan.target)
    try:
        before = _read(path)
    except (FileNotFoundError, *_UNREADABLE):
        before = ExpertStatistics()
    sums = dict(before.sums)
    for shared in counted:
        rows = sum(step.new_rows + step.tree_nodes for step in shared)
        size = str(rows.bit_length())
        old = sums.get(size, _NONE)
        share = 0.5 if old[0] > _MOST_PASSES else 1.0
        sums[size] = tuple(share * a + b for a, b in zip(old, _sums_of(shared[0], rows, plan), strict=True))
    counts = _counts_of(counted, plan.experts.num_experts)
    passes_before, counts_before = before.passes, before.counts
    if [len(own) for own in counts_before] != [len(own) for own in counts]:  # none, or those of another model
        passes_before, counts_before = 0.0, tuple((0.0,) * len(own) for own in counts)
    share = 0.5 if passes_before > _MOST_PASSES else 1.0
    summed = tuple(
        tuple(share * old + new for old, new in zip(*pair, strict=True))
        for pair in zip(counts_before, counts, strict=True)
    )
    _write(path, plan.target, ExpertStatistics(share * passes_before + len(counted), summed, sums))


def _counts(shared: Sequence[Step]) -> bool:
    """Return whether a pass shows what trees use: all its steps are known, and none was interrupted."""
    if not shared or len(shared) != shared[0].num_sharing or not shared[0].experts_used:
        return False
    return all(step.token_ids for step in shared)


def _sums_of(step: Step, rows: int, plan: Plan) -> _Sums:
    experts, slots = plan.experts, plan.placement.experts
    assert experts is not None and slots is not None
    prior = ExpertTier(experts.num_layers, experts.num_experts, experts.per_row, experts.expert_bytes, slots.quota, 0)
    used = (step.expert_hits + step.expert_misses) / experts.num_layers
    missed = step.expert_misses / experts.num_layers
    return 1.0, float(rows), used, prior.used(rows), missed, prior.missed(rows)


def _counts_of(passes: Sequence[Sequence[Step]], num_experts: int) -> tuple[tuple[float, ...], ...]:
    """Return how many of the passes used each expert, by layer."""
    import numpy as np  # loaded with the engine, and not needed before

    bits: Any = sum(
        np.unpackbits(np.frombuffer(shared[0].experts_used, np.uint8)).astype(np.int64) for shared in passes
    )
    num_layers = len(bits) // num_experts
    layers = bits[: num_layers * num_experts].reshape(num_layers, num_experts)
    return tuple(tuple(map(float, own)) for own in layers.tolist())


def _path(folder: Path, target: str) -> Path:
    return folder / _FOLDER / f"{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> ExpertStatistics:
    values = json.loads(read_regular(path))
    if values["version"] != _VERSION:
        return ExpertStatistics()
    passes = _positive(values["passes"])
    counts = tuple(tuple(_positive(count) for count in own) for own in values["counts"])
    return ExpertStatistics(passes, counts, {size: _sums(row) for size, row in values["sums"].items()})


def _sums(row: list[float]) -> _Sums:
    sums = tuple(map(_positive, row))
    passes, rows, used, expected_used, _, _ = sums
    if not (rows >= passes > 0 and used > 0 and expected_used > 0):
        raise ValueError("impossible sums of passes")
    return sums


def _positive(value: float) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError("impossible number of passes")
    return number


def _write(path: Path, target: str, statistics: ExpertStatistics) -> None:
    values = {
        "version": _VERSION,
        "model": target,
        "passes": statistics.passes,
        "counts": statistics.counts,
        "sums": statistics.sums,
    }
    atomic_write_text(path, json.dumps(values))
