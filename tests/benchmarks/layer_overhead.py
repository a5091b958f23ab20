"""Python time per streamed layer, over a plain forward of the same layers.

    python tests/benchmarks/layer_overhead.py

A tiny model on one thread, the passes interleaved; prints medians and minima in microseconds. Not a test: run it on a
quiet machine, where the two agree.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_models import make_config, random_model, save

from specchat.engine.attention import RowLayout
from specchat.engine.disk import ThreadStreamer
from specchat.engine.model import TreeModel, load_model
from specchat.engine.streamer import NoStreamer

NUM_PASSES = 2000
CPU = torch.device("cpu")


class Instant:
    """A disk that has every layer at once."""

    num_workers = 1

    def chunks(self, index: int, slot: torch.Tensor) -> list:
        return [lambda: None]

    def close(self) -> None:
        pass


def load(folder: Path, streaming: str) -> TreeModel:
    model = load_model(
        save(random_model(make_config("llama")), folder), dtype=torch.float32, device=CPU, cache_rows=64, chunk_rows=64
    )
    layers = model.skeleton.layers
    for layer in layers:  # as if nothing of ours were around it
        del layer.forward
    if streaming == "plain":
        return model
    model = TreeModel(model.skeleton, model.cache, NoStreamer(), range(len(layers)), 64, CPU)
    if streaming == "slots":
        model.streamer = ThreadStreamer(layers, range(len(layers)), len(layers), Instant())
    return model


def time_layer(model: TreeModel) -> float:
    model.cache.truncate(0)
    layout = RowLayout(0, 1, torch.zeros(0, 0, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), chunk=(0, 1))
    begin = time.perf_counter()
    model.forward([5], layout)
    return (time.perf_counter() - begin) / len(model.skeleton.layers)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: load(Path(folder) / name, name) for name in ("plain", "wrapped", "slots")}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(NUM_PASSES):
        for name, model in models.items():
            times[name].append(time_layer(model) * 1e6)
    for name in ("wrapped", "slots"):
        median = statistics.median(times[name]) - statistics.median(times["plain"])
        print(f"{name}: {median:+.1f} us per layer (median), {min(times[name]) - min(times['plain']):+.1f} (minimum)")


if __name__ == "__main__":
    main()
