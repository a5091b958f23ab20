"""The part of `torch.cuda` that specchat uses, without a GPU: devices, streams, events, and registered host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specchat.units import GIB

# Receives the kind and the name of something that happened.
Note = Callable[..., None]

_ALREADY_REGISTERED, _NOT_SUPPORTED = 712, 801


class Stream:
    """A queue of work on one device.

    Attributes:
        name: "compute" for a device's current stream at the beginning.
        device: device of the work.
    """

    def __init__(self, note: Note, name: str, device: torch.device) -> None:
        self._note = note
        self.name = name
        self.device = device

    def wait_event(self, event: Event) -> None:
        self._note("queue", "wait_event", stream=self.name)

    def synchronize(self) -> None:
        self._note("wait", "stream.synchronize", stream=self.name)


class Event:
    """A point in a stream.

    Attributes:
        stream: stream of the last record; None before the first.
        blocking: whether waiting threads sleep instead of spinning.
    """

    def __init__(self, runtime: PretendedRuntime, blocking: bool) -> None:
        self._runtime = runtime
        self.blocking = blocking
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self._runtime.current_stream()
        self._runtime.note("queue", "event.record", stream=self.stream.name)

    def synchronize(self) -> None:
        if self.stream is not None:
            self._runtime.note("wait", "event.synchronize" if self.blocking else "event.synchronize, spinning")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        assert self.stream is not None and other.stream is not None, "an event without a time"
        assert self.stream.device == other.stream.device, "events of two devices"
        self._runtime.timed.append(self.stream.device)
        return 1.0


class PretendedRuntime:
    """Devices, streams and pinned memory.

    Args:
        note: receives what happens.
        capability: compute capability of all devices.
        num_devices: number of devices.

    Attributes:
        device: current device, as `torch.cuda.set_device` sets it.
        pinned: bytes of registered memory by address.
        refuses_to_pin: whether the system refuses to register memory, as some containers do.
        last_error: number of an error that the next kernel reports; None without one.
        timed: devices whose events were timed.
        implied: numbers of the devices that calls without a device meant.
    """

    def __init__(self, note: Note, capability: tuple[int, int], num_devices: int) -> None:
        self.note = note
        self.device = 0
        self.pinned: dict[int, int] = {}
        self.refuses_to_pin = False
        self.last_error: int | None = None
        self.timed: list[torch.device] = []
        self.implied: set[int] = set()
        self._capability = capability
        self._default = [Stream(note, "compute", torch.device("cuda", i)) for i in range(num_devices)]
        self._threads = threading.local()
        self._num_streams = 0

    @property
    def _current(self) -> list[Stream]:
        """The current stream of each device, which each thread has for itself."""
        if not hasattr(self._threads, "streams"):
            self._threads.streams = list(self._default)
        streams: list[Stream] = self._threads.streams
        return streams

    @property
    def current(self) -> Stream:
        """The current stream of the current device."""
        return self._current[self.device]

    def functions(self) -> dict[str, Any]:
        """What replaces the functions and classes of `torch.cuda`."""
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "device_count": lambda: len(self._default),
            "current_device": lambda: self.device,
            "set_device": self._set_device,
            "device": self._on_device,
            "device_of": lambda _: nullcontext(),
            "get_device_capability": lambda _=None: self._capability,
            "get_device_name": lambda _=None: "Pretended GPU",
            "get_device_properties": lambda device=None: SimpleNamespace(uuid=f"pretended-{self._index(device)}"),
            "is_bf16_supported": lambda *_, **__: True,
            "mem_get_info": lambda _=None: (12 * GIB, 12 * GIB),
            "memory_allocated": lambda _=None: 0,
            "max_memory_allocated": lambda _=None: 0,
            "reset_peak_memory_stats": lambda _=None: None,
            "empty_cache": lambda: self.note("queue", "empty_cache"),
            "synchronize": lambda _=None: self.note("wait", "cuda.synchronize"),
            "cudart": lambda: self,
            "Stream": self._new_stream,
            "Event": lambda enable_timing=False, blocking=False: Event(self, blocking),
            "stream": self._using,
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self._default[self._index(device)],
        }

    def current_stream(self, device: Any = None) -> Stream:
        """The current stream of a device."""
        return self._current[self._index(device)]

    def check(self, device: torch.device) -> None:
        """Refuse a device that does not exist, and report an error that an earlier call has left."""
        if (device.index or 0) >= len(self._default):
            raise RuntimeError("CUDA error: invalid device ordinal")
        if self.last_error is not None:
            error, self.last_error = self.last_error, None
            raise RuntimeError(f"CUDA error: operation not supported ({error})")

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether all of a tensor's memory is registered."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(at <= begin and end <= at + size for at, size in self.pinned.items())

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
        assert nbytes > 0
        self.implied.add(self.device)
        if self.refuses_to_pin or address in self.pinned:
            self.last_error = _NOT_SUPPORTED if self.refuses_to_pin else _ALREADY_REGISTERED
            return self.last_error
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def _index(self, device: Any) -> int:
        if device is None:
            self.implied.add(self.device)
            return self.device
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.device if index is None else index

    def _set_device(self, device: Any) -> None:
        self.device = self._index(device)

    @contextmanager
    def _on_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, self._index(device)
        try:
            yield
        finally:
            self.device = before

    def _new_stream(self, device: Any = None, **_: Any) -> Stream:
        self._num_streams += 1
        return Stream(self.note, f"side {self._num_streams}", torch.device("cuda", self._index(device)))

    @contextmanager
    def _using(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        before, self._current[index] = self._current[index], stream
        try:
            yield
        finally:
            self._current[index] = before
