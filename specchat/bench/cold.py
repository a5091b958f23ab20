"""Single passes, alternating with raw reads of the same files. Cold passes begin with an empty page cache.

Every other round runs in reverse order. A disk may be faster or slower for a while after a rest or a read, so no
system should have the same place in all rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from specchat.hardware.disk import evict, read_raw, resident_share

# Runs one pass and returns its seconds and its streamed bytes. The bytes are None for transformers, which does not
# count them; it streams the same layers as specchat.
TimePass = Callable[[], tuple[float, int | None]]

PAIRS = 5
_RAW = "raw"
RESIDENT = "resident"  # specchat's passes with every layer in memory, the limit for streaming


@dataclass(frozen=True)
class PassSeries:
    """The passes of one system.

    Attributes:
        seconds: time of each pass, in order.
        streamed_bytes: bytes that one pass streams.
    """

    seconds: tuple[float, ...]
    streamed_bytes: int

    @property
    def pass_s(self) -> float:
        """Time of the median pass."""
        return statistics.median(self.seconds)

    @property
    def bytes_per_s(self) -> float:
        """Streamed bytes per second of the median pass."""
        return self.streamed_bytes / self.pass_s


@dataclass(frozen=True)
class PassRounds:
    """Rounds of one raw read and one pass of each system, in turn.

    Attributes:
        rows: number of rows of every pass.
        cold: whether every read and pass began with an empty page cache.
        raw: series of raw reads.
        raw_direct: whether raw reads went past the page cache.
        systems: series of passes by system name.
        resident_share: share of the files' pages in the page cache before a pass: maximum if cold, else minimum.
    """

    rows: int
    cold: bool
    raw: PassSeries
    raw_direct: bool
    systems: Mapping[str, PassSeries]
    resident_share: float

    @property
    def own_over_resident(self) -> float | None:
        """Specchat's median pass divided by that with every layer in memory, or None if the latter was not timed."""
        if RESIDENT not in self.systems:
            return None
        return next(iter(self.systems.values())).pass_s / self.systems[RESIDENT].pass_s


@dataclass(frozen=True)
class PassFiles:
    """The files that passes read.

    Attributes:
        own: files that specchat's passes and the raw reads read.
        every: files that any system reads; cold rounds evict all of these.
    """

    own: Sequence[Path]
    every: Sequence[Path]


def measure_rounds(
    files: PassFiles,
    systems: Mapping[str, TimePass],
    *,
    rows: int,
    cold: bool,
    direct: bool,
    cancel: Event,
    report: Callable[[str], None],
    num_rounds: int = PAIRS,
) -> PassRounds | None:
    """Time rounds of a raw read and a pass of each system; return None if interrupted.

    Args:
        files: files that passes read.
        systems: timers by system name; the first is specchat's and reports its streamed bytes.
        rows: number of rows of every pass.
        cold: whether to evict the files before every read and pass.
        direct: whether raw reads go past the page cache.
        cancel: interrupts the rounds between two passes once set.
        report: receives a line of progress before each round.
        num_rounds: number of rounds, without the warm-up round.
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
    for number in range(-1, num_rounds):  # round -1 is the warm-up and is not counted
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
