"""Where passes that stream from the disk spend their time, read by read, against raw reads of the same files.

    PYTHONPATH=. python tests/benchmarks/stream_timeline.py [SHAPE] [--slots N] [--rows N] [--rounds N] [--layers]

Rounds of one raw read, one pass from the pack, and one from the same files taken for an unpacked checkpoint, each from
an empty page cache. Prints every pass: its share of the raw rate, how long no read was under way or only one, and how
long the last layer took, which nothing is read beside. `--layers` lists the last round's passes layer by layer. Not a
test: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from support.loading import load_model, prepare
from torch import Tensor

from specchat.engine import loading
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.streaming.readers import LayerReader, layer_reader_for
from specchat.hardware.disk import evict, read_raw
from specchat.models.catalog.shape import parse_shape
from specchat.models.packs.pack import Pack
from specchat.models.synthetic.layers import materialise
from specchat.records.model import ModelSource

SHAPE = "hidden=2048,layers=30,heads=16,kv_heads=4,head_dim=128,mlp=7168"
CLOCK = time.perf_counter


@dataclass
class LayerTimes:
    """When a layer was asked for, there, and computed; seconds."""

    index: int
    asked: float
    there: float = 0.0
    done: float = 0.0


@dataclass
class Timeline:
    """What happened in a pass; reads are (begin, end, layer)."""

    begin: float = 0.0
    end: float = 0.0
    reads: list[tuple[float, float, int]] = field(default_factory=list)
    layers: list[LayerTimes] = field(default_factory=list)

    @property
    def spent_s(self) -> float:
        return self.end - self.begin

    def seconds_with(self, count: int) -> float:
        """How long exactly so many reads were under way."""
        changes = sorted([(a, 1) for a, _, _ in self.reads] + [(b, -1) for _, b, _ in self.reads])
        under_way, at, total = 0, self.begin, 0.0
        for when, change in [*changes, (self.end, 0)]:
            now = min(max(when, self.begin), self.end)
            total += (now - at) * (under_way == count)
            under_way, at = under_way + change, now
        return total


class Timed:
    """A model whose reads and layers are timed: a filler and a streamer that note what passes through them."""

    def __init__(self, source: ModelSource, pack: Pack | None, num_slots: int) -> None:
        self.timeline = Timeline()
        loading.layer_reader_for = self._make_filler
        self.model: TreeModel = load_model(
            source,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            cache_rows=256,
            chunk_rows=512,
            resident=(),
            num_slots=num_slots,
            pack=pack,
        )
        streamer: Any = self.model.streamer
        self._acquire, self._release = streamer.acquire, streamer.release
        streamer.acquire, streamer.release = self._timed_acquire, self._timed_release

    def run_pass(self, num_rows: int) -> Timeline:
        layout = tree_layout(num_rows)
        self.model.cache.truncate(0, 0)
        self.timeline.reads, self.timeline.layers = [], []
        self.timeline.begin = CLOCK()
        self.model.streamer.restart()
        self.model.forward([5] * num_rows, layout)
        self.timeline.end = CLOCK()
        return self.timeline

    def _make_filler(self, *args: Any, **kwargs: Any) -> LayerReader:
        filler = layer_reader_for(*args, **kwargs)
        chunks = filler.chunks

        def timed_chunks(index: int, slot: Tensor) -> Sequence[Callable[[], None]]:
            return [partial(self._timed_read, index, work) for work in chunks(index, slot)]

        filler.chunks = timed_chunks  # type: ignore[method-assign]
        return filler

    def _timed_read(self, index: int, work: Callable[[], None]) -> None:
        begin = CLOCK()
        work()
        self.timeline.reads.append((begin, CLOCK(), index))

    def _timed_acquire(self, index: int) -> None:
        self.timeline.layers.append(LayerTimes(index, CLOCK()))
        self._acquire(index)
        self.timeline.layers[-1].there = CLOCK()

    def _timed_release(self, index: int) -> None:
        self.timeline.layers[-1].done = CLOCK()
        self._release(index)


def tree_layout(num_rows: int) -> PassLayout:
    """A root and a binary tree below it."""
    ancestors = torch.eye(num_rows - 1, dtype=torch.bool)
    for node in range(2, num_rows - 1):
        ancestors[node] |= ancestors[node // 2 - 1]
    return PassLayout.single(RowLayout(0, 1, ancestors, torch.tensor([0, *ancestors.sum(1).tolist()])))


def report(name: str, line: Timeline, num_bytes: int, raw_rate: float) -> float:
    rate = num_bytes / line.spent_s
    computing = sum(layer.done - layer.there for layer in line.layers)
    print(
        f"{name:8} {line.spent_s:.3f} s, {rate / 1e9:.2f} of {raw_rate / 1e9:.2f} GB/s ({rate / raw_rate:.3f}); "
        f"reads under way: none {line.seconds_with(0):.3f} s, one {line.seconds_with(1):.3f} s; computing "
        f"{computing:.3f} s, of it behind the last read {line.end - line.layers[-1].there:.3f} s"
    )
    return rate / raw_rate


def list_layers(name: str, line: Timeline) -> None:
    for layer in line.layers:
        reads = [(a, b) for a, b, index in line.reads if index == layer.index and b <= layer.there] or [(0.0, 0.0)]
        moments = (min(a for a, _ in reads), max(b for _, b in reads), layer.asked, layer.there, layer.done)
        read_from, read_to, asked, there, done = (moment - line.begin for moment in moments)
        print(
            f"{name:8} layer {layer.index:3}: read {read_from:.3f}-{read_to:.3f}, asked for {asked:.3f}, "
            f"there {there:.3f}, computed {done:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", default=SHAPE)
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--rows", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    source = materialise(parse_shape(options.shape))
    pack = prepare(source, "bf16", progress=lambda _: None, warn=print)
    assert pack is not None
    systems = {"pack": Timed(source, pack, options.slots), "shards": Timed(source, None, options.slots)}
    files = [layer.path for layer in pack.layers]
    num_bytes = sum(layer.nbytes for layer in pack.layers)
    shares: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(-1, options.rounds):  # round -1 warms up, and checks the pack
        evict(files)
        raw = read_raw(files, direct=True)
        for name, system in systems.items():
            evict(files)
            share = report(name, system.run_pass(options.rows), num_bytes, raw.bytes_per_s)
            if number >= 0:
                shares[name].append(share)
    for name, system in systems.items():
        if options.layers:
            list_layers(name, system.timeline)
        print(f"{name}: median share of the raw rate {statistics.median(shares[name]):.3f}")
        system.model.close()


if __name__ == "__main__":
    main()
