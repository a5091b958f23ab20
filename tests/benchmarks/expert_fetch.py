"""Seconds of the computing thread to bring the experts of a layer into slots, beside reading and computing them.

    PYTHONPATH=.:tests python tests/benchmarks/expert_fetch.py [EXPERTS] [PASSES]

A synthetic router chooses the experts of passes of 1, 8, 16 and 64 rows. A quarter of the experts of 12 layers is in
the pool. Experts are a page each, in the page cache, as three tensors that lie apart. Prints for each number of rows
the median and the least of the mean times of a layer, in microseconds: CPU time of the thread that calls `fetch` and
takes the groups over, so other threads and processes count little; without and with a guess of the next layer's
experts, whose drawing counts too. Also prints the share of all experts that a pass reads. Not a test.
"""

import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from support.routing import COMMITTED, Router

from specchat.engine.experts.pool import ExpertPool
from specchat.engine.experts.reader import ExpertReader, HostSlots
from specchat.engine.streaming.slots import page_aligned
from specchat.models.weights.experts import Extent

LAYERS, PER_ROW, PART = 12, 8, 4096
WARM = 30
RECALL = 0.85  # of the experts of a row that the router of the next layer names ahead; published: 0.84 to 0.87


def open_pool(path: Path, num_experts: int, ahead: bool, routed: list[torch.Tensor]) -> ExpertPool:
    path.write_bytes(bytes(3 * num_experts * PART))
    places = [
        tuple(Extent(path, (part * num_experts + expert) * PART, part * PART, PART) for part in range(3))
        for expert in range(num_experts)
    ]
    quota = num_experts // 4
    slab = page_aligned((LAYERS * quota + num_experts) * 3 * PART)
    reader = ExpertReader(dict.fromkeys(range(LAYERS), places), HostSlots(slab, 3 * PART), range(LAYERS))
    held: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in range(LAYERS)}
    rng = torch.Generator().manual_seed(1)

    def named(position: int) -> torch.Tensor:
        others = torch.randint(0, num_experts, routed[position].shape, generator=rng)
        return torch.where(torch.rand(others.shape, generator=rng) < RECALL, routed[position], others)

    return ExpertPool(range(LAYERS), num_experts, quota, num_experts, reader, held, {}, 64, named if ahead else None)


def measure(folder: Path, num_experts: int, rows: int, passes: int, ahead: bool) -> tuple[list[float], float]:
    """Return the mean seconds of a layer, by pass, and the share of all experts that a pass reads."""
    router, seconds = Router(LAYERS, num_experts, PER_ROW, seed=rows), []
    routed: list[torch.Tensor] = [torch.zeros(0)] * LAYERS
    with closing(open_pool(folder / "weights", num_experts, ahead, routed)) as pool:
        for number in range(WARM + passes):
            if number == WARM:
                before = pool.counters().num_bytes
            routed[:] = torch.from_numpy(router.tree(rows))
            pool.begin(rows)
            spent = 0.0
            for layer, ids in enumerate(routed):
                begin = time.thread_time()
                _, arriving = pool.fetch(layer, ids)
                for _ in arriving:
                    pass
                spent += time.thread_time() - begin
            router.commit(COMMITTED[rows])
            if number >= WARM:
                seconds.append(spent / LAYERS)
        num_bytes = pool.counters().num_bytes - before
    return seconds, num_bytes / passes / (LAYERS * num_experts * 3 * PART)


def main() -> None:
    num_experts, passes = (int(each) for each in (sys.argv[1:] + ["128", "60"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for rows in COMMITTED:
            for ahead in (False, True):
                found, share = measure(Path(folder), num_experts, rows, passes, ahead)
                print(
                    f"{rows:3d} rows of {num_experts} experts{', ahead' if ahead else '       '}: "
                    f"median {statistics.median(found) * 1e6:4.0f} us, least {min(found) * 1e6:4.0f} us, "
                    f"{share:.3f} of all experts read",
                    flush=True,
                )


if __name__ == "__main__":
    main()
