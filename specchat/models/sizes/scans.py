"""The allocations of the engine's convolutions and scans, for profiling on the meta device."""

import torch
from torch import Tensor

from specchat.records.limits import SCAN_BLOCK_ROWS, SCAN_CHANNEL_ROWS


class ScanAllocations:
    """The convolution and recurrence of a layer that allocate what the engine's allocate, and compute nothing.

    The engine computes blocks of rows. A block counts in full here, so that memory is linear in the number of rows.
    Tests compare the sizes with the engine's.
    """

    def convolve(self, x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
        """Allocate the inputs of a tree, one gathered tap, its float32 copy, and two results."""
        out = x.new_empty(x.shape, dtype=torch.float32)
        inputs = x.new_empty(len(x) + weight.shape[1] - 1, x.shape[1])
        tap = torch.empty_like(x)
        copy, summed = torch.empty_like(out), torch.empty_like(out)
        del inputs, tap, copy, summed
        return out

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, _beta: Tensor, *, delta: bool) -> Tensor:
        """Allocate float32 copies of the inputs, the products with the state, and the scores of one block."""
        rows, heads = v.shape[:2]
        floats = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, q, k, k, v, v, v)]
        out = v.new_empty(v.shape, dtype=torch.float32)
        sums = g.new_empty(2 * rows, *g.shape[1:], dtype=torch.float64)
        block = [v.new_empty(heads, SCAN_BLOCK_ROWS, SCAN_BLOCK_ROWS, dtype=torch.float64) for _ in range(4)]
        scores = [v.new_empty(heads, SCAN_BLOCK_ROWS, rows, dtype=torch.float64) for _ in range(2)]
        channels = g.new_empty(*g.shape[1:], SCAN_CHANNEL_ROWS, SCAN_BLOCK_ROWS, 3) if g.ndim == 3 else None
        del floats, sums, block, scores, channels
        return out
