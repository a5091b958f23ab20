"""A profile of three steps on a GPU: the longest kernels, and the gaps of the copy stream.

    PYTHONPATH=.:tests python -m gpu.profile_steps shape:llama-70b,layers=6 OUT

writes OUT/profile.txt and OUT/trace.json.gz.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from support.engines import NOTHING, make_plan, random_prompt
from support.loading import load_engine, prepare
from support.plans import changed
from support.streamed import silent

from specchat.models.catalog.shape import parse_shape
from specchat.models.synthetic.layers import materialise
from specchat.records.generation import Sampling

_MOST_TRACE_BYTES = 16 << 20


def profiled_steps(shape: str, device: str, activities: Iterable[Any]) -> Any:
    """The profile of three steps without a draft model, whose layers all stream."""
    source = materialise(parse_shape(shape.removeprefix("shape:")))
    pack = prepare(source, "bf16", "int8", progress=silent, warn=silent)
    plan = make_plan(source, None, num_layers=len(pack.layers), resident=(), retrieval=True, tree_budget=64)
    plan = changed(plan, device=device, dtype="bf16", quant="int8", in_ram=plan.placement.streamed, head_rows=32)
    with load_engine(plan, source, None, pack) as engine:
        prompt = random_prompt(64, 4096)
        steps = engine.generate(prompt, Sampling(temperature=0.7), stop_ids=NOTHING, max_tokens=64)
        for _ in range(2):
            next(steps)
        with torch.profiler.profile(activities=list(activities)) as profile:
            for _ in range(3):
                next(steps)
        steps.close()
    return profile


def copy_gaps_ms(events: Iterable[Any]) -> list[float]:
    """Milliseconds between one large copy to the device and the next, in order."""
    copies = sorted(
        (each.time_range.start, each.time_range.end) for each in events if "HtoD" in each.name and "Pinned" in each.name
    )
    return [round((begin - end) / 1e3, 3) for (_, end), (begin, _) in pairwise(copies)]


def main(shape: str, out: Path) -> None:
    kinds = torch.profiler.ProfilerActivity
    profile = profiled_steps(shape, "cuda:0", (kinds.CPU, kinds.CUDA))
    gaps = copy_gaps_ms(profile.events())
    table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60)
    text = f"{table}\ngaps between copies of layers, ms: {gaps}\n"
    print(text)
    (out / "profile.txt").write_text(text)
    trace = out / "trace.json"
    profile.export_chrome_trace(str(trace))
    packed = gzip.compress(trace.read_bytes())
    trace.unlink()
    if len(packed) <= _MOST_TRACE_BYTES:
        (out / "trace.json.gz").write_bytes(packed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
