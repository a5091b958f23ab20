"""Python time per streamed layer, over a plain forward of the same layers.

    PYTHONPATH=. python tests/benchmarks/layer_overhead.py

A tiny packed model on one thread, the passes of all systems in turn; prints microseconds: the median over rounds of
the difference of two systems' passes, and the difference of their fastest ones. Reading has its own baseline: a plain
forward with one bare `preadv` of the layer's bytes into a slot before each layer. So "Python" is all else:
our wrapper, slots, counters. Not a test: run it on a quiet machine, where medians and minima agree.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from support import loading
from support.loading import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_models import make_config, random_model, save

from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.streaming import slots
from specchat.engine.streaming.base import NoStreamer
from specchat.models.packs import prepare
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack

NUM_PASSES = 2000
NUM_SLOTS = 2
PAUSE_S = 0.001  # in which threads end what they read ahead for their next pass: it is not to disturb the next system
CPU = torch.device("cpu")
# (what it shows, system, what is taken off)
FIGURES = (
    ("wrapper alone", "wrapped", "plain"),
    ("computing on the page cache: Python", "mapped", "plain"),
    ("slots, small layers: reading itself", "bare reads", "plain"),
    ("slots, small layers: Python", "slots", "bare reads"),
    ("slots, small layers: both", "slots", "plain"),
    ("slots filled by threads: everything", "threads", "plain"),
)


def make_pack(folder: Path):
    os.environ["SPECCHAT_CACHE_DIR"] = str(folder / "cache")
    prepare.SMALL_BYTES = 0  # so that tiny models are packed, too
    source = save(random_model(make_config("llama")).to(torch.bfloat16), folder / "model")
    return source, loading.prepare(source, "fp32", progress=lambda _: None, warn=lambda _: None)


def unwrapped(model: TreeModel) -> TreeModel:
    """As if nothing of ours were around the layers."""
    for layer in model.skeleton.layers:
        del layer.forward
    return model


def with_bare_reads(model: TreeModel, pack: Pack) -> TreeModel:
    """Reads every layer's bytes into a slot before it is computed, and does nothing else."""
    slots = [torch.zeros(pack.layers[0].nbytes, dtype=torch.uint8) for _ in range(NUM_SLOTS)]

    def read_and_run(read, forward, *args, **kwargs):
        read()
        return forward(*args, **kwargs)

    for index, layer in enumerate(unwrapped(model).skeleton.layers):
        packed = pack.layers[index]
        descriptor = os.open(packed.path, os.O_RDONLY)
        read = partial(os.preadv, descriptor, [bytes_of(slots[index % NUM_SLOTS])], packed.data_offset)
        layer.forward = partial(read_and_run, read, layer.forward)
    return model


def load_systems(folder: Path) -> dict[str, TreeModel]:
    source, pack = make_pack(folder)
    load = partial(load_model, source, dtype=torch.float32, device=CPU, cache_rows=64, chunk_rows=64, pack=pack)
    every_layer = range(len(pack.layers))
    wrapped = unwrapped(load())
    wrapped = TreeModel(wrapped.skeleton, wrapped.cache, NoStreamer(), every_layer, 64, CPU)
    stream = partial(load, resident=(), num_slots=NUM_SLOTS)
    systems = {
        "plain": unwrapped(load()),
        "wrapped": wrapped,
        "bare reads": with_bare_reads(load(), pack),
        "slots": stream(),
        "mapped": stream(in_ram=every_layer),
    }
    slots.SMALL_LAYER_BYTES = 0
    systems["threads"] = stream()
    return systems


def time_layer(model: TreeModel) -> float:
    model.cache.truncate(0, 0)
    layout = PassLayout.single(linear_layout(0, 1, CPU))
    layout.select(0, 1)  # the bare layers do not
    begin = time.perf_counter()
    model.forward([5], layout)
    return (time.perf_counter() - begin) / len(model.skeleton.layers)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        systems = load_systems(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(NUM_PASSES):
            for name, model in systems.items():
                times[name].append(time_layer(model) * 1e6)
                time.sleep(PAUSE_S)
        for model in systems.values():
            model.close()
    print(f"plain forward: {statistics.median(times['plain']):.1f} us per layer")
    for what, name, other in FIGURES:
        median = statistics.median(a - b for a, b in zip(times[name], times[other], strict=True))
        print(f"{what}: {median:+.1f} us per layer (median), {min(times[name]) - min(times[other]):+.1f} (minimum)")


if __name__ == "__main__":
    main()
