"""The KV cache, in buffers allocated once: a pass appends rows, and accepted rows are kept.

The buffers are plain tensors; `models.hf.attention` presents them to transformers as its cache. Layers with attention
store one row per token and can be truncated at any row. Recurrent layers store a running state, which can only return
to lengths that it still holds. So callers roll back only through `truncate`, and follow the length that it returns.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specchat.engine.attention import RowLayout
from specchat.engine.recurrent.cache import RecurrentCache
from specchat.engine.recurrent.state import LayerState
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
        shapes: shape of what each layer caches.
        capacity: number of rows that must fit; rounded up to the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
        tree_rows: most rows of a tree, which recurrent layers stash.
        grows: whether trees grow over several passes, as a draft's trees do.
        num_points: most restore points of recurrent layers.

    Attributes:
        recurrent: states of the recurrent layers; None without any.
        max_tree_rows: most rows of a tree.
    """

    def __init__(
        self,
        shapes: Sequence[KvShape],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tree_rows: int = 0,
        grows: bool = False,
        num_points: int = 0,
    ) -> None:
        self.capacity = padded_rows(capacity)
        self.device = device
        self.layers = [LayerKv(shape, self.capacity, dtype, device) for shape in shapes]
        self.recurrent: RecurrentCache | None = None
        self.max_tree_rows = self.capacity
        states = [shape.state for shape in shapes]
        if any(states):
            self.max_tree_rows = tree_rows
            self.recurrent = RecurrentCache(
                states, tree_rows, grows=grows, num_points=num_points, dtype=dtype, device=device
            )
        with_rows = [kv for kv, shape in zip(self.layers, shapes, strict=True) if shape.heads]
        self._measure: LayerKv | RecurrentCache = with_rows[0] if with_rows else self.recurrent or self.layers[0]

    @property
    def states(self) -> list[LayerState | None]:
        """State of each layer; None for layers without a state."""
        return [None] * len(self.layers) if self.recurrent is None else self.recurrent.layers

    @property
    def length(self) -> int:
        """Number of rows held."""
        return self._measure.length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, without restore points, which lie in host memory."""
        rows = sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers)
        return rows + (0 if self.recurrent is None else self.recurrent.nbytes)

    def begin(self, layout: RowLayout) -> None:
        """Begin a pass over the rows of a layout."""
        if self.recurrent is not None:
            self.recurrent.begin(layout)

    def end(self) -> None:
        """End a pass that has computed all layers."""
        if self.recurrent is not None:
            self.recurrent.end()

    def mark(self, lengths: Iterable[int]) -> None:
        """Set the lengths at which the next pass over rows in sequence saves restore points of recurrent layers."""
        if self.recurrent is not None:
            self.recurrent.mark(lengths)

    def save(self) -> None:
        """Save a restore point of recurrent layers at the current length."""
        if self.recurrent is not None:
            self.recurrent.save()

    def keep(self, base: int, rows: Sequence[int]) -> None:
        """Keep the first `base` rows and then the given rows, in order; drop all others."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        if self.recurrent is not None:
            self.recurrent.keep(base, index)
        if list(rows) == list(range(base, base + len(rows))):  # already in place, as for a tree without branches
            self._truncate_rows(base + len(rows))
            return
        for kv in self.layers:
            kv.keep(base, index)

    def wipe(self, length: int) -> None:
        """Forget every row from `length` on and zero it, after a pass that stored NaN or infinity."""
        self.truncate(length)
        for kv in self.layers:
            kv.keys[:, :, length:] = 0
            kv.values[:, :, length:] = 0

    def truncate(self, length: int) -> int:
        """Drop every row from `length` on, including rows of a pass that stopped between layers.

        Returns:
            The length reached: `length`, or less where recurrent layers hold no longer state.
        """
        if self.recurrent is not None:
            length = self.recurrent.truncate(length)
        self._truncate_rows(length)
        return length

    def _truncate_rows(self, length: int) -> None:
        for kv in self.layers:
            kv.length = length
