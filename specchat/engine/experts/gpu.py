"""Slots for experts in a GPU's memory, and what fills them: pinned host memory, or files through pinned windows.

Copies run on a stream of their own. Each batch of them ends with an event, which the computing stream waits for before
it uses the slots. Before slots are filled again, copies wait for all that was queued with their former contents. Copies
into one slot follow each other on their stream, so a wrong guess cannot arrive after what took its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from specchat.engine.device import current
from specchat.engine.experts.batch import ReadBatch
from specchat.engine.experts.reader import ExpertReader


class GpuSlots:
    """Slots in a GPU's memory, zeroed at first.

    Args:
        num_slots: number of slots.
        slot_bytes: length of a slot.
        device: CUDA device.
        windows: pinned host memory that files are read into; empty if no file is read.

    Attributes:
        slab: memory of the slots, uint8 [slots * slot_bytes].
        windows: pinned host memory that files are read into.
    """

    is_readable = False

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device, windows: Sequence[Tensor] = ()) -> None:
        self.slot_bytes = slot_bytes
        self.windows = windows
        self.slab = _new_slab(num_slots * slot_bytes, device)
        self._slots = list(self.slab.view(num_slots, slot_bytes))
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._used = torch.cuda.Event()
        self._emptied = {window.data_ptr(): torch.cuda.Event(blocking=True) for window in windows}

    def free(self) -> None:
        """Let copies from now on overwrite slots, after all work that is queued now, their zeroing included."""
        self._used.record(self._computing)
        self._copies.wait_event(self._used)

    def fill(self, experts: Sequence[tuple[int, Tensor]]) -> None:
        """Queue copies of experts in host memory: pairs of a slot and an expert's bytes."""
        with torch.cuda.stream(self._copies):
            for slot, blob in experts:
                _copy_async(self._slots[slot][: len(blob)], blob)

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Fail: files cannot be read into a GPU's memory."""
        raise AssertionError(f"{nbytes} bytes from {begin} are read through a window")

    def wait_for_window(self, window: Tensor) -> None:
        """Wait until the copies out of a window have ended; the threads that read files call this."""
        with current(self._device):
            self._emptied[window.data_ptr()].synchronize()

    def copy(self, window: Tensor, parts: Sequence[tuple[int, int, int]]) -> None:
        """Queue copies of parts of a window; the threads that read files call this."""
        with torch.cuda.stream(self._copies):
            for begin, target, nbytes in parts:
                _copy_async(self.slab[target : target + nbytes], window[begin : begin + nbytes])
        self._emptied[window.data_ptr()].record(self._copies)

    def mark(self, event: torch.cuda.Event) -> None:
        """Record an event after all copies that are queued now."""
        event.record(self._copies)

    def wait(self, event: torch.cuda.Event) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Let all computing from now on wait for an event; return timed events before and after the wait."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        computing = self._computing
        before.record(computing)
        computing.wait_event(event)
        after.record(computing)
        return before, after

    def close(self) -> None:
        """Wait for queued copies."""
        self._copies.synchronize()

    @property
    def _computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


class CopyBatch(ReadBatch):
    """Copies of experts into slots, and reads of the experts that come from files.

    Args:
        num_tasks: number of read tasks, each of which queues copies.
        slots: slots that are filled.
        has_begun: whether copies are queued already.
    """

    def __init__(self, num_tasks: int, slots: GpuSlots, *, has_begun: bool) -> None:
        super().__init__(num_tasks)
        self._has_begun = has_begun
        self._slots = slots
        self.copied = torch.cuda.Event()
        if has_begun:
            slots.mark(self.copied)

    def end_task(self, error: BaseException | None = None) -> None:
        """Count a task that has ended; the event of the last one follows all copies of the batch."""
        try:
            if not self._is_withdrawn:
                self._slots.mark(self.copied)
        except BaseException as caught:  # noqa: BLE001 - passed to the computing thread, which raises it
            error = error or caught
        super().end_task(error)


class GpuSource:
    """Fills a GPU's slots with experts.

    Args:
        slots: slots to fill; closed together with this object.
        kept: experts in host memory, as slots hold them, by decoder layer and expert.
        reader: reads the other experts into the slots; None if there are none. Closed together with this object.
        expert_bytes: bytes that are moved for one expert.
    """

    def __init__(
        self,
        slots: GpuSlots,
        kept: Mapping[int, Mapping[int, Tensor]],
        reader: ExpertReader | None,
        expert_bytes: int,
    ) -> None:
        self.expert_bytes = expert_bytes
        self._slots, self._kept, self._reader = slots, kept, reader
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wait_s = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds that the GPU waited for experts; waits for the passes queued so far."""
        for before, after in self._waits:
            after.synchronize()
            self._wait_s += before.elapsed_time(after) / 1e3
        self._waits.clear()
        return self._wait_s

    def free_slots(self) -> None:
        """Let slots be filled again, after all work that is queued now."""
        self._slots.free()

    def begin(self, layer: int, experts: Sequence[int], slots: Sequence[int], is_few: bool) -> CopyBatch:
        """Queue copies of the experts that host memory keeps, and begin to read the others."""
        own = self._kept.get(layer, {})
        pairs = list(zip(experts, slots, strict=True))
        there = [(slot, own[expert]) for expert, slot in pairs if expert in own]
        if there:
            self._slots.fill(there)
        new_batch = partial(CopyBatch, slots=self._slots, has_begun=bool(there))
        if len(there) == len(experts):
            return new_batch(0)
        assert self._reader is not None
        absent = [expert for expert in experts if expert not in own]
        batch = self._reader.begin(
            layer, absent, [slot for expert, slot in pairs if expert not in own], is_few, new_batch
        )
        assert isinstance(batch, CopyBatch)
        return batch

    def wait_for(self, batch: ReadBatch) -> None:
        """Wait until the reads of a batch have ended, and let the GPU wait for its copies."""
        assert isinstance(batch, CopyBatch)
        batch.wait()
        self._waits.append(self._slots.wait(batch.copied))

    def drain(self) -> None:
        """Wait until all reads have ended; a failed read counts as ended."""
        if self._reader is not None:
            self._reader.drain()

    def close(self) -> None:
        """Wait for all reads and copies, and close the files."""
        if self._reader is not None:
            self._reader.close()
        self._slots.close()


def _new_slab(nbytes: int, device: torch.device) -> Tensor:
    """Allocate zeroed memory on the device; the zeroing is queued on the current stream."""
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _copy_async(slot: Tensor, blob: Tensor) -> None:
    """Queue a copy on the current stream; the host does not wait if the blob is pinned."""
    slot.copy_(blob, non_blocking=True)
