"""The allocations of the engine's convolutions and scans, for profiling on the meta device."""

import torch
from torch import Tensor

from specchat.records.limits import SCAN_BLOCK_ROWS, SCAN_CHANNEL_ROWS


class ScanAllocations:
    """The convolution and recurrence of a layer that allocate what the engine's allocate, and compute nothing.

    The engine computes trees in blocks of rows, each with all rows before it. Here, one block meets all rows. Tests
    compare the sizes with the engine's.
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
        """Allocate float32 copies of the inputs, products with the state, sums of decays, and scores of a block."""
        rows, heads = v.shape[:2]
        floats = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, q, k, k, v, v, v)]
        out = v.new_empty(v.shape, dtype=torch.float32)
        sums = g.new_empty(2 * rows, *g.shape[1:], dtype=torch.float64)
        scores = [
            g.new_empty(heads, SCAN_BLOCK_ROWS, rows) for _ in range(4)
        ]  # decays in float64 and float32, products
        channels = g.new_empty(4, *g.shape[1:], SCAN_CHANNEL_ROWS, SCAN_CHANNEL_ROWS) if g.ndim == 3 else None
        del floats, sums, scores, channels
        return out

    def scan_channels(self, q: Tensor, k: Tensor, v: Tensor, _steps: Tensor, rates: Tensor) -> Tensor:
        """Allocate float32 copies of the inputs, outputs of pieces and of all rows, and the decays of one row."""
        floats = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
        out, pieces = (v.new_empty(v.shape, dtype=torch.float32) for _ in range(2))
        decays = [torch.empty_like(rates, dtype=torch.float32) for _ in range(2)]
        del floats, pieces, decays
        return out
