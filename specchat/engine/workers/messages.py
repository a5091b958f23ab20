"""The contents of messages: layouts of passes, changes of caches between passes, and totals of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from specchat.engine.kv_cache import Kept, TreeCache
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.streaming.base import DeviceCounters, StreamCounters

# A method of `TreeCache` and its arguments.
CacheChange = Sequence[Any]


class RecordedCache(TreeCache):
    """A cache that remembers its changes between passes, which the caches of other ranks must follow."""

    _changes: list[CacheChange]

    def take_changes(self) -> list[CacheChange]:
        """Return all changes since the last call."""
        changes, self._changes = self._recorded(), []
        return changes

    def commit(self, kept: Kept, index: Tensor) -> None:
        """Keep rows of a seat; see `TreeCache`."""
        self._recorded().append(["keep", kept.seat, kept.base, list(kept.rows)])
        super().commit(kept, index)

    def wipe(self, seat: int, length: int) -> None:
        """Forget and zero a seat's rows; see `TreeCache`."""
        self._recorded().append(["wipe", seat, length])
        super().wipe(seat, length)

    def truncate(self, seat: int, length: int) -> int:
        """Drop a seat's rows; see `TreeCache`."""
        self._recorded().append(["truncate", seat, length])
        return super().truncate(seat, length)

    def _recorded(self) -> list[CacheChange]:
        if not hasattr(self, "_changes"):
            self._changes = []
        return self._changes


def follow(cache: TreeCache, changes: Sequence[CacheChange]) -> None:
    """Make the changes of another rank's cache."""
    for name, *arguments in changes:
        assert name in ("keep", "wipe", "truncate")
        getattr(cache, name)(*arguments)


def counter_values(counters: DeviceCounters) -> dict[str, Any]:
    """Return totals as plain values."""
    return asdict(counters)


def counters_of(values: Mapping[str, Any]) -> DeviceCounters:
    """Return the totals of `counter_values`."""
    streamed = StreamCounters(**{**values["streamed"], "by_device": ()})
    return DeviceCounters(**{**values, "streamed": streamed})


def layout_values(layout: PassLayout) -> list[Any]:
    """Return a layout as plain values."""
    return [
        [
            part.seat,
            part.layout.prefix,
            part.layout.num_linear,
            part.layout.positions.tolist(),
            list(part.layout.ancestors.shape),
            _packed(part.layout.ancestors),
        ]
        for part in layout.parts
    ]


def layout_of(values: Sequence[Any]) -> PassLayout:
    """Return the layout of `layout_values`."""
    return PassLayout(
        (seat, RowLayout(prefix, num_linear, _unpacked(shape, text), torch.tensor(positions, dtype=torch.int64)))
        for seat, prefix, num_linear, positions, shape, text in values
    )


def _packed(mask: Tensor) -> str:
    """Return the values of a mask as bits in hexadecimal digits."""
    bits = "".join("1" if each else "0" for each in mask.flatten().tolist())
    return f"{int('1' + bits, 2):x}"


def _unpacked(shape: Sequence[int], text: str) -> Tensor:
    bits = f"{int(text, 16):b}"[1:]
    return torch.tensor([each == "1" for each in bits], dtype=torch.bool).view(*shape)
