"""Seconds of the host to bring the experts of a layer into a GPU's slots, without CUDA's own part.

    PYTHONPATH=.:tests python tests/benchmarks/gpu_fetch.py [EXPERTS] [PASSES]

A synthetic router chooses the experts of passes of 1, 8, 16 and 64 rows. A quarter of the experts of 12 layers is in
the pool, and host memory keeps all of them. Calls of CUDA return at once, and nothing is copied: what is left are the
tables, the choice of slots, and the calls themselves. Prints for each number of rows the median and the least of the
mean times of a layer, in microseconds of CPU time, without and with a guess of the next layer's experts. Not a test.
"""

import statistics
import sys
import time
from contextlib import closing, nullcontext
from unittest import mock

import torch
from support.moe import make_moe_config
from support.routing import COMMITTED, Router

from specchat.engine.experts import gpu
from specchat.engine.experts.gpu import GpuSlots, GpuSource
from specchat.engine.experts.pool import ExpertPool
from specchat.engine.streaming.slots import page_aligned
from specchat.models.hf.expert_tables import ExpertTables
from specchat.models.hf.experts import find_experts
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.weights.experts import ExpertLayout

LAYERS, PER_ROW, WARM = 12, 8, 30
RECALL = 0.85  # of the experts of a row that the router of the next layer names ahead; published: 0.84 to 0.87


def measure(num_experts: int, rows: int, passes: int, ahead: bool) -> list[float]:
    """Return the mean seconds of a layer, by pass."""
    router, rng, seconds = Router(LAYERS, num_experts, PER_ROW, seed=rows), torch.Generator().manual_seed(1), []
    config = make_moe_config("qwen3_moe", num_experts=num_experts, top_k=PER_ROW)
    experts = find_experts(build_skeleton(config, torch.bfloat16))[0]
    layout, quota = ExpertLayout.of(experts), num_experts // 4
    slots = GpuSlots(LAYERS * quota + num_experts, layout.nbytes, torch.device("cpu"))
    blobs = dict(enumerate(page_aligned(num_experts * layout.nbytes).view(num_experts, -1)))
    source = GpuSource(slots, dict.fromkeys(range(LAYERS), blobs), None, layout.nbytes)
    held: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in range(LAYERS)}
    tables = ExpertTables(experts, layout.stacks(slots.slab), layout.nbytes, page_aligned)
    with closing(ExpertPool(range(LAYERS), num_experts, quota, num_experts, source, held, {}, 64)) as pool:
        for _ in range(WARM + passes):
            routed = torch.from_numpy(router.tree(rows))
            others = torch.randint(0, num_experts, routed.shape, generator=rng)
            named = torch.where(torch.rand(others.shape, generator=rng) < RECALL, routed, others)
            pool.begin(rows)
            spent = 0.0
            for layer, ids in enumerate(routed):
                begin = time.thread_time()
                arriving = pool.bring(layer, ids)
                tables.place(pool.slots_of(layer))
                if ahead:
                    pool.look_ahead(layer, rows, named.__getitem__)
                for _ in arriving:
                    pass
                spent += time.thread_time() - begin
            source._waits.clear()
            router.commit(COMMITTED[rows])
            seconds.append(spent / LAYERS)
    return seconds[WARM:]


def main() -> None:
    num_experts, passes = (int(each) for each in (sys.argv[1:] + ["128", "60"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with mock.patch.object(torch, "cuda", mock.MagicMock()), mock.patch.object(gpu, "_copy_async", lambda *_: None):
        nothing = type("Nothing", (), dict.fromkeys(("record", "synchronize", "wait_event"), lambda *_: None))
        torch.cuda.Event = torch.cuda.Stream = lambda *_, **__: nothing()  # type: ignore[assignment]
        torch.cuda.current_stream = lambda _: nothing()  # type: ignore[assignment]
        torch.cuda.stream = lambda _: nullcontext()  # type: ignore[assignment]
        for rows in COMMITTED:
            for ahead in (False, True):
                found = measure(num_experts, rows, passes, ahead)
                print(
                    f"{rows:3d} rows of {num_experts} experts{', ahead' if ahead else '       '}: "
                    f"median {statistics.median(found) * 1e6:4.0f} us, least {min(found) * 1e6:4.0f} us",
                    flush=True,
                )


if __name__ == "__main__":
    main()
