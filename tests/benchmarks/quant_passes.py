"""Passes of 64 rows over a synthetic model that is read from the disk each time, by what its matrices are stored in.

    PYTHONPATH=. python tests/benchmarks/quant_passes.py [SHAPE]

The three models take turns, so that what else the machine does bears on all alike; packs are read past the page cache
where the file system allows it. They are left in SPECCHAT_CACHE_DIR.
"""

import os
import statistics
import sys
import time
from dataclasses import replace

import torch
from support.loading import load_model, prepare

from specchat.engine.model import TreeModel
from specchat.models.catalog.shape import parse_shape
from specchat.models.synthetic.layers import materialise

SHAPE = "hidden=2048,layers=34,heads=16,kv_heads=4,head_dim=128,mlp=7168"  # 3.1 GB in bf16
ROWS, ROUNDS = 64, 6


def load(text: str, quant: str) -> TreeModel:
    source = materialise(replace(parse_shape(text), quant=quant), warn=print)
    pack = prepare(source, "bf16", quant, progress=lambda _: None, warn=print)
    return load_model(
        source,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        cache_rows=256,
        chunk_rows=512,
        resident=(),
        num_slots=2,
        pack=pack,
        quant=quant,
    )


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    text = sys.argv[1] if len(sys.argv) > 1 else SHAPE
    models = {quant: load(text, quant) for quant in ("none", "int8", "int4")}
    ids = torch.randint(3, 4096, (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, list[float]] = {quant: [] for quant in models}
    waits: dict[str, list[float]] = {quant: [] for quant in models}
    num_bytes: dict[str, int] = {}
    for _ in range(ROUNDS + 1):
        for quant, model in models.items():
            before, begin = model.streamer.counters(), time.perf_counter()
            model.append(ids)
            times[quant].append(time.perf_counter() - begin)
            after = model.streamer.counters()
            waits[quant].append(after.wait_s - before.wait_s)
            num_bytes[quant] = after.num_bytes - before.num_bytes
            model.cache.truncate(0, 0)
            time.sleep(0.5)  # its first slots fill before the next one begins
    full_s = statistics.median(times["none"][1:])
    print("| weights | streamed | of bf16 | pass | waiting | faster |\n|---|---|---|---|---|---|")
    for quant, model in models.items():
        pass_s, wait_s = statistics.median(times[quant][1:]), statistics.median(waits[quant][1:])
        share = num_bytes[quant] / num_bytes["none"]
        size = num_bytes[quant] / 1e9
        print(f"| {quant} | {size:.2f} GB | {share:.3f} | {pass_s:.3f} s | {wait_s:.3f} s | {full_s / pass_s:.2f}x |")
        model.close()


if __name__ == "__main__":
    main()
