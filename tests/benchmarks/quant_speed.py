"""What quantized matrices cost in time and memory: products, quantizing, packing.

    PYTHONPATH=. python tests/benchmarks/quant_speed.py [SHAPE]

Products of an 11008 x 4096 matrix beside bf16's, on as many threads as there are cores; quantizing it, in GB/s of bf16
input; and the most memory that packing a synthetic checkpoint (SHAPE, some GB) takes beyond what the process had, in
layers of that checkpoint. The shape is left in SPECCHAT_CACHE_DIR.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from support.loading import prepare
from torch import Tensor
from torch.nn import functional as F

from specchat.models.catalog.shape import parse_shape
from specchat.models.packs.pack import Pack
from specchat.models.quant.formats.base import Quantizer
from specchat.models.quant.kernels.chunked import scratch_bytes
from specchat.models.synthetic.layers import materialise
from specchat.models.weights.recipe import QUANTIZERS
from specchat.records.model import LOWER_QUANTS

ROWS, COLS = 11008, 4096
REPEATS = 30
SHAPE = "hidden=2048,layers=30,heads=16,kv_heads=4,head_dim=128,mlp=7168"


def best_s(act: Callable[[], object], repeats: int = 9) -> float:
    """The best of some runs."""
    return min(_time(act) for _ in range(repeats))


def _time(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def segments_of(quantizer: Quantizer, rows: int, cols: int) -> dict[str, Tensor]:
    return {s.name: torch.zeros(s.shape, dtype=s.dtype) for s in quantizer.format.segments(rows, cols)}


def measure_matrix() -> None:
    weight = torch.randn(ROWS, COLS).bfloat16()
    scratch = torch.zeros(scratch_bytes((ROWS, COLS), weight.dtype, weight.device), dtype=torch.uint8)
    for name, quantizer in QUANTIZERS.items():
        segments = segments_of(quantizer, ROWS, COLS)
        took_s = best_s(partial(quantizer.quantize, weight, segments), 3)
        print(f"quantizing to {name}: {weight.nbytes / 1e9 / took_s:.3f} GB/s of bf16")
        for rows in (1, 64, 256, 1024):
            x = torch.randn(rows, COLS).bfloat16()
            ways = partial(F.linear, x, weight), partial(quantizer.format.linear, x, segments, (ROWS, COLS), scratch)
            # in turns, so that what else the machine does bears on both alike
            dense, ours = map(min, zip(*([_time(way) for way in ways] for _ in range(REPEATS)), strict=True))
            print(f"  M={rows}: bf16 {dense * 1e3:.1f} ms, {name} {ours * 1e3:.1f} ms, {ours / dense:.2f}x")


class PeakMemory:
    """The most anonymous memory of this process while it lasts, polled."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure_packing(text: str) -> None:
    shape = parse_shape(text)
    source = materialise(shape)
    for quant in LOWER_QUANTS:
        small = prepare(materialise(parse_shape("hidden=512,layers=8")), "bf16", quant, progress=_quiet, warn=_quiet)
        _delete(small)  # it was for the imports
        begin = time.perf_counter()
        with PeakMemory() as memory:
            pack = prepare(source, "bf16", quant, progress=_quiet, warn=_quiet)
        took_s = time.perf_counter() - begin
        assert pack is not None
        extra = (memory.peak - memory.before) / shape.layer_bytes
        print(
            f"packing {shape.num_bytes / 1e9:.2f} GB as {quant}: {shape.num_bytes / 1e9 / took_s:.3f} GB/s, "
            f"{pack.nbytes / shape.num_bytes:.3f} of the bytes, {extra:.2f} layers of memory"
        )
        _delete(pack)


def _delete(pack: Pack | None) -> None:
    """So that the next run packs again."""
    assert pack is not None
    shutil.rmtree(pack.folder)


def _quiet(_: object) -> None:
    """Nobody waits."""


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    measure_matrix()
    measure_packing(sys.argv[1] if len(sys.argv) > 1 else SHAPE)
