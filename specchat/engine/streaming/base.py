"""The interface of layer streamers. A streamed layer's parameters are views of one fixed slot, and only bytes move.

The j-th streamed layer always uses slot j mod N. Each slot cycles on its own: filled, used, free. The queue of fills
continues across layers and passes, so the next pass's first slots fill while the draft grows its tree. Streamers for
machines without a GPU are in cpu.py, the streamer for CUDA is in cuda.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamCounters:
    """Bytes of streamed layers that passes used, and seconds that passes waited for them, since loading."""

    num_bytes: int
    wait_s: float


class LayerStreamer(ABC):
    """Provides streamed layers to passes, in order.

    A pass acquires and releases every streamed layer once, ascending. Call `restart` after a pass that stopped early.
    """

    @abstractmethod
    def acquire(self, index: int) -> None:
        """Wait until the layer's bytes are in its slot, or make the device's queue wait for them."""

    @abstractmethod
    def release(self, index: int) -> None:
        """Allow the layer's slot to be refilled, after the layer has been computed or queued."""

    @abstractmethod
    def restart(self) -> None:
        """Start again with the first streamed layer, after a pass that stopped early."""

    @abstractmethod
    def restream(self, streamed: Sequence[int]) -> None:
        """Stream the given layers from now on, and start with the first one; only between passes.

        Args:
            streamed: indices of the streamed layers, ascending; among them all that were streamed so far.
        """

    @abstractmethod
    def counters(self) -> StreamCounters:
        """Return the totals so far."""

    @abstractmethod
    def close(self) -> None:
        """Stop filling, and release memory and threads."""


class NoStreamer(LayerStreamer):
    """Streamer of a model whose layers are all resident."""

    def acquire(self, index: int) -> None:
        """Do nothing: the layer is resident."""

    def release(self, index: int) -> None:
        """Do nothing: the layer is resident."""

    def restart(self) -> None:
        """Do nothing: there are no slots."""

    def restream(self, streamed: Sequence[int]) -> None:
        """Do nothing: there is no source of layers."""
        assert not streamed

    def counters(self) -> StreamCounters:
        """Return zeros."""
        return StreamCounters(0, 0.0)

    def close(self) -> None:
        """Do nothing: there are no threads and no slots."""
