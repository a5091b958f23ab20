"""Streamed layers in host memory, pinned where the system allows pinning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.streaming.readers import LayerReader, read_layers
from specchat.engine.streaming.slots import SlotQueue, is_small, page_aligned
from specchat.hardware.cuda import forget_error
from specchat.models.weights.layout import LayerLayout
from specchat.units import format_bytes

# Size of a trial pinning: a system that refuses this size refuses every other.
_PROBE_BYTES = 1 << 20


class HostLayers:
    """Streamed layers in host memory: blobs of layers that stay there, and slots for layers read from disk every pass.

    Each is a mapping of its own, pinned directly: torch's pinned allocator rounds every block up to a power of two.

    Args:
        layers: decoder layers.
        streamed: indices of all layers that may be streamed, ascending.
        in_ram: indices of the streamed layers that stay in host memory, ascending; read by the constructor.
        num_slots: number of slots for the other layers.
        reader: reader of all these layers, closed together with this object.
        pin: pins as many blobs and slots as the system allows.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        streamed: Sequence[int],
        in_ram: Sequence[int],
        num_slots: int,
        reader: LayerReader,
        pin: Pinner,
    ) -> None:
        kept = set(in_ram)
        self._sizes = {index: LayerLayout.of(layers[index]).nbytes for index in streamed}
        self._num_slots = num_slots
        self._reader = reader
        self._pin = pin
        self._kept = {index: page_aligned(self._sizes[index]) for index in streamed if index in kept}
        num_slots, nbytes = self.slots_without(())
        self._slots = [page_aligned(nbytes) for _ in range(num_slots)]
        self._queue: SlotQueue | None = None
        self._past_wait_s = 0.0
        self._lent: tuple[int, Callable[[], None]] | None = None
        with ExitStack() as undo:  # unpin on errors: memory that is freed while pinned stays locked
            undo.callback(pin.close)
            # Pin slots first: many layers pass through a slot, but a blob holds one layer.
            pin([*self._slots, *self._kept.values()])
            read_layers(reader, self._kept)
            self.select(streamed)
            undo.pop_all()

    def select(self, streamed: Sequence[int], given: Collection[int] = ()) -> None:
        """Take the given order of layers from now on; between passes, after the copies out of this memory have ended.

        Args:
            streamed: indices of layers, ascending; the j-th of them is the j-th streamed layer of the other functions.
            given: indices of layers whose memory is released: they are read from the disk from now on.
        """
        self._lent = None
        if self._queue is not None:
            self._queue.close()
            self._past_wait_s += self._queue.wait_s
            self._queue = None
        self._release(given)
        self._order = list(streamed)
        read = [(j, index) for j, index in enumerate(streamed) if index not in self._kept]
        self._turn = {j: k for k, (j, _) in enumerate(read)}  # j-th streamed layer -> k-th layer read from disk
        tasks = [self._reader.chunks(index, self._slots[k % len(self._slots)]) for k, (_, index) in enumerate(read)]
        small = [is_small(self._sizes[index]) for _, index in read]
        if read:
            self._queue = SlotQueue(tasks, small, len(self._slots), self._reader.num_workers)

    @property
    def wait_s(self) -> float:
        """Seconds that `take` waited for the disk."""
        return self._past_wait_s + (0.0 if self._queue is None else self._queue.wait_s)

    @property
    def kept(self) -> dict[int, int]:
        """Bytes of the layers that stay in host memory, by index."""
        return {index: self._sizes[index] for index in self._kept}

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest layer that may be streamed."""
        return max(self._sizes.values())

    def keeps(self, j: int) -> bool:
        """Whether the j-th streamed layer stays in host memory."""
        return self._order[j] in self._kept

    def take(self, j: int) -> Tensor:
        """Wait for the j-th streamed layer and return its bytes, uint8 [nbytes]."""
        index = self._order[j]
        if index in self._kept:
            return self._kept[index]
        assert self._queue is not None
        self.reuse_slot()
        turn = self._turn[j]
        self._queue.take(turn)
        return self._slots[turn % len(self._slots)][: self._sizes[index]]

    def read(self, index: int) -> Tensor:
        """Return the bytes of a layer, uint8 [nbytes], while no layers are read ahead.

        Args:
            index: index of a layer that may be streamed.
        """
        if index in self._kept:
            return self._kept[index]
        blob = page_aligned(self._sizes[index])
        read_layers(self._reader, {index: blob})
        return blob

    def give_back(self, j: int, copied: Callable[[], None]) -> None:
        """Record that the j-th layer is being copied; `copied` waits for the copy, before its slot is reused."""
        if j in self._turn:
            self._lent = (self._turn[j], copied)

    def reuse_slot(self) -> None:
        """Wait for the current copy, and let the disk read the next layer into its slot."""
        if self._lent is not None:
            assert self._queue is not None
            turn, copied = self._lent
            copied()
            self._queue.give_back(turn)
            self._lent = None

    def restart(self) -> None:
        """Read the first layers again, after the current copy has ended."""
        if self._queue is not None:
            self.reuse_slot()
            self._queue.restart()

    def slots_without(self, given: Collection[int]) -> tuple[int, int]:
        """Return number and size in bytes of the slots if these layers do not stay in host memory."""
        read = [nbytes for index, nbytes in self._sizes.items() if index not in self._kept or index in given]
        return min(self._num_slots, len(read)), max(read, default=0)

    def close(self) -> None:
        """Stop reading, close the layer reader and unpin the memory."""
        if self._queue is not None:
            self._queue.close()
        self._reader.close()
        self._pin.close()

    def _release(self, given: Collection[int]) -> None:
        """Release the memory of layers, and make slots for them, too."""
        for index in given:
            self._pin.release(self._kept.pop(index))
        num_slots, nbytes = self.slots_without(())
        if len(self._slots) < num_slots or (num_slots and self._slots[0].nbytes < nbytes):
            while self._slots:
                self._pin.release(self._slots.pop())
            self._slots = [page_aligned(nbytes) for _ in range(num_slots)]
            self._pin(self._slots)


class Pinner:
    """Pins as much memory as the system allows; WSL and some containers allow little.

    Args:
        runtime: torch's binding of the CUDA runtime.
        forget_error: clears the runtime's error after a refusal.
        warn: receives a one-line warning about memory that could not be pinned, and its cost.
    """

    def __init__(self, runtime: Any, forget_error: Callable[[], None], warn: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._forget_error = forget_error
        self._warn = warn
        self._pinned: list[int] = []

    def __call__(self, blobs: Sequence[Tensor]) -> None:
        """Pin blobs in the given order until one is refused, and warn about the others."""
        num_pinned = self.pin(blobs)
        left, total = sum(blob.nbytes for blob in blobs[num_pinned:]), sum(blob.nbytes for blob in blobs)
        if left:
            self._warn(
                f"cannot pin {format_bytes(left)} of {format_bytes(total)} for streamed layers: "
                "these layers cross the link at about half its rate, and computation waits for them"
            )

    def pin(self, blobs: Sequence[Tensor]) -> int:
        """Pin blobs in the given order until one is refused, after a small trial; return how many are pinned."""
        if not blobs or not self._register(page_aligned(_PROBE_BYTES)):
            return 0
        self._runtime.cudaHostUnregister(self._pinned.pop())
        return next((i for i, blob in enumerate(blobs) if not self._register(blob)), len(blobs))

    def release(self, blob: Tensor) -> None:
        """Unpin one blob, if it is pinned; its memory may be freed afterwards."""
        if blob.data_ptr() in self._pinned:
            self._pinned.remove(blob.data_ptr())
            self._runtime.cudaHostUnregister(blob.data_ptr())

    def close(self) -> None:
        """Unpin everything."""
        while self._pinned:
            self._runtime.cudaHostUnregister(self._pinned.pop())

    def _register(self, blob: Tensor) -> bool:
        if int(self._runtime.cudaHostRegister(blob.data_ptr(), blob.nbytes, 0)) != 0:
            self._forget_error()
            return False
        self._pinned.append(blob.data_ptr())
        return True


def pinner(device: torch.device, warn: Callable[[str], None]) -> Pinner:
    """Return a pinner of host memory for copies to `device`."""
    return Pinner(torch.cuda.cudart(), partial(forget_error, device), warn)
