"""A pool of expert slots: the experts that passes use most stay in memory, and the others pass through it.

Layers are visited in a circle, so a pool that gives up the expert that was used longest ago gives up what is needed
next. Measured with 128 experts of 12 layers, a quarter of them in the pool and trees of 8 nodes: such a pool has the
wanted experts in 1% of all cases, and one that keeps the same number of slots for each layer, for the experts of the
highest decayed number of uses, in 55%. What exceeds a layer's slots passes through slots that all layers share.

Passes over prompts use nearly all experts, which says nothing about the next tree. So they change nothing but empty
slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specchat.engine.experts.batch import ReadBatch
from specchat.engine.experts.reader import ExpertReader
from specchat.engine.streaming.base import LayerStreamer, StreamCounters

# Factor on an expert's number of uses for each pass over its layer.
_DECAY = 0.97
# Uses that an expert begins with if all earlier passes used it. Few, because another text uses other experts. Simulated
# with a quarter of 128 experts in the pool: the first pass of 1, 8 and 16 rows reads 0.5 to 0.6 of what an empty pool
# reads, the first five 0.66, 0.8 and 0.9. With the 33 uses that it would have after many passes, five passes of 8 rows
# read 1.1 times as much.
_FILLED_USES = 2.0
_NOWHERE = -1
# Missing experts that are read together; the first are computed while the next are read.
_READ_TOGETHER = 4


class ExpertPool(LayerStreamer):
    """Slots for the experts of all layers.

    The slots of layer j are j * quota to (j + 1) * quota; the shared ones follow. A slot is given away only after the
    last read into it has ended, and never while the layer in progress uses it.

    Args:
        layers: decoder layers with experts, ascending.
        num_experts: number of experts of each layer.
        quota: number of slots of each layer.
        num_shared: number of slots that all layers share, at least `num_experts`.
        reader: reads experts into slots; closed together with the pool.
        held: small tensors of all experts of a layer [experts, ...], by decoder layer.
        stacks: the same tensors of all slots [slots, ...].
        most_rows: rows of the largest pass whose uses are counted; larger ones read prompts.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        quota: int,
        num_shared: int,
        reader: ExpertReader,
        held: Mapping[int, Mapping[str, Tensor]],
        stacks: Mapping[str, Tensor],
        most_rows: int,
    ) -> None:
        assert num_shared >= num_experts, "the experts of a layer must fit together"
        self._layers = list(layers)
        self._num_experts = num_experts
        self._quota = quota
        self._first_shared = len(layers) * quota
        self._reader = reader
        self._held, self._stacks = held, stacks
        self._most_rows = most_rows
        num_slots = self._first_shared + num_shared
        self.num_slots = num_slots
        # By layer and expert; one more entry stands for no expert.
        self._slot_of: Any = np.full((len(layers), num_experts + 1), _NOWHERE, dtype=np.int64)
        self._slot_of[:, num_experts] = num_slots
        self._owner: Any = np.full((num_slots, 2), _NOWHERE, dtype=np.int64)
        self._uses: Any = np.zeros((len(layers), num_experts), dtype=np.float32)
        self._is_busy: Any = np.zeros(num_slots, dtype=bool)  # used by the layer in progress
        self._visited = _NOWHERE
        self._used: Any = np.zeros((len(layers), num_experts), dtype=bool)  # by the pass in progress
        self._counts_uses = False
        self._next_shared = 0
        self._ring: Any = np.tile(np.arange(self._first_shared, num_slots), 2)  # so that any round of it is a slice
        self._unfinished: Any = None  # slots that are being filled; None if all reads have ended
        self.kept_bytes = sum(stack.nbytes for stacks in held.values() for stack in stacks.values())
        self._hits = self._misses = 0
        self._num_bytes, self._wait_s = 0, 0.0
        self._expert_bytes = reader.expert_bytes

    def fill(self, uses: Sequence[Sequence[float]]) -> None:
        """Fill the slots of each layer with the experts that earlier passes used most, before the first pass.

        Args:
            uses: share of earlier passes that used each expert, by layer of the pool.
        """
        self._uses[:] = _FILLED_USES * np.asarray(uses)
        reads = []
        for position, own in enumerate(self._uses):
            best = np.argsort(-own, kind="stable")[: self._quota]
            best = np.sort(best[own[best] > 0])
            slots = position * self._quota + np.arange(len(best))
            self._give_to(position, best, slots)
            reads.append(self._read(position, best, slots))
        for batch in reads:
            batch.wait()

    def begin(self, num_rows: int) -> None:
        """Begin a pass over some rows."""
        self._visited = _NOWHERE
        self._used[:] = False
        self._counts_uses = num_rows <= self._most_rows

    def fetch(self, position: int, ids: Tensor) -> tuple[Tensor, Iterator[Sequence[int]]]:
        """Bring routed experts into slots.

        Args:
            position: position of the layer among those of the pool.
            ids: experts, int64 [rows, k]; the number of experts stands for none.

        Returns:
            Slots of the experts, int64 [rows, k], where the number of slots stands for none. These slots in groups,
            first those whose experts were there, then the others as they are read; an expert that cannot be read
            raises a `ModelError` there.
        """
        rows: Any = np.bincount(ids.numpy().ravel(), minlength=self._num_experts + 1)[: self._num_experts]
        wanted = rows.nonzero()[0]
        self._count(position, wanted)
        slot_of = self._slot_of[position]
        held = slot_of[wanted]
        missing = wanted[held < 0]
        self._is_busy[held[held >= 0]] = True
        self._hits += len(wanted) - len(missing)
        self._misses += len(missing)
        reads = self._begin_reads(position, missing, rows) if len(missing) else []
        return torch.from_numpy(slot_of)[ids], self._arriving(held[held >= 0].tolist(), reads)

    def _arriving(self, ready: Sequence[int], reads: Sequence[tuple[list[int], ReadBatch]]) -> Iterator[Sequence[int]]:
        """Yield the slots that are ready, then those of each batch of reads when it has ended."""
        if ready:
            yield ready
        for slots, batch in reads:
            begin = time.perf_counter()
            batch.wait()
            self._wait_s += time.perf_counter() - begin
            self._num_bytes += len(slots) * self._expert_bytes
            yield slots
        self._unfinished = None

    def _count(self, position: int, wanted: Any) -> None:
        """Count the uses of the experts of a layer, once per pass and expert."""
        if position != self._visited:
            self._visited = position
            self._is_busy[:] = False
            if self._counts_uses:
                self._uses[position] *= _DECAY
        if self._counts_uses:
            new = wanted[~self._used[position, wanted]]
            self._uses[position, new] += 1
            self._used[position, new] = True

    def _begin_reads(self, position: int, missing: Any, rows: Any) -> list[tuple[list[int], ReadBatch]]:
        """Give slots to missing experts and begin to read them, a few at a time and neighbours together."""
        missing = missing[np.lexsort((-rows[missing], -self._uses[position, missing]))]
        slots = self._slots_for(position, missing)
        self._unfinished = slots
        self._give_to(position, missing, slots)
        order = missing.argsort()
        missing, slots = missing[order], slots[order]
        reads = []
        for first in range(0, len(missing), _READ_TOGETHER):
            some = slice(first, first + _READ_TOGETHER)
            reads.append((slots[some].tolist(), self._read(position, missing[some], slots[some])))
        return reads

    def _read(self, position: int, experts: Any, slots: Any) -> ReadBatch:
        """Begin to read experts of a layer into slots, and copy their small tensors."""
        layer = self._layers[position]
        for name, stack in self._held[layer].items():
            self._stacks[name][torch.from_numpy(slots)] = stack[torch.from_numpy(experts)]
        return self._reader.begin(layer, list(zip(experts.tolist(), slots.tolist(), strict=True)))

    def _slots_for(self, position: int, missing: Any) -> Any:
        """Choose slots: the layer's own for experts used more often than those there, and shared ones for the others.

        Args:
            position: position of the layer.
            missing: experts, the most used first.
        """
        own = np.arange(position * self._quota, (position + 1) * self._quota)
        own = own[~self._is_busy[own]]
        there = self._owner[own, 1]
        uses = np.where(there < 0, -1.0, self._uses[position, there])
        order = np.argsort(uses, kind="stable")[: len(missing)]
        own, uses = own[order], uses[order]
        better = self._uses[position, missing[: len(own)]] > uses
        if not self._counts_uses:
            better &= uses < 0
        num_own = len(own) if better.all() else int(better.argmin())
        return np.concatenate([own[:num_own], self._shared(len(missing) - num_own)])

    def _shared(self, count: int) -> Any:
        """Return shared slots that the layer in progress does not use, in the order of a ring."""
        if not count:
            return self._ring[:0]
        num_shared = self.num_slots - self._first_shared
        ring = self._ring[self._next_shared : self._next_shared + num_shared]
        free = ring[~self._is_busy[ring]][:count]
        assert len(free) == count, "the shared slots hold the experts of a layer"
        self._next_shared = (int(free[-1]) + 1 - self._first_shared) % num_shared
        return free

    def _give_to(self, position: int, experts: Any, slots: Any) -> None:
        self._empty(slots)
        self._owner[slots, 0], self._owner[slots, 1] = position, experts
        self._slot_of[position, experts] = slots
        self._is_busy[slots] = True

    def _empty(self, slots: Any) -> None:
        """Forget the experts in slots."""
        layers, experts = self._owner[slots].T
        is_used = layers >= 0
        self._slot_of[layers[is_used], experts[is_used]] = _NOWHERE
        self._owner[slots] = _NOWHERE

    # --- the interface of streamers: layers themselves are resident ---------------------------------------------

    def acquire(self, index: int) -> None:
        """Do nothing: only experts are read."""

    def release(self, index: int) -> None:
        """Do nothing: only experts are read."""

    def experts_used(self) -> bytes:
        """Return the experts that the last pass used; empty after a prompt."""
        return bytes(np.packbits(self._used)) if self._counts_uses else b""

    def restart(self) -> None:
        """After a pass that stopped early, wait for its reads, and forget the experts that may be incomplete."""
        self._reader.drain()
        if self._unfinished is not None:
            self._empty(self._unfinished)
        self._unfinished = None

    def counters(self) -> StreamCounters:
        """Return the bytes of experts that were read, and the seconds that passes waited for them."""
        return StreamCounters(self._num_bytes, self._wait_s, self._hits, self._misses)

    def close(self) -> None:
        """Wait for all reads and close the files."""
        self._reader.close()
