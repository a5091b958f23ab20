"""Streamed layers: each has a fixed slot, its parameters are views of that slot, and only bytes move.

The j-th streamed layer lives in slot j mod N for ever. A slot is handed over by itself: filled, used, free again. The
queue of fills runs on across layers and passes, so the next pass's first slots fill while the draft grows its tree.
Here is what all streamers promise. Those for a machine without a GPU are in disk.py, the one for CUDA in cuda.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamCounters:
    """Bytes of streamed layers that passes used, and how long they waited for them, since the engine was loaded."""

    num_bytes: int
    wait_s: float


class LayerStreamer(ABC):
    """Hands streamed layers to a pass, in order, and takes them back.

    A pass acquires and releases every streamed layer once, ascending. After a pass that stopped early, `restart`.
    """

    @abstractmethod
    def acquire(self, index: int) -> None:
        """Returns once the layer's bytes are in its slot, or once the device's queue will wait for them."""

    @abstractmethod
    def release(self, index: int) -> None:
        """The layer has been computed (or queued): its slot may be filled again."""

    @abstractmethod
    def restart(self) -> None:
        """Begins again with the first streamed layer, after a pass that was cut off."""

    @abstractmethod
    def counters(self) -> StreamCounters:
        """Totals so far."""

    @abstractmethod
    def close(self) -> None:
        """Stops filling and lets go of memory and threads."""


class NoStreamer(LayerStreamer):
    """Every layer is resident."""

    def acquire(self, index: int) -> None:
        """Nothing to wait for."""

    def release(self, index: int) -> None:
        """Nothing to hand over."""

    def restart(self) -> None:
        """Nothing was cut off."""

    def counters(self) -> StreamCounters:
        """Nothing moved."""
        return StreamCounters(0, 0.0)

    def close(self) -> None:
        """Nothing is held."""
