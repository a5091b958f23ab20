"""The KV cache, in buffers allocated once: a pass appends rows of several sequences, and accepted rows are kept.

Each sequence has a seat: a region of every layer's rows. Layers of one shape share buffers, so that the rows of all of
them move at once. A layer's cache is asked seat by seat, so layers that keep something else than rows can take the
place of `LayerKv`:

- `append(layout, keys, values)` stores the rows of `layout.current`, each part's rows in its own seat.
- `keep(seat, length)` commits `length` rows, after the accepted path of a tree was moved behind the rows before it.
- `truncate(seat, length)` drops all rows from `length` on, and returns the length that it reached. Rows since the last
  `keep` or `truncate` can always be dropped. A layer may reach less than a `length` before that; then all layers go
  back to the smallest length, so nobody may assume that a committed prefix can be cut anywhere for free.

The buffers are plain tensors; `models.hf.attention` presents them to transformers as its cache. Recurrent layers keep a
running state instead of rows, or beside them; `RecurrentCache` holds the states of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from specchat.engine.fixed_layout import FixedLayout
from specchat.engine.layout import PassLayout
from specchat.engine.recurrent.cache import LayerStates, RecurrentCache
from specchat.records.kv_slabs import slabs_of
from specchat.records.limits import padded_rows
from specchat.records.model import KvShape


class _Slab:
    """Keys and values of all seats for several layers of one shape, so that one kernel moves the rows of all.

    Args:
        shape: number of heads, and sizes of keys and values.
        layers: layers, which take the new buffers; the rows that they hold are copied.
        capacity: number of rows of a seat, a multiple of the alignment.
        dtype: dtype of keys and values.
        device: device of the buffers.
    """

    def __init__(
        self, shape: KvShape, layers: Sequence[LayerKv], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        # One buffer for keys and values where they have one shape: accepted rows then move in two kernels, not four.
        sizes = [(2, shape.key_dim)] if shape.key_dim == shape.value_dim else [(1, shape.key_dim), (1, shape.value_dim)]
        rows = len(layers[0].lengths) * capacity
        # Zeros, not empty: padding rows have attention weight 0, and 0 x NaN would be NaN.
        self._buffers = [
            torch.zeros(len(layers), count, shape.heads, rows, size, dtype=dtype, device=device)
            for count, size in sizes
        ]
        self._layers = layers
        for place, layer in enumerate(layers):
            layer.take(self, self._buffers[0][place, :1], self._buffers[-1][place, -1:], capacity)

    @property
    def is_used(self) -> bool:
        """Whether a layer's rows are in these buffers."""
        return any(layer.slab is self for layer in self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(rows.nbytes for rows in self._buffers)

    @property
    def address(self) -> int:
        """Address of the first buffer."""
        return self._buffers[0].data_ptr()

    def move(self, index: Tensor, to: slice) -> None:
        """Move rows of all layers.

        Args:
            index: places of the rows, int64 [n].
            to: places that they are moved to.
        """
        for rows in self._buffers:
            if rows.numel():
                rows[..., to, :] = rows.index_select(3, index)

    def zero(self, places: slice) -> None:
        """Zero rows of all layers."""
        for rows in self._buffers:
            rows[..., places, :] = 0


class LayerKv:
    """One layer's keys and values of all seats.

    Args:
        seats: number of sequences.

    Attributes:
        slab: owner of the buffers.
        keys: keys of all seats [1, H_kv, seats * capacity, D].
        values: values of all seats [1, H_kv, seats * capacity, D_v].
        capacity: number of rows of a seat, a multiple of the alignment.
        lengths: number of rows held in each seat.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, seats: int) -> None:
        self.slab: _Slab | None = None
        self.capacity = 0
        self.lengths = [0] * seats

    def take(self, slab: _Slab, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Take empty buffers, and copy the rows that are held to them; see the attributes."""
        assert self.length <= capacity
        if self.slab is not None:
            _copy_rows(self.keys, keys, len(self.lengths))
            _copy_rows(self.values, values, len(self.lengths))
        self.slab, self.keys, self.values, self.capacity = slab, keys, values, capacity

    @property
    def length(self) -> int:
        """Number of rows of the longest sequence."""
        return max(self.lengths)

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
        if isinstance(layout, FixedLayout):
            return self._append_fixed(layout, keys, values)
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

    def _append_fixed(self, layout: FixedLayout, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store rows where the device says, and return the rows that may be seen; `TreeCache.advance` counts them."""
        self.keys.index_copy_(2, layout.rows.places, keys)
        self.values.index_copy_(2, layout.rows.places, values)
        begin = layout.first_seat * self.capacity
        end = begin + layout.rows.length
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def keep(self, seat: int, length: int) -> None:
        """Take over the length of a seat whose kept rows were moved into place."""
        self.lengths[seat] = length

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows from `length` on, and return the length reached: always `length`."""
        self.lengths[seat] = length
        return length


def _copy_rows(held: Tensor, to: Tensor, seats: int) -> None:
    """Copy the rows of all seats to a buffer whose seats have more rows, or fewer; both are [..., rows, D]."""
    old, new = held.unflatten(-2, (seats, -1)), to.unflatten(-2, (seats, -1))
    num_rows = min(old.shape[-2], new.shape[-2])
    new[..., :num_rows, :] = old[..., :num_rows, :]


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
        self.layers = [LayerKv(seats) for _ in shapes]
        self._shapes = tuple(shapes)
        self._devices = [device] * len(shapes) if devices is None else list(devices)
        self._dtype = dtype
        self._slabs = list[_Slab]()
        self._allocate(self.capacity)
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
        rows = sum(slab.nbytes for slab in self._slabs)
        return rows + (0 if self.recurrent is None else self.recurrent.nbytes)

    def resize(self, capacity: int) -> None:
        """Give each seat room for more rows, or fewer, rounded up to the alignment; only between passes."""
        capacity = padded_rows(capacity)
        if capacity != self.capacity:
            self._allocate(capacity)
            if self.recurrent is None:
                self.max_tree_rows = capacity
            self.capacity = capacity

    def _allocate(self, capacity: int) -> None:
        """Let all layers take new buffers; each old one is freed as soon as its layers have left it."""
        for device in dict.fromkeys(self._devices):
            there = [index for index, each in enumerate(self._devices) if each == device]
            shapes = [self._shapes[index] for index in there]
            for places in slabs_of(shapes, self.seats * capacity, self._dtype.itemsize, device.type):
                layers = [self.layers[there[place]] for place in places]
                slab = _Slab(shapes[places[0]], layers, capacity, self._dtype, device)
                self._slabs = [*(each for each in self._slabs if each.is_used), slab]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the buffers, and the rows of a seat: what changes when the buffers do."""
        return (self.capacity, *(slab.address for slab in self._slabs))

    def advance(self, seat: int, num_rows: int) -> None:
        """Count the rows that a pass over fixed rows has stored behind those of a seat."""
        for layer in self.layers:
            layer.keep(seat, layer.lengths[seat] + num_rows)

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
        keep_together([Kept(self, seat, base, rows)])

    def commit(self, kept: Kept, index: Tensor) -> None:
        """Keep rows of a seat; see `keep_together`.

        Args:
            kept: rows that stay.
            index: places of the rows that have to move, int64 [n]; empty if they are in place.
        """
        if self.recurrent is not None:
            self.recurrent.keep(kept.seat, kept.base, kept.rows)
        end = kept.base + len(kept.rows)
        if len(index):
            offset = kept.seat * self.capacity
            there = {device: index.to(device) for device in set(self._devices)}
            for slab in self._slabs:
                slab.move(there[slab.device], slice(offset + kept.base, offset + end))
        for layer in self.layers:
            layer.keep(kept.seat, end)

    def wipe(self, seat: int, length: int) -> None:
        """Forget a seat's rows from `length` on and zero them, after a pass that stored NaN or infinity."""
        if self.recurrent is not None:
            self.recurrent.truncate(seat, length)
        for slab in self._slabs:
            slab.zero(slice(seat * self.capacity + length, (seat + 1) * self.capacity))
        for layer in self.layers:
            layer.truncate(seat, length)

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


@dataclass(frozen=True)
class Kept:
    """Rows of a seat that stay after a pass: the first `base` ones, and then the given ones, in order.

    Attributes:
        cache: cache that holds the rows.
        seat: region of the sequence.
        base: number of rows that stay where they are.
        rows: rows to keep behind them, all >= base.
    """

    cache: TreeCache
    seat: int
    base: int
    rows: Sequence[int]

    @property
    def places(self) -> list[int]:
        """Places of the rows in the buffers; empty if they are in place already, as for a tree without branches."""
        if list(self.rows) == list(range(self.base, self.base + len(self.rows))):
            return []
        offset = self.seat * self.cache.capacity
        return [offset + row for row in self.rows]


def keep_together(keeps: Sequence[Kept]) -> None:
    """Keep rows in caches of one device, and drop all others of their seats; places cross the link in one copy."""
    places = [kept.places for kept in keeps]
    moved = list(chain.from_iterable(places))
    device = keeps[0].cache.device if moved else torch.device("cpu")
    index = torch.tensor(moved, dtype=torch.int64, device=device)
    for kept, own in zip(keeps, index.split([len(each) for each in places]), strict=True):
        kept.cache.commit(kept, own)
