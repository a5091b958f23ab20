"""Streamed layers on a GPU: copied from host memory on a stream of their own. Unmeasured: no GPU was at hand yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from specchat.engine.fillers import LayerFiller
from specchat.engine.slots import SlotQueue, is_small, page_aligned
from specchat.engine.streamer import LayerStreamer, StreamCounters
from specchat.models.weights.layout import LayerLayout, bind
from specchat.units import format_bytes

ReadLayer = Callable[[int, LayerLayout, Tensor], None]

_PROBE_BYTES = 1 << 20


class CudaStreamer(LayerStreamer):
    """Fills slots in device memory from host memory.

    Args:
        layers: the decoder layers; the streamed ones' parameters become views of slots.
        streamed: their indices, ascending.
        num_slots: slots to make.
        host: where their bytes are; closed with this.
        device: the CUDA device.
    """

    def __init__(
        self, layers: Sequence[Any], streamed: Sequence[int], num_slots: int, host: HostLayers, device: torch.device
    ) -> None:
        self._position = {index: j for j, index in enumerate(streamed)}
        layouts = [LayerLayout.of(layers[index]) for index in streamed]
        self._nbytes = [layout.nbytes for layout in layouts]
        self._slots = _new_slots(num_slots, max(self._nbytes), device)
        for j, index in enumerate(streamed):
            bind(layers[index], layouts[j].views(self._slots[j % num_slots]))
        self._host = host
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event(enable_timing=True) for _ in streamed]
        self._used = [torch.cuda.Event() for _ in range(num_slots)]
        self._done = [torch.cuda.Event() for _ in streamed]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._num_bytes = 0
        self._wait_s = 0.0
        self._free_slots()
        self._fill_first_slots()

    def acquire(self, index: int) -> None:
        """Makes the device's queue wait for the copy, and the host for the layer `slots + 1` before.

        Without the second wait the host would queue the whole pass at once and could not stop it between layers.
        """
        j = self._position[index]
        behind = j - (len(self._slots) + 1)
        if behind >= 0:
            self._done[behind].synchronize()
        if not self._host.keeps(j):  # its copy could not be queued before its bytes had come from the disk
            self._copy(j)
        compute = torch.cuda.current_stream(self._device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(compute)
        compute.wait_event(self._filled[j])
        after.record(compute)
        self._waits.append((before, after))
        self._num_bytes += self._nbytes[j]

    def release(self, index: int) -> None:
        """Queues the copy of the next layer that lives in this slot, behind the computing just queued."""
        j = self._position[index]
        compute = torch.cuda.current_stream(self._device)
        self._done[j].record(compute)
        self._used[j % len(self._slots)].record(compute)
        self._copy_if_there(self._next_in_slot(j))

    def restart(self) -> None:
        """Refills the slots with the first layers, behind whatever is still queued."""
        self._free_slots()
        self._host.restart()
        self._fill_first_slots()

    def counters(self) -> StreamCounters:
        """Bytes copied and seconds that the device's queue stood waiting, or the host for the disk.

        Waits for the passes queued so far.
        """
        for before, after in self._waits:
            after.synchronize()
            self._wait_s += before.elapsed_time(after) / 1e3
        self._waits.clear()
        return StreamCounters(self._num_bytes, self._wait_s + self._host.wait_s)

    def close(self) -> None:
        """Waits for copies under way and gives the host memory back."""
        self._copies.synchronize()
        self._host.close()

    def _free_slots(self) -> None:
        """Lets slots be filled once all that is queued has run: what computes on them, and first of all their zeroing.

        Without this the first copies could overtake the zeroing, which is queued on another stream.
        """
        compute = torch.cuda.current_stream(self._device)
        for used in self._used:
            used.record(compute)

    def _fill_first_slots(self) -> None:
        for j in range(min(len(self._slots), len(self._nbytes))):
            self._copy_if_there(j)

    def _next_in_slot(self, j: int) -> int:
        """The layer that follows j in its slot: N further on, or the slot's own first layer in the next pass."""
        following = j + len(self._slots)
        return following if following < len(self._nbytes) else j % len(self._slots)

    def _copy_if_there(self, j: int) -> None:
        if self._host.keeps(j):
            self._copy(j)

    def _copy(self, j: int) -> None:
        slot, blob = j % len(self._slots), self._host.take(j)
        self._copies.wait_event(self._used[slot])
        with torch.cuda.stream(self._copies):
            _copy_async(self._slots[slot][: self._nbytes[j]], blob)
            self._filled[j].record(self._copies)
        self._host.give_back(j, self._filled[j].synchronize)


def _new_slots(num_slots: int, nbytes: int, device: torch.device) -> list[Tensor]:
    """Zeroed memory on the device; the zeroing is queued on the current stream."""
    return [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]


def _copy_async(slot: Tensor, blob: Tensor) -> None:
    """Queues a copy on the current stream; the host goes on at once if the blob is pinned."""
    slot.copy_(blob, non_blocking=True)


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
        filler: LayerFiller,
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
