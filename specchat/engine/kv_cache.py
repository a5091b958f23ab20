"""The KV cache, in buffers allocated once: a pass appends rows of several sequences, and accepted rows are kept.

Each sequence has a seat: a region of every layer's buffer. A layer's cache is asked seat by seat, so layers that keep
something else than rows can take the place of `LayerKv`:

- `append(layout, keys, values)` stores the rows of `layout.current`, each part's rows in its own seat.
- `keep(seat, base, rows, index)` commits `base` rows and then the given ones, the accepted path of a tree.
- `truncate(seat, length)` drops all rows from `length` on, and returns the length that it reached. Rows since the last
  `keep` or `truncate` can always be dropped. A layer may reach less than a `length` before that; then all layers go
  back to the smallest length, so nobody may assume that a committed prefix can be cut anywhere for free.
- `wipe(seat, length)` also removes every trace of NaN in the rows dropped.

The buffers are plain tensors; `models.hf.attention` presents them to transformers as its cache. Recurrent layers keep a
running state instead of rows, or beside them; `RecurrentCache` holds the states of all of them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout
from specchat.engine.recurrent.cache import LayerStates, RecurrentCache
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
        rows = seats * capacity
        # One buffer for both where they have one shape: accepted rows then move in two kernels instead of four.
        sizes = [(2, shape.key_dim)] if shape.key_dim == shape.value_dim else [(1, shape.key_dim), (1, shape.value_dim)]
        # Zeros, not empty: padding rows have attention weight 0, and 0 x NaN would be NaN.
        self._buffers = [torch.zeros(n, shape.heads, rows, size, dtype=dtype, device=device) for n, size in sizes]
        self.capacity = capacity
        self.lengths = [0] * seats

    @property
    def keys(self) -> Tensor:
        """Keys of all seats [1, H_kv, rows, D]."""
        return self._buffers[0][:1]

    @property
    def values(self) -> Tensor:
        """Values of all seats [1, H_kv, rows, D_v]."""
        return self._buffers[-1][-1:]

    def resize(self, capacity: int) -> None:
        """Give each seat another number of rows, and keep all rows held; the old buffers are freed one by one."""
        assert self.length <= capacity
        for place, rows in enumerate(self._buffers):
            self._buffers[place] = _resized(rows, len(self.lengths), capacity)
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Number of rows of the longest sequence."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(rows.nbytes for rows in self._buffers)

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
            for buffer in self._buffers:
                buffer[:, :, to] = buffer.index_select(2, index)
        self.lengths[seat] = end

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on, and return the length reached: always `length`."""
        self.lengths[seat] = length
        return length

    def wipe(self, seat: int, length: int) -> None:
        """Drop a seat's rows from `length` on, and zero them."""
        self.truncate(seat, length)
        rows = slice(seat * self.capacity + length, (seat + 1) * self.capacity)
        for buffer in self._buffers:
            buffer[:, :, rows] = 0


def _resized(rows: Tensor, seats: int, capacity: int) -> Tensor:
    """Return a copy of a buffer [n, H, rows, D] whose seats have `capacity` rows each."""
    held = rows.unflatten(2, (seats, -1))[:, :, :, :capacity]
    resized = rows.new_zeros(*rows.shape[:2], seats * capacity, rows.shape[3])
    resized.unflatten(2, (seats, capacity))[:, :, :, : held.shape[3]] = held
    return resized


class TreeCache:
    """The caches of all layers, whose seats have equal lengths between passes.

    Args:
        shapes: shape of what each layer caches.
        capacity: number of rows that a seat must hold; rounded up to the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
        seats: number of sequences.
        tree_rows: most rows of a tree, which recurrent layers stash.
        grows: whether trees grow over several passes, as a draft's trees do.
        num_points: most restore points of recurrent layers.
        devices: device of each layer's buffers; None for `device` alone.

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
        seats: int = 1,
        *,
        tree_rows: int = 0,
        grows: bool = False,
        num_points: int = 0,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self.capacity = padded_rows(capacity)
        self.seats = seats
        self.device = device
        self._devices = [device] * len(shapes) if devices is None else list(devices)
        self.layers = [
            LayerKv(shape, seats, self.capacity, dtype, there)
            for shape, there in zip(shapes, self._devices, strict=True)
        ]
        self.recurrent: RecurrentCache | None = None
        self.max_tree_rows = self.capacity
        states = [shape.state for shape in shapes]
        if any(states):
            self.max_tree_rows = tree_rows
            self.recurrent = RecurrentCache(
                states,
                tree_rows,
                seats=seats,
                grows=grows,
                num_points=num_points,
                dtype=dtype,
                devices=self._devices,
            )
        with_rows = [layer for layer, shape in zip(self.layers, shapes, strict=True) if shape.heads]
        self._measure: LayerKv | RecurrentCache = with_rows[0] if with_rows else self.recurrent or self.layers[0]

    @property
    def states(self) -> list[LayerStates | None]:
        """States of each layer; None for layers without a state."""
        return [None] * len(self.layers) if self.recurrent is None else self.recurrent.layers

    @property
    def lengths(self) -> list[int]:
        """Number of rows held in each seat."""
        return list(self._measure.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, without restore points, which lie in host memory."""
        rows = sum(layer.nbytes for layer in self.layers)
        return rows + (0 if self.recurrent is None else self.recurrent.nbytes)

    def resize(self, capacity: int) -> None:
        """Give each seat room for more rows, or fewer, rounded up to the alignment; only between passes."""
        capacity = padded_rows(capacity)
        if capacity != self.capacity:
            for layer in self.layers:
                layer.resize(capacity)
            if self.recurrent is None:
                self.max_tree_rows = capacity
            self.capacity = capacity

    def begin(self, layout: PassLayout) -> None:
        """Begin a pass over the rows of a layout."""
        if self.recurrent is not None:
            self.recurrent.begin(layout)

    def end(self) -> None:
        """End a pass that has computed all layers."""
        if self.recurrent is not None:
            self.recurrent.end()

    def mark(self, seat: int, lengths: Iterable[int]) -> None:
        """Set the lengths at which a seat's next rows in sequence leave restore points of recurrent layers."""
        if self.recurrent is not None:
            self.recurrent.mark(seat, lengths)

    def save(self, seat: int) -> None:
        """Save a restore point of recurrent layers at a seat's current length."""
        if self.recurrent is not None:
            self.recurrent.save(seat)

    def keep(self, seat: int, base: int, rows: Sequence[int]) -> None:
        """Keep a seat's first `base` rows and then the given rows, in order; drop all others."""
        if self.recurrent is not None:
            self.recurrent.keep(seat, base, rows)
        index: dict[torch.device, Tensor] = {}
        if list(rows) != list(range(base, base + len(rows))):  # else already in place, as for a tree without branches
            places = [seat * self.capacity + row for row in rows]
            index = {each: torch.tensor(places, dtype=torch.int64, device=each) for each in set(self._devices)}
        for layer, device in zip(self.layers, self._devices, strict=True):
            layer.keep(seat, base, rows, index.get(device))

    def wipe(self, seat: int, length: int) -> None:
        """Forget a seat's rows from `length` on and zero them, after a pass that stored NaN or infinity."""
        if self.recurrent is not None:
            self.recurrent.truncate(seat, length)
        for layer in self.layers:
            layer.wipe(seat, length)

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on, including rows of a pass that stopped between layers.

        Returns:
            Rows left, equal in all layers; `length`, or less if a layer cannot go back to `length` itself.
        """
        if self.recurrent is not None:
            length = self.recurrent.truncate(seat, length)
        while (reached := min(layer.truncate(seat, length) for layer in self.layers)) < length:
            length = reached
        return length
