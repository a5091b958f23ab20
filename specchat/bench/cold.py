"""Passes by themselves, in turn with raw reads of the files they stream from; cold, each from an empty page cache.

Every other round goes backwards: a disk that has rested, or that has just been read, may be faster or slower for a
while, and nobody is to have the better turn in all rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from specchat.hardware.disk import evict, read_raw, resident_share

# One pass: seconds, and bytes that it streamed where that is known (for transformers it is what ours streams).
TimePass = Callable[[], tuple[float, int | None]]

PAIRS = 5
_RAW = "raw"
RESIDENT = "resident"  # our own passes with every layer in memory: as fast as streaming can become


@dataclass(frozen=True)
class PassSeries:
    """One system's passes.

    Attributes:
        seconds: each pass, in order.
        streamed_bytes: by one pass.
    """

    seconds: tuple[float, ...]
    streamed_bytes: int

    @property
    def pass_s(self) -> float:
        """The median pass."""
        return statistics.median(self.seconds)

    @property
    def bytes_per_s(self) -> float:
        """Streamed bytes per second of the median pass."""
        return self.streamed_bytes / self.pass_s


@dataclass(frozen=True)
class PassRounds:
    """Rounds of one raw read and one pass of each system, in turn.

    Attributes:
        rows: of every pass.
        cold: every read and pass began with an empty page cache.
        raw: the raw reads, as a series of their own.
        raw_direct: they went past the page cache.
        systems: by name.
        resident_share: of the files' pages in the page cache before a pass: the most (cold) or the least seen.
    """

    rows: int
    cold: bool
    raw: PassSeries
    raw_direct: bool
    systems: Mapping[str, PassSeries]
    resident_share: float

    @property
    def own_over_resident(self) -> float | None:
        """Our median pass, in passes with every layer in memory; None where there were none."""
        if RESIDENT not in self.systems:
            return None
        return next(iter(self.systems.values())).pass_s / self.systems[RESIDENT].pass_s


@dataclass(frozen=True)
class Files:
    """What passes read.

    Attributes:
        own: by our own; raw reads read the same.
        every: by any system; all of these are evicted.
    """

    own: Sequence[Path]
    every: Sequence[Path]


def measure_rounds(
    files: Files,
    systems: Mapping[str, TimePass],
    *,
    rows: int,
    cold: bool,
    direct: bool,
    cancel: Event,
    report: Callable[[str], None],
    num_rounds: int = PAIRS,
) -> PassRounds | None:
    """Rounds of a raw read and a pass of each system; None when interrupted.

    Args:
        files: what passes read.
        systems: the first is ours, and says how much it streams.
        rows: of every pass.
        cold: evict the files before every read and pass.
        direct: read past the page cache.
        cancel: checked between passes.
        report: told what comes.
        num_rounds: how many.
    """
    shares: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in (_RAW, *systems)}
    raw_direct = True
    streamed_bytes = raw_bytes = 0

    def prepare() -> None:
        shares.append(evict(files.every) if cold else resident_share(files.own))

    def time_raw() -> tuple[float, int | None]:
        nonlocal raw_bytes, raw_direct
        raw = read_raw(files.own, direct=direct)
        raw_bytes, raw_direct = raw.num_bytes, raw_direct and raw.direct
        return raw.seconds, None

    turns = [(_RAW, time_raw), *systems.items()]
    what = "cold passes" if cold else "passes from the page cache"
    for number in range(-1, num_rounds):  # round -1 warms up and does not count
        if cancel.is_set():
            return None
        report(f"{what}, round {number + 1} of {num_rounds}")
        if number < 0:
            shares.clear()
        for name, time_pass in turns if number % 2 == 0 else reversed(turns):
            if cancel.is_set():
                return None
            prepare()
            spent, num_bytes = time_pass()
            seconds[name].append(spent)
            streamed_bytes = streamed_bytes if num_bytes is None else num_bytes
    counted_shares = shares[len(turns) :]
    return PassRounds(
        rows=rows,
        cold=cold,
        raw=PassSeries(tuple(seconds[_RAW][1:]), raw_bytes),
        raw_direct=raw_direct,
        systems={
            name: PassSeries(tuple(seconds[name][1:]), 0 if name == RESIDENT else streamed_bytes) for name in systems
        },
        resident_share=max(counted_shares) if cold else min(counted_shares),
    )
