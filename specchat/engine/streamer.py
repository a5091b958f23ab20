"""Streamed layers: each has a fixed slot, its parameters are views of that slot, and only bytes move.

The j-th streamed layer lives in slot j mod N for ever. A slot is handed over by itself: filled, used, free again. The
queue of fills runs on across layers and passes, so the next pass's first slots fill while the draft grows its tree.
Here: what all streamers promise, and the one for CUDA, which copies from host memory on a stream of its own. The ones
for a machine without a GPU are in disk.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specchat.models.weights import LayerLayout, bind

FillLayer = Callable[[int, Mapping[str, Tensor]], None]


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


class CudaStreamer(LayerStreamer):
    """Fills slots in device memory from host memory, on a stream of its own. Unmeasured: no GPU was at hand yet.

    Args:
        layers: the decoder layers; the streamed ones' parameters become views of slots.
        streamed: their indices, ascending.
        num_slots: slots to make.
        fill: reads one layer's parameters into given host views; called once per layer, here.
        device: the CUDA device.
    """

    def __init__(
        self, layers: Sequence[Any], streamed: Sequence[int], num_slots: int, fill: FillLayer, device: torch.device
    ) -> None:
        self._position = {index: j for j, index in enumerate(streamed)}
        self._layouts = [LayerLayout.of(layers[index]) for index in streamed]
        slot_bytes = max(layout.nbytes for layout in self._layouts)
        self._slots = [torch.zeros(slot_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        for j, index in enumerate(streamed):
            bind(layers[index], self._layouts[j].views(self._slots[j % num_slots]))
        self._host = HostStore(self._layouts)
        for j, index in enumerate(streamed):
            fill(index, self._layouts[j].views(self._host.blob(j)))
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event(enable_timing=True) for _ in streamed]
        self._used = [torch.cuda.Event() for _ in range(num_slots)]
        self._done = [torch.cuda.Event() for _ in streamed]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._num_bytes = 0
        self._wait_s = 0.0
        self._fill_first_slots()

    def acquire(self, index: int) -> None:
        """Makes the device's queue wait for the copy, and the host for the layer `slots + 1` before.

        Without the second wait the host would queue the whole pass at once and could not stop it between layers.
        """
        j = self._position[index]
        behind = j - (len(self._slots) + 1)
        if behind >= 0:
            self._done[behind].synchronize()
        compute = torch.cuda.current_stream(self._device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(compute)
        compute.wait_event(self._filled[j])
        after.record(compute)
        self._waits.append((before, after))
        self._num_bytes += self._layouts[j].nbytes

    def release(self, index: int) -> None:
        """Queues the copy of the next layer that lives in this slot, behind the computing just queued."""
        j = self._position[index]
        compute = torch.cuda.current_stream(self._device)
        self._done[j].record(compute)
        self._used[j % len(self._slots)].record(compute)
        self._copy(self._next_in_slot(j))

    def restart(self) -> None:
        """Refills the slots with the first layers, behind whatever is still queued."""
        compute = torch.cuda.current_stream(self._device)
        for used in self._used:
            used.record(compute)
        self._fill_first_slots()

    def counters(self) -> StreamCounters:
        """Bytes copied and seconds that the device's queue stood waiting; waits for the passes queued so far."""
        for before, after in self._waits:
            after.synchronize()
            self._wait_s += before.elapsed_time(after) / 1e3
        self._waits.clear()
        return StreamCounters(self._num_bytes, self._wait_s)

    def close(self) -> None:
        """Waits for copies under way and gives the pinned memory back."""
        self._copies.synchronize()
        self._host.close()

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._slots), len(self._layouts))):
            self._copy(j)

    def _next_in_slot(self, j: int) -> int:
        """The layer that follows j in its slot: N further on, or the slot's own first layer in the next pass."""
        following = j + len(self._slots)
        return following if following < len(self._layouts) else j % len(self._slots)

    def _copy(self, j: int) -> None:
        slot = j % len(self._slots)
        nbytes = self._layouts[j].nbytes
        self._copies.wait_event(self._used[slot])
        with torch.cuda.stream(self._copies):
            self._slots[slot][:nbytes].copy_(self._host.blob(j), non_blocking=True)
            self._filled[j].record(self._copies)


class HostStore:
    """Layer blobs in one slab of host memory, pinned where the system allows it.

    One slab registered by hand: torch's own pinned allocator rounds every block up to a power of two.
    """

    def __init__(self, layouts: Sequence[LayerLayout]) -> None:
        self._begins = [0]
        for layout in layouts:
            self._begins.append(self._begins[-1] + layout.nbytes)
        self._slab = torch.empty(self._begins[-1], dtype=torch.uint8)
        error = torch.cuda.cudart().cudaHostRegister(self._slab.data_ptr(), self._slab.nbytes, 0)
        self.pinned = int(error) == 0

    def blob(self, j: int) -> Tensor:
        """The j-th layer's bytes: uint8 [nbytes]."""
        return self._slab[self._begins[j] : self._begins[j + 1]]

    def close(self) -> None:
        """Unpins the slab."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._slab.data_ptr())
            self.pinned = False
