"""Measure layers on two processes of this machine over gloo, against one process in the same run.

    PYTHONPATH=.:tests python tests/benchmarks/workers.py [--part hops,overlap,disk] [--folder FOLDER]

Part "hops" times rows that cross between two processes: a tiny model with resident layers, dealt in turn, and what
specchat's plan would expect of the measured way. Part "overlap" lets each layer sleep for every row, as if each process
had a device of its own, and cuts passes into microbatches. Part "disk" streams all layers of a larger model from
FOLDER, which should be on a disk, past the page cache; both processes read from that one disk.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import crews
from support.crews import Worker, choice_of, crew, load_with, with_owners
from support.engines import make_plan, random_prompt
from support.loading import load_engine
from support.plans import changed
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.workers.models import RoutedModel
from specchat.loading.workers import worker_inputs
from specchat.records.microbatches import Microbatches
from specchat.records.model import ModelSource
from specchat.records.plan import Plan

ROW_S, FIXED_S = 4e-4, 2e-3
LAYERS = 12


def sleep_for_rows() -> None:
    """Let each layer take the time of its rows, and a little if there are few."""
    run = RoutedModel._run_chunks

    def slowly(self: RoutedModel, forward: Any, hidden: Any, *rest: Any) -> Any:
        time.sleep(max(FIXED_S, ROW_S * hidden.shape[-2]))
        return run(self, forward, hidden, *rest)

    RoutedModel._run_chunks = slowly  # type: ignore[method-assign]


def least_pass_s(engine: Engine, num_rows: int, repeats: int = 5) -> float:
    """Return the least seconds of a pass over rows in sequence."""
    taken = list[float]()
    for _ in range(repeats):
        engine.target.cache.truncate(0, 0)
        begin = time.perf_counter()
        engine.target.append(random_prompt(num_rows, VOCAB))
        taken.append(time.perf_counter() - begin)
    return min(taken)


def model(folder: Path, hidden: int = 64, layers: int = LAYERS) -> ModelSource:
    """Write a model of random weights in float32."""
    config = make_config("llama")
    config.num_hidden_layers = layers
    if hidden != config.hidden_size:
        config.hidden_size, config.intermediate_size = hidden, 11 * hidden // 4
        config.num_attention_heads = config.num_key_value_heads = 16
        config.head_dim = hidden // 16
    return save(random_model(config), folder / f"model{hidden}")


def hops(folder: Path) -> None:
    """Print the time and the bytes of a hop."""
    target = model(folder)
    plan = make_plan(target, None, num_layers=LAYERS, ctx=512)
    owner = [index % 2 for index in range(LAYERS)]
    with crew(1, folder) as (worker,):
        (inputs,) = worker_inputs(choice_of([worker]))
        assert inputs.peer is not None
        for num_rows in (1, 64):
            with load_engine(plan, target, None) as engine:
                alone_s = least_pass_s(engine, num_rows, 20)
            with load_with([worker], with_owners(plan, owner), target, None) as engine:
                before = engine.target.device_counters()[0].sent_bytes
                found_s = least_pass_s(engine, num_rows, 20)
                sent = (engine.target.device_counters()[0].sent_bytes - before) / 20
            expected_s = inputs.peer.hop_s + num_rows * 256 / inputs.peer.bytes_per_s
            print(
                f"hops, {num_rows} rows: {(found_s - alone_s) / LAYERS * 1e3:.2f} ms each, planned"
                f" {expected_s * 1e3:.2f} ms; {sent:,.0f} bytes sent by rank 0 in a pass, planned"
                f" {num_rows * 256 * LAYERS // 2:,} in {LAYERS // 2} hops",
                flush=True,
            )


@contextmanager
def loaded(worker: Worker, plan: Plan, target: ModelSource, owner: Sequence[int], count: int) -> Iterator[Engine]:
    cut = changed(with_owners(plan, owner), microbatches=Microbatches(((1, count),)))
    with load_with([worker], cut, target, None) as engine:
        yield engine


def overlap(folder: Path) -> None:
    """Print passes in microbatches, of those in one piece."""
    target = model(folder)
    plan = make_plan(target, None, num_layers=LAYERS, ctx=512)
    owners = {"ranges": [2 * index // LAYERS for index in range(LAYERS)], "in turn": [i % 2 for i in range(LAYERS)]}
    run = RoutedModel._run_chunks
    sleep_for_rows()
    with crew(1, folder, [sleep_for_rows]) as (worker,):
        for name, owner in owners.items():
            for num_rows in (4, 40):
                whole_s = 0.0
                for count in (1, 2, 4):
                    with loaded(worker, plan, target, owner, count) as engine:
                        found_s = least_pass_s(engine, num_rows)
                    whole_s = whole_s or found_s
                    print(
                        f"overlap, {name}, {num_rows} rows, {count}: {found_s / whole_s:.2f} of one piece", flush=True
                    )
    RoutedModel._run_chunks = run  # type: ignore[method-assign]


def disk(folder: Path) -> None:
    """Print passes whose layers are all read from the disk, by one process and by two."""
    target = model(folder, hidden=2048)
    plan = make_plan(target, None, num_layers=LAYERS, resident=(), slots=2)
    owner = [index % 2 for index in range(LAYERS)]
    size = sum(each.stat().st_size for each in target.path.glob("*.safetensors"))
    for num_rows in (1, 16):
        with load_engine(plan, target, None) as engine:
            alone_s = least_pass_s(engine, num_rows)
        with crew(1, folder) as (worker,), load_with([worker], with_owners(plan, owner), target, None) as engine:
            both_s = least_pass_s(engine, num_rows)
            both = [round(each.streamed.link_s, 2) for each in engine.target.device_counters()]
        print(
            f"disk, {num_rows} rows: {size / 1e9:.1f} GB, one process {alone_s:.2f} s, two {both_s:.2f} s,"
            f" {both_s / alone_s:.2f} of one; seconds that each has read {both}",
            flush=True,
        )


PARTS: dict[str, Callable[[Path], None]] = {"hops": hops, "overlap": overlap, "disk": disk}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated: hops, overlap, disk")
    parser.add_argument("--folder", type=Path, help="folder for models, several GB; a temporary one by default")
    arguments = parser.parse_args()
    crews._nursery()  # before this process has threads
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in arguments.part.split(","):
            PARTS[part](Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
