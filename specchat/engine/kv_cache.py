"""The KV cache, in buffers allocated once: a pass appends rows of several sequences, and accepted rows are kept.

Each sequence has a seat: a region of every layer's buffer. A layer's cache is asked seat by seat, so layers that keep
something else than rows (recurrent states) can take the place of `LayerKv`:

- `append(layout, keys, values)` stores the rows of `layout.current`, each part's rows in its own seat.
- `keep(seat, base, rows, index)` commits `base` rows and then the given ones, the accepted path of a tree.
- `truncate(seat, length)` drops all rows from `length` on, and returns the length that it reached. Rows since the last
  `keep` or `truncate` can always be dropped. A layer may reach less than a `length` before that; then all layers go
  back to the smallest length, so nobody may assume that a committed prefix can be cut anywhere for free.
- `wipe(seat, length)` also removes every trace of NaN in the rows dropped.

The buffers are plain tensors; `models.hf.attention` presents them to transformers as its cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout
from specchat.records.limits import padded_rows
from specchat.records.model import KvShape


class LayerKv:
    """One layer's keys and values of all seats, in one buffer.

    Args:
        shape: number of heads, and sizes of keys and values.
        seats: number of sequences.
        capacity: number of rows of a seat, a multiple of the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
    """

    def __init__(self, shape: KvShape, seats: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not empty: padding rows have attention weight 0, and 0 x NaN would be NaN.
        rows = seats * capacity
        self.keys = torch.zeros(1, shape.heads, rows, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(1, shape.heads, rows, shape.value_dim, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * seats

    @property
    def length(self) -> int:
        """Number of rows of the longest sequence."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, layout: PassLayout, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk's rows in their seats, and return the buffer from the pass's lowest to its highest seat.

        Models with latent attention expand everything that is returned, so other seats are left out.

        Args:
            layout: parts of the pass, with the chunk that is computed now.
            keys: keys [1, H_kv, rows, D] of the chunk.
            values: values [1, H_kv, rows, D_v] of the chunk.

        Returns:
            Keys and values of the seats; the last one is cut after its rows, padded to the alignment.
        """
        for part, rows in layout.current:
            held = self.lengths[part.seat]
            length = held + rows.stop - rows.start
            assert length <= self.capacity, f"{length} rows in a seat of {self.capacity}"
            offset = part.seat * self.capacity
            self.keys[:, :, offset + held : offset + length] = keys[:, :, rows]
            self.values[:, :, offset + held : offset + length] = values[:, :, rows]
            self.lengths[part.seat] = length
        begin, last = layout.first_seat * self.capacity, layout.last_seat
        end = last * self.capacity + padded_rows(self.lengths[last])
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def keep(self, seat: int, base: int, rows: Sequence[int], index: Tensor | None) -> None:
        """Move the given rows of a seat to `base`, in order, and drop all rows after them.

        Args:
            seat: region of the sequence.
            base: number of rows that stay where they are.
            rows: rows to keep, all >= base.
            index: places of `rows` in the buffer, int64 [n]; None if the rows are at `base` already.
        """
        end = base + len(rows)
        if index is not None:
            to = slice(seat * self.capacity + base, seat * self.capacity + end)
            self.keys[:, :, to] = self.keys.index_select(2, index)
            self.values[:, :, to] = self.values.index_select(2, index)
        self.lengths[seat] = end

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on, and return the length reached: always `length`."""
        self.lengths[seat] = length
        return length

    def wipe(self, seat: int, length: int) -> None:
        """Drop a seat's rows from `length` on, and zero them."""
        self.truncate(seat, length)
        rows = slice(seat * self.capacity + length, (seat + 1) * self.capacity)
        self.keys[:, :, rows] = 0
        self.values[:, :, rows] = 0


class TreeCache:
    """The caches of all layers, whose seats have equal lengths between passes.

    Args:
        shapes: KV shape of each layer.
        capacity: number of rows that a seat must hold; rounded up to the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
        seats: number of sequences.
    """

    def __init__(
        self, shapes: Sequence[KvShape], capacity: int, dtype: torch.dtype, device: torch.device, seats: int = 1
    ) -> None:
        self.capacity = padded_rows(capacity)
        self.seats = seats
        self.device = device
        self.layers = [LayerKv(shape, seats, self.capacity, dtype, device) for shape in shapes]

    @property
    def lengths(self) -> list[int]:
        """Number of rows held in each seat."""
        return list(self.layers[0].lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def keep(self, seat: int, base: int, rows: Sequence[int]) -> None:
        """Keep a seat's first `base` rows and then the given rows, in order; drop all others."""
        index = None
        if list(rows) != list(range(base, base + len(rows))):  # else already in place, as for a tree without branches
            offset = seat * self.capacity
            index = torch.tensor([offset + row for row in rows], dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.keep(seat, base, rows, index)

    def wipe(self, seat: int, length: int) -> None:
        """Forget a seat's rows from `length` on and zero them, after a pass that stored NaN or infinity."""
        for layer in self.layers:
            layer.wipe(seat, length)

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on, including rows of a pass that stopped between layers.

        Returns:
            Rows left, equal in all layers; `length`, or less if a layer cannot go back to `length` itself.
        """
        while (reached := min(layer.truncate(seat, length) for layer in self.layers)) < length:
            length = reached
        return length
