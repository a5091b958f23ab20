"""Layers in host memory, pinned where the system allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from specchat.engine.streaming.readers import LayerReader
from specchat.engine.streaming.slots import SlotQueue, is_small, page_aligned
from specchat.models.weights.layout import LayerLayout
from specchat.units import format_bytes

# Pinned before anything else: a system that refuses this refuses everything.
_PROBE_BYTES = 1 << 20

ReadLayer = Callable[[int, LayerLayout, Tensor], None]


class HostLayers:
    """The streamed layers in host memory: those that stay there, and slots for those read from the disk for every pass.

    One slab for each kind, pinned by hand: torch's own pinned allocator rounds every block up to a power of two.

    Args:
        layers: the decoder layers.
        streamed: indices of the streamed ones, ascending.
        in_ram: those of them that stay, ascending; read here.
        num_slots: slots for the others.
        read_layer: fills a blob with one layer.
        filler: reads the others; closed with this.
        pin: pins the blobs and slots, as far as it can.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        streamed: Sequence[int],
        in_ram: Sequence[int],
        num_slots: int,
        read_layer: ReadLayer,
        filler: LayerReader,
        pin: Pinner,
    ) -> None:
        layouts = [LayerLayout.of(layers[index]) for index in streamed]
        kept = set(in_ram)
        self._nbytes = [layout.nbytes for layout in layouts]
        read = [j for j, index in enumerate(streamed) if index not in kept]
        self._turn = {j: k for k, j in enumerate(read)}  # the k-th layer that is read
        self._filler = filler
        self._pin = pin
        # Slots first: they are used for every layer that is read, a kept one only for its own.
        slot_bytes = max((self._nbytes[j] for j in read), default=0)
        self._slots = _blobs([slot_bytes] * min(num_slots, len(read)))
        kept_positions = [j for j in range(len(streamed)) if j not in self._turn]
        blobs = _blobs([self._nbytes[j] for j in kept_positions])
        self._kept = dict(zip(kept_positions, blobs, strict=True))
        with ExitStack() as undo:  # memory that is given back pinned stays taken from the system
            undo.callback(pin.close)
            pin([*self._slots, *blobs])
            for j, blob in self._kept.items():
                read_layer(streamed[j], layouts[j], blob)
            works = [filler.chunks(streamed[j], self._slots[k % len(self._slots)]) for k, j in enumerate(read)]
            small = [is_small(self._nbytes[j]) for j in read]
            self._queue = SlotQueue(works, small, len(self._slots), filler.num_workers) if read else None
            undo.pop_all()
        self._lent: tuple[int, Callable[[], None]] | None = None

    @property
    def wait_s(self) -> float:
        """Seconds that `take` waited for the disk."""
        return 0.0 if self._queue is None else self._queue.wait_s

    def keeps(self, j: int) -> bool:
        """Whether the j-th streamed layer stays in host memory."""
        return j in self._kept

    def take(self, j: int) -> Tensor:
        """The j-th streamed layer's bytes, uint8 [nbytes], once they are there."""
        if j in self._kept:
            return self._kept[j]
        assert self._queue is not None
        self._reuse_slot()
        turn = self._turn[j]
        self._queue.take(turn)
        return self._slots[turn % len(self._slots)][: self._nbytes[j]]

    def give_back(self, j: int, copied: Callable[[], None]) -> None:
        """The layer is being copied; `copied` returns when that is done. Not waited for before the next is taken."""
        if j in self._turn:
            self._lent = (self._turn[j], copied)

    def restart(self) -> None:
        """Reads the first layers again, once those being copied have been."""
        if self._queue is not None:
            self._reuse_slot()
            self._queue.restart()

    def close(self) -> None:
        """Ends reading and unpins."""
        if self._queue is not None:
            self._queue.close()
        self._filler.close()
        self._pin.close()

    def _reuse_slot(self) -> None:
        if self._lent is not None:
            assert self._queue is not None
            turn, copied = self._lent
            copied()
            self._queue.give_back(turn)
            self._lent = None


def _blobs(sizes: Sequence[int]) -> list[Tensor]:
    """Page-aligned blobs of one slab; sizes are multiples of a page."""
    slab = page_aligned(sum(sizes)) if sum(sizes) else torch.empty(0, dtype=torch.uint8)
    return list(slab.split(list(sizes))) if sizes else []


class Pinner:
    """Pins memory as far as the system lets it: WSL gives little, and containers may.

    Args:
        runtime: torch's binding of the CUDA runtime.
        forget_error: takes away the error that a refusal leaves behind.
        warn: told in one line what could not be pinned and what that costs.
    """

    def __init__(self, runtime: Any, forget_error: Callable[[], None], warn: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._forget_error = forget_error
        self._warn = warn
        self._pinned: list[int] = []

    def __call__(self, blobs: Sequence[Tensor]) -> None:
        """Pins blobs in this order, until one is refused; a small piece is tried first."""
        if not blobs:
            return
        num_pinned = 0
        if self._register(page_aligned(_PROBE_BYTES)):
            self._runtime.cudaHostUnregister(self._pinned.pop())
            num_pinned = next((i for i, blob in enumerate(blobs) if not self._register(blob)), len(blobs))
        left, total = sum(blob.nbytes for blob in blobs[num_pinned:]), sum(blob.nbytes for blob in blobs)
        if left:
            self._warn(
                f"this system refuses to pin {format_bytes(left)} of the {format_bytes(total)} for streamed layers: "
                "they cross the link at about half its rate, and computing waits for them"
            )

    def close(self) -> None:
        """Unpins everything."""
        while self._pinned:
            self._runtime.cudaHostUnregister(self._pinned.pop())

    def _register(self, blob: Tensor) -> bool:
        if int(self._runtime.cudaHostRegister(blob.data_ptr(), blob.nbytes, 0)) != 0:
            self._forget_error()
            return False
        self._pinned.append(blob.data_ptr())
        return True


def pinner(device: torch.device, warn: Callable[[str], None]) -> Pinner:
    """Pins memory for copies to `device`."""

    def forget_error() -> None:
        # The runtime keeps a refusal for whoever asks for the last error next, which launching a kernel does.
        with suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
        torch.zeros(1, device=device).add_(1)  # now it is gone, or it was another one

    return Pinner(torch.cuda.cudart(), forget_error, warn)
