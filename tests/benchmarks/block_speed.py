"""How fast matrices in ggml's blocks and in specchat's own formats are dequantized on one core.

    PYTHONPATH=. python tests/benchmarks/block_speed.py

GB/s of stored bytes, and values per nanosecond, of the best of some runs over a 2048 x 4096 matrix in chunks as
`linear` takes them, to float32 and to bfloat16, by CPU time of the thread. Blocks are random bytes.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, PLAIN_TYPES
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.ggml import Blocks
from specchat.models.quant.kernels.chunked import Segments, chunk_rows
from specchat.models.weights.recipe import QUANTIZERS

ROWS, COLS = 2048, 4096
RUNS = 7
CPU = torch.device("cpu")


def random_blocks(kind: str) -> Segments:
    """Random bytes below 100, so that no scale is infinite."""
    block = BLOCK_TYPES[kind]
    blocks = torch.randint(0, 100, (ROWS * COLS // block.numbers, block.nbytes), dtype=torch.uint8)
    return {"blocks": blocks.view(ROWS, -1)}


def stored() -> dict[str, tuple[WeightFormat, Segments]]:
    found: dict[str, tuple[WeightFormat, Segments]] = {
        kind: (Blocks(kind), random_blocks(kind)) for kind in BLOCK_TYPES if kind not in PLAIN_TYPES
    }
    weight = torch.randn(ROWS, COLS)
    for quant, quantizer in QUANTIZERS.items():
        segments = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in quantizer.format.segments(ROWS, COLS)}
        quantizer.quantize(weight, segments)
        found[quant] = quantizer.format, segments
    return found


def dequantize_all(form: WeightFormat, segments: Segments, out: torch.Tensor) -> None:
    for begin in range(0, ROWS, len(out)):
        end = min(begin + len(out), ROWS)
        form.dequantize(segments, begin, end, out[: end - begin])


def best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    print("| type | bits | GB/s to float32 | to bfloat16 | values/ns | |\n|---|---|---|---|---|---|")
    for name, (form, segments) in stored().items():
        nbytes = sum(segment.nbytes for segment in segments.values())
        times = []
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(chunk_rows(ROWS, COLS, dtype, CPU), COLS, dtype=dtype)
            times.append(best_s(partial(dequantize_all, form, segments, out)))
        rates = " | ".join(f"{nbytes / each / 1e9:.2f}" for each in times)
        values = " | ".join(f"{ROWS * COLS / each / 1e9:.2f}" for each in times)
        print(f"| {name} | {8 * nbytes / ROWS / COLS:.2f} | {rates} | {values} |")


if __name__ == "__main__":
    main()
