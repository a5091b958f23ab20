"""Rows of a pass on their way between devices: they hop where the owner of the next layer is another device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specchat.engine.device import current

# Most pairs of events to keep before their times are added up; those of many passes would fill memory.
_MOST_TIMED = 4096


class Hops:
    """Moves what a layer is given to the device that owns the layer, and times the devices.

    Hidden states cross at every change of the device. What all layers share, such as rotary tables, is moved once for
    each device and pass.

    Args:
        owner: number of the device of each layer.
        devices: all devices; embeddings, head and draft are on the first one.

    Attributes:
        owner: number of the device of each layer.
    """

    def __init__(self, owner: Sequence[int], devices: Sequence[torch.device]) -> None:
        self.owner = tuple(owner)
        self._devices = tuple(devices)
        # The source is kept beside its copy, so that no other tensor takes its address during the pass.
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._busy_s = [0.0] * len(devices)
        self._timed: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Begin a pass, or end one: forget what the last pass has moved."""
        self._moved.clear()
        if len(self._timed) > _MOST_TIMED:
            self.busy_s()

    def arrive(
        self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return the hidden states and the other inputs of a layer on the layer's device."""
        device = self._devices[self.owner[layer]]
        moved = {name: self._shared(value, device) for name, value in kwargs.items()}
        return hidden.to(device), tuple(self._shared(value, device) for value in args), moved

    def move_on(self, layer: int, hidden: Tensor) -> Tensor:
        """Return hidden states that leave a layer on the device of the next one, or on the first after the last."""
        following = layer + 1
        return hidden.to(self._devices[self.owner[following] if following < len(self.owner) else 0])

    def home(self, out: Any) -> Any:
        """Return hidden states, or a layer's output that begins with them, on the first device."""
        if isinstance(out, tuple):
            return (out[0].to(self._devices[0]), *out[1:])
        return out.to(self._devices[0])

    @contextmanager
    def computing(self, layer: int) -> Iterator[None]:
        """Compute a layer inside the block: its device is CUDA's current one, and busy."""
        number = self.owner[layer]
        device = self._devices[number]
        with current(device):
            if device.type == "cuda":
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record(torch.cuda.current_stream(device))
                yield
                after.record(torch.cuda.current_stream(device))
                self._timed.append((number, before, after))
            else:
                begin = time.perf_counter()
                yield
                self._busy_s[number] += time.perf_counter() - begin

    def busy_s(self) -> tuple[float, ...]:
        """Return the seconds since loading that each device has computed layers; waits for the passes queued so far."""
        for number, before, after in self._timed:
            after.synchronize()
            self._busy_s[number] += before.elapsed_time(after) / 1e3
        self._timed.clear()
        return tuple(self._busy_s)

    def _shared(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, tuple):
            return tuple(self._shared(each, device) for each in value)
        if not isinstance(value, Tensor) or value.device == device:
            return value
        key = id(value), device
        if key not in self._moved:
            self._moved[key] = value, value.to(device)
        return self._moved[key][1]
