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
    """Totals since loading.

    Attributes:
        num_bytes: bytes of streamed layers that passes used, or of experts that passes read.
        wait_s: seconds that passes waited for them.
        expert_hits: experts that were in their slots when a layer used them.
        expert_misses: experts that had to be read, among them useful guesses.
        useful_guesses: experts that were read before their router named them.
        useless_guesses: experts that were read, but that no router named.
        link_s: seconds in which at least one layer was being read or copied; 0 where that is not measured.
        by_device: totals of each device if there are several, else empty.
    """

    num_bytes: int
    wait_s: float
    expert_hits: int = 0
    expert_misses: int = 0
    useful_guesses: int = 0
    useless_guesses: int = 0
    link_s: float = 0.0
    by_device: tuple[StreamCounters, ...] = ()


@dataclass(frozen=True)
class DeviceCounters:
    """Totals of one of several devices since loading.

    Attributes:
        streamed: totals of its streamed layers.
        compute_s: seconds that it computed layers.
        row_wait_s: seconds that passes waited on it for rows of other machines.
        sent_bytes: bytes of rows that it sent to other machines.
        peak_bytes: most memory that was in use, if the device itself knows; else None.
    """

    streamed: StreamCounters
    compute_s: float
    row_wait_s: float = 0.0
    sent_bytes: int = 0
    peak_bytes: int | None = None


def total(counters: Sequence[StreamCounters]) -> StreamCounters:
    """Return the totals of several streamers of whole layers."""
    return StreamCounters(
        num_bytes=sum(each.num_bytes for each in counters),
        wait_s=sum(each.wait_s for each in counters),
        link_s=sum(each.link_s for each in counters),
    )


class LayerStreamer(ABC):
    """Provides streamed layers to passes, in order.

    Attributes:
        kept_bytes: bytes of device memory besides the parameters.
        steps_s: wall time of all steps so far.

    A pass acquires and releases every streamed layer once, ascending. Call `restart` after a pass that stopped early.
    """

    kept_bytes: int = 0
    steps_s: float = 0.0

    def begin(self, num_rows: int) -> None:  # noqa: B027 - most streamers need not know
        """Begin a pass over some rows."""

    @abstractmethod
    def acquire(self, index: int) -> None:
        """Wait until the layer's bytes are in its slot, or make the device's queue wait for them."""

    @abstractmethod
    def release(self, index: int) -> None:
        """Allow the layer's slot to be refilled, after the layer has been computed or queued."""

    @abstractmethod
    def restart(self) -> None:
        """Start again with the first streamed layer, after a pass that stopped early."""

    def passed(self, seconds: float) -> None:
        """Add up the wall time of whole steps, of which links and devices were busy for a part."""
        self.steps_s += seconds

    @abstractmethod
    def counters(self) -> StreamCounters:
        """Return the totals so far."""

    def experts_used(self) -> bytes:
        """Return the experts that the last pass used, as `Step.experts_used`; empty if none are read one by one."""
        return b""

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

    def counters(self) -> StreamCounters:
        """Return zeros."""
        return StreamCounters(0, 0.0)

    def close(self) -> None:
        """Do nothing: there are no threads and no slots."""
