"""Streamers of one device or of several: each device has slots, a link and an order of layers of its own.

Layers that devices take in turn arrive over all links at the same time. One pass acquires them in order, whichever
device they are for, while the reader threads and copies of every device go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from specchat.engine.device import current
from specchat.engine.streaming.base import LayerStreamer, NoStreamer, StreamCounters, total
from specchat.engine.streaming.cpu import MixedStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, pinner
from specchat.engine.streaming.kept import CpuTiers, KeptLayers, KeptOnDevices, NothingKept, PinnedLayers
from specchat.engine.streaming.readers import LayerReader, SharedReader, layer_reader_for
from specchat.models.packs.pack import Pack
from specchat.models.weights.reader import WeightReader
from specchat.records.plan import Placement


@dataclass(frozen=True)
class LayerFiles:
    """The layers of a model, and the files that they are read from.

    Attributes:
        layers: decoder layers.
        reader: weight reader of the checkpoint.
        pack: pack of the weights; None reads the checkpoint.
        settle: prepares a resident layer of a CPU whose parameters are bound.
        warn: receives one-line warnings about refused memory pinning and its cost.
    """

    layers: Sequence[Any]
    reader: WeightReader
    pack: Pack | None
    settle: Callable[[int], None]
    warn: Callable[[str], None]

    def open(self, cached: Collection[int]) -> LayerReader:
        """Return a reader of layers, which owns the files; `cached` layers fit in the page cache."""
        return layer_reader_for(self.layers, self.reader, self.pack, cached)


def open_streamers(
    files: LayerFiles,
    placement: Placement,
    resident: Sequence[int],
    devices: Sequence[torch.device],
    shared: SharedReader,
) -> tuple[LayerStreamer, KeptLayers]:
    """Return the streamer of the layers that are not resident, and the layers in host memory.

    Args:
        files: layers and their files.
        placement: tiers of the layers once all stages of a chat have ended, and the owner of each.
        resident: indices of the layers that are resident at first, among them those of the placement.
        devices: device of each owner.
        shared: reader of layers that are read past the page cache, for all but a CPU alone.
    """
    if len(devices) == 1:
        open_reader = files.open if devices[0].type == "cpu" else partial(shared.part, 0)
        return _open_device(files, placement, resident, devices[0], placement.owned(0), open_reader, files.reader.close)
    # Layers in the page cache are mapped where there is a pack, and a GPU keeps its own copies.
    parts = list[tuple[LayerStreamer, KeptLayers]]()
    with ExitStack() as undo:
        for number, device in enumerate(devices):
            owned = placement.owned(number)
            open_reader = partial(shared.part, number)
            with current(device):  # pinned memory belongs to the device that is current
                streamer, kept = _open_device(files, placement, resident, device, owned, open_reader, lambda: None)
            undo.callback(kept.close)
            undo.callback(streamer.close)
            parts.append((streamer, kept))
        undo.pop_all()
    streamers = DeviceStreamers([streamer for streamer, _ in parts], placement)
    return streamers, KeptOnDevices([kept for _, kept in parts], files.reader.close)


def _open_device(
    files: LayerFiles,
    placement: Placement,
    resident: Sequence[int],
    device: torch.device,
    owned: Sequence[int],
    open_reader: Callable[[Collection[int]], LayerReader],
    close_files: Callable[[], None],
) -> tuple[LayerStreamer, KeptLayers]:
    """Return the streamer of one device's layers, and those in host memory."""
    layers, mine = files.layers, set(owned)
    stays, in_ram = (tuple(i for i in each if i in mine) for each in (placement.resident, placement.in_ram))
    at_first = [index for index in resident if index in mine]
    if device.type == "cpu":
        part = replace(placement, resident=stays, in_ram=in_ram)
        opened = partial(open_reader, in_ram)
        tiers = CpuTiers(layers, part, at_first, opened, files.pack, close_files, files.settle, owned)
        return tiers.streamer, tiers
    later = [index for index in owned if index not in set(stays)]
    streamed = [index for index in later if index not in set(at_first)]
    if not streamed:
        return NoStreamer(), NothingKept()
    with ExitStack() as undo:
        reader, slots = open_reader(()), min(placement.slots, len(later))
        undo.callback(reader.close)
        host = HostLayers(layers, later, in_ram, slots, reader, pinner(device, files.warn))
        undo.callback(host.close)
        if len(streamed) < len(later):
            host.select(streamed)
        streamer = CudaStreamer(layers, streamed, slots, host, device)
        undo.pop_all()
    return streamer, PinnedLayers(streamer)


class DeviceStreamers(MixedStreamer):
    """The streamers of several devices, whose totals are also known device by device.

    Args:
        streamers: streamer of each device.
        placement: owners of the layers.
    """

    def __init__(self, streamers: Sequence[LayerStreamer], placement: Placement) -> None:
        super().__init__({index: streamers[placement.owner[index]] for index in placement.streamed})
        self._by_device = tuple(streamers)

    def counters(self) -> StreamCounters:
        """Return the totals of all devices, and those of each."""
        counters = tuple(streamer.counters() for streamer in self._by_device)
        return replace(total(counters), by_device=counters)

    def close(self) -> None:
        """Close all streamers."""
        for streamer in self._by_device:
            streamer.close()
