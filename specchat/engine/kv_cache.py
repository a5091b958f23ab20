"""Keys and values in buffers made once: rows are appended by a pass, and the accepted ones are kept.

Plain tensors; `models.hf.attention` presents them to transformers as its cache. A committed prefix can be cut at any
row because every layer stores one row per token; layers with a running state (later) will need a snapshot instead, so
nothing above this file goes back except through `truncate`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.records.limits import padded_rows
from specchat.records.model import KvShape


class LayerKv:
    """One layer's keys and values.

    Args:
        shape: heads and dims.
        capacity: rows, a multiple of the alignment.
        dtype: of the stored numbers.
        device: where they live.
    """

    def __init__(self, shape: KvShape, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        # zeros, not empty: padding rows enter the product with weight 0, and 0 x NaN would poison it
        self.keys = torch.zeros(1, shape.heads, capacity, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(1, shape.heads, capacity, shape.value_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new rows and returns all rows up to the alignment.

        Args:
            keys: [1, H_kv, rows, D].
            values: [1, H_kv, rows, D_v].
        """
        begin, end = self.length, self.length + keys.shape[2]
        assert end <= self.capacity, f"{end} rows in a cache of {self.capacity}"
        self.keys[:, :, begin:end] = keys
        self.values[:, :, begin:end] = values
        self.length = end
        padded = padded_rows(end)
        return self.keys[:, :, :padded], self.values[:, :, :padded]

    def keep(self, base: int, rows: Tensor) -> None:
        """Moves the given rows (int64 [n], all >= base) to `base`, in order, and forgets everything behind them."""
        end = base + rows.shape[0]
        if rows.shape[0]:
            self.keys[:, :, base:end] = self.keys.index_select(2, rows)
            self.values[:, :, base:end] = self.values.index_select(2, rows)
        self.length = end


class TreeCache:
    """The caches of all layers, always of one length between passes.

    Args:
        shapes: one per layer.
        capacity: rows that must fit; rounded up to the alignment.
        dtype: of the stored numbers.
        device: where they live.
    """

    def __init__(self, shapes: Sequence[KvShape], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = padded_rows(capacity)
        self.device = device
        self.layers = [LayerKv(shape, self.capacity, dtype, device) for shape in shapes]

    @property
    def length(self) -> int:
        """Rows held."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers)

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Keeps the first `base` rows and then the given ones, in order; everything else is forgotten."""
        if list(rows) == list(range(base, base + len(rows))):  # already in place, as after an exact chain
            self.truncate(base + len(rows))
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for kv in self.layers:
            kv.keep(base, index)

    def wipe(self, length: int) -> None:
        """Forget every row from `length` on and zero it, after a pass that stored NaN or infinity."""
        self.truncate(length)
        for kv in self.layers:
            kv.keys[:, :, length:] = 0
            kv.values[:, :, length:] = 0

    def truncate(self, length: int) -> None:
        """Forgets every row from `length` on, also those of a pass that was cut off between layers."""
        for kv in self.layers:
            kv.length = length
