"""The KV cache, in buffers allocated once: a pass appends rows, and accepted rows are kept.

The buffers are plain tensors; `models.hf.attention` presents them to transformers as its cache. Every layer stores one
row per token, so the cache can be truncated at any row. Layers with a recurrent state (later) will need snapshots, so
callers roll back only through `truncate`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.records.limits import padded_rows
from specchat.records.model import KvShape


class LayerKv:
    """One layer's keys and values.

    Args:
        shape: number of heads, and sizes of keys and values.
        capacity: number of rows, a multiple of the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
    """

    def __init__(self, shape: KvShape, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not empty: padding rows have attention weight 0, and 0 x NaN would be NaN.
        self.keys = torch.zeros(1, shape.heads, capacity, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(1, shape.heads, capacity, shape.value_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new rows, and return all rows padded to the alignment.

        Args:
            keys: keys [1, H_kv, rows, D].
            values: values [1, H_kv, rows, D_v].
        """
        begin, end = self.length, self.length + keys.shape[2]
        assert end <= self.capacity, f"{end} rows in a cache of {self.capacity}"
        self.keys[:, :, begin:end] = keys
        self.values[:, :, begin:end] = values
        self.length = end
        padded = padded_rows(end)
        return self.keys[:, :, :padded], self.values[:, :, :padded]

    def keep(self, base: int, rows: Tensor) -> None:
        """Move the given rows (int64 [n], all >= base) to `base`, in order, and drop all rows after them."""
        end = base + rows.shape[0]
        if rows.shape[0]:
            self.keys[:, :, base:end] = self.keys.index_select(2, rows)
            self.values[:, :, base:end] = self.values.index_select(2, rows)
        self.length = end


class TreeCache:
    """The caches of all layers, which have equal length between passes.

    Args:
        shapes: KV shape of each layer.
        capacity: number of rows that must fit; rounded up to the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
    """

    def __init__(self, shapes: Sequence[KvShape], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = padded_rows(capacity)
        self.device = device
        self.layers = [LayerKv(shape, self.capacity, dtype, device) for shape in shapes]

    @property
    def length(self) -> int:
        """Number of rows held."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers)

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Keep the first `base` rows and then the given rows, in order; drop all others."""
        if list(rows) == list(range(base, base + len(rows))):  # already in place, as for a tree without branches
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
        """Drop every row from `length` on, including rows of a pass that stopped between layers."""
        for kv in self.layers:
            kv.length = length
