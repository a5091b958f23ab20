"""The layer streamer for CUDA devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from specchat.engine.streaming.base import LayerStreamer, StreamCounters
from specchat.engine.streaming.host_layers import HostLayers
from specchat.models.weights.layout import LayerLayout, bind


class CudaStreamer(LayerStreamer):
    """Fills slots in device memory from host memory.

    Args:
        layers: decoder layers; the parameters of streamed layers become views of slots.
        streamed: indices of the layers that are streamed at first, ascending.
        num_slots: number of slots to allocate, each for the largest layer of the host memory.
        host: layers in host memory, those of later stages among them; closed together with this streamer.
        device: CUDA device of the slots.
    """

    def __init__(
        self, layers: Sequence[Any], streamed: Sequence[int], num_slots: int, host: HostLayers, device: torch.device
    ) -> None:
        self._layers = layers
        self._host = host
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._slots = _new_slots(num_slots, host.largest_bytes, device)
        self._num_bytes = 0
        self._wait_s = self._link_s = 0.0
        self._copied: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begin(streamed)

    def _begin(self, streamed: Sequence[int]) -> None:
        """Bind the layers to slots and start copying."""
        self._streamed = list(streamed)
        self._position = {index: j for j, index in enumerate(streamed)}
        layouts = [LayerLayout.of(self._layers[index]) for index in streamed]
        self._nbytes = [layout.nbytes for layout in layouts]
        for j, index in enumerate(streamed):
            bind(self._layers[index], layouts[j].views(self._slots[j % len(self._slots)]))
        # The host waits for these events in every pass; without `blocking`, it would spin on one core.
        self._filled = [torch.cuda.Event(blocking=True) for _ in streamed]
        self._used = [torch.cuda.Event() for _ in self._slots]
        self._done = [torch.cuda.Event(blocking=True) for _ in streamed]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._free_slots()
        self._fill_first_slots()

    def acquire(self, index: int) -> None:
        """Make the device's queue wait for the layer's copy, and the host wait for the layer `slots + 1` before.

        Without the second wait, the host would queue the whole pass at once and could not cancel it between layers.
        """
        j = self._position[index]
        behind = j - (len(self._slots) + 1)
        if behind >= 0:
            self._done[behind].synchronize()
        if not self._host.keeps(j):  # a layer from disk: its copy can be queued only after the disk read
            self._copy(j)
        compute = torch.cuda.current_stream(self._device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(compute)
        compute.wait_event(self._filled[j])
        after.record(compute)
        self._waits.append((before, after))
        self._num_bytes += self._nbytes[j]

    def release(self, index: int) -> None:
        """Queue the copy of the slot's next layer, after the computation that was just queued."""
        j = self._position[index]
        compute = torch.cuda.current_stream(self._device)
        self._done[j].record(compute)
        self._used[j % len(self._slots)].record(compute)
        self._copy_if_there(self._next_in_slot(j))

    def restart(self) -> None:
        """Refill the slots with the first layers, after all queued work."""
        self._free_slots()
        self._host.restart()
        self._fill_first_slots()

    @property
    def kept(self) -> dict[int, int]:
        """Bytes of the layers that stay in host memory, by index; among them those that are streamed only later."""
        return self._host.kept

    def host_slots(self, given: Collection[int]) -> tuple[int, int]:
        """Return number and size in bytes of the slots in host memory if these layers do not stay there."""
        return self._host.slots_without(given)

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> None:
        """Stream further layers from now on, and release host memory of layers; between passes, after all queued work.

        Args:
            leaving: layers that were not streamed so far.
            given: layers that are read from the disk from now on, whenever they are streamed.
        """
        self.counters()
        self._copies.synchronize()
        streamed = sorted({*self._streamed, *leaving})
        self._host.select(streamed, given)
        self._begin(streamed)

    def bring_back(self, returning: Sequence[int]) -> None:
        """Copy streamed layers into device memory of their own; between passes, after all queued work."""
        self.counters()
        self._copies.synchronize()
        self._host.select([])
        for index in returning:
            layout = LayerLayout.of(self._layers[index])
            bind(self._layers[index], layout.views(self._host.read(index).to(self._device)))
        streamed = [index for index in self._streamed if index not in set(returning)]
        self._host.select(streamed)
        self._begin(streamed)

    def counters(self) -> StreamCounters:
        """Return bytes copied, and seconds that copies took, the device waited for them, and the host for the disk.

        Waits for the passes queued so far.
        """
        for before, after in self._waits:
            after.synchronize()
            self._wait_s += before.elapsed_time(after) / 1e3
        self._waits.clear()
        while self._copied and self._copied[0][1].query():  # copies for the next pass may be in progress
            before, after = self._copied.pop(0)
            self._link_s += before.elapsed_time(after) / 1e3
        self._host.reuse_slot()  # else the last layer's slot would wait for the next pass, while the draft runs
        return StreamCounters(self._num_bytes, self._wait_s + self._host.wait_s, link_s=self._link_s)

    def close(self) -> None:
        """Wait for queued copies and release the host memory."""
        self._copies.synchronize()
        self._host.close()

    def _free_slots(self) -> None:
        """Allow slots to be filled after all queued work: computations on the slots, and at first their zeroing.

        Without this, the first copies could overtake the zeroing, which is queued on another stream.
        """
        compute = torch.cuda.current_stream(self._device)
        for used in self._used:
            used.record(compute)

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._slots), len(self._nbytes))):
            self._copy_if_there(j)

    def _next_in_slot(self, j: int) -> int:
        """Return the layer after j in the same slot: j + N, or the slot's first layer in the next pass."""
        following = j + len(self._slots)
        return following if following < len(self._nbytes) else j % len(self._slots)

    def _copy_if_there(self, j: int) -> None:
        if self._host.keeps(j):
            self._copy(j)

    def _copy(self, j: int) -> None:
        slot, blob = j % len(self._slots), self._host.take(j)
        self._copies.wait_event(self._used[slot])
        with torch.cuda.stream(self._copies):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(self._copies)
            _copy_async(self._slots[slot][: self._nbytes[j]], blob)
            self._filled[j].record(self._copies)
            after.record(self._copies)
        self._copied.append((before, after))
        self._host.give_back(j, self._filled[j].synchronize)


def _new_slots(num_slots: int, nbytes: int, device: torch.device) -> list[Tensor]:
    """Allocate zeroed slots on the device; the zeroing is queued on the current stream."""
    return [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]


def _copy_async(slot: Tensor, blob: Tensor) -> None:
    """Queue a copy on the current stream; the host does not wait if the blob is pinned."""
    slot.copy_(blob, non_blocking=True)
