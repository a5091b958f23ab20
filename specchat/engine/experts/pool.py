"""A pool of expert slots: the experts that passes use most stay in memory, and the others pass through it.

Layers are visited in a circle, so a pool that gives up the expert that was used longest ago gives up what is needed
next. Measured with 128 experts of 12 layers, a quarter of them in the pool and trees of 8 nodes: such a pool has the
wanted experts in 1% of all cases, and one that keeps the same number of slots for each layer, for the experts of the
highest decayed number of uses, in 55%. What exceeds a layer's slots passes through slots that all layers share.

Passes over prompts use nearly all experts, which says nothing about the next tree. So they change nothing but empty
slots.

While a layer is computed, experts of the next one are read into shared slots that are free: those that its router names
for the present states, or all of them in passes over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specchat.engine.experts.batch import ReadBatch
from specchat.engine.experts.guesses import Guess, Guesses
from specchat.engine.streaming.base import LayerStreamer, StreamCounters
from specchat.records.limits import READ_THREADS

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

# Share of the named experts that are read ahead, those of most rows and uses first. Simulated with a quarter of 128
# experts in the pool, 8 rows and routers that name 85% of a row's experts: passes read 0.142 of all experts instead of
# 0.158 with all named ones, and 0.118 without; 74% of the missing ones are read ahead instead of 81%.
_SURE_SHARE = 0.8

# From the position of a layer to the experts that it will probably choose, int64 [rows, k]; None if nothing is known.
Likely = Callable[[int], Tensor | None]


class ExpertSource(Protocol):
    """Fills slots with experts.

    Attributes:
        expert_bytes: bytes that are moved for one expert.
        wait_s: seconds that passes waited for experts.
    """

    expert_bytes: int

    @property
    def wait_s(self) -> float:
        """Seconds that passes waited for experts."""

    def free_slots(self) -> None:
        """Let slots be filled that the layers before have used, after all work that is queued now."""

    def begin(self, layer: int, experts: Sequence[int], slots: Sequence[int], is_few: bool) -> ReadBatch:
        """Begin to fill slots with experts of a layer, and return at once."""

    def wait_for(self, batch: ReadBatch) -> None:
        """Wait until slots are filled, or make all work wait that is queued later; raise the error of a read."""

    def drain(self) -> None:
        """Wait until no read is in progress; a failed read counts as ended."""

    def close(self) -> None:
        """Wait for all reads, and release files and memory."""


class ExpertPool(LayerStreamer):
    """Slots for the experts of all layers.

    At first the slots of layer j are j * quota to (j + 1) * quota, and the shared ones follow. A guess lies in a shared
    slot; if its layer keeps the expert, this slot and one of the layer's own change roles. A slot is given away only
    after the last read into it has ended, and never while the layer in progress uses it.

    Args:
        layers: decoder layers with experts, ascending.
        num_experts: number of experts of each layer.
        quota: number of slots of each layer.
        num_shared: number of slots that all layers share, at least `num_experts`.
        source: fills slots; closed together with the pool.
        held: small tensors of all experts of a layer [experts, ...], by decoder layer.
        stacks: the same tensors of all slots [slots, ...].
        most_rows: rows of the largest pass whose uses are counted; larger ones read prompts.
        likely: names likely experts of the next layer; `fetch` reads nothing ahead without.
        on_close: releases what the source used.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        quota: int,
        num_shared: int,
        source: ExpertSource,
        held: Mapping[int, Mapping[str, Tensor]],
        stacks: Mapping[str, Tensor],
        most_rows: int,
        likely: Likely | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        assert num_shared >= num_experts, "the experts of a layer must fit together"
        self._layers = list(layers)
        self._num_experts = num_experts
        self._quota = quota
        self._first_shared = len(layers) * quota
        self._source = source
        self._held, self._stacks = held, stacks
        self._on_close = on_close
        self._most_rows, self._num_rows = most_rows, 0
        self._likely = likely
        num_slots = self._first_shared + num_shared
        self.num_slots = num_slots
        # By layer and expert; one more entry of each layer stands for no expert. An owner is an index into the flat
        # array, whose last entry belongs to slots without an owner, so nothing asks whether there is one.
        self._width = num_experts + 1
        self._flat: Any = np.full(len(layers) * self._width + 1, _NOWHERE, dtype=np.int64)
        self._slot_of: Any = self._flat[:-1].reshape(len(layers), self._width)
        self._slot_of[:, num_experts] = num_slots
        self._slots_by_id = [torch.from_numpy(own) for own in self._slot_of]
        self._owner: Any = np.full(num_slots, _NOWHERE, dtype=np.int64)
        self._flat_uses: Any = np.zeros(len(self._flat), dtype=np.float32)
        self._flat_uses[-1] = -1.0  # a slot without an owner goes first
        self._uses: Any = self._flat_uses[:-1].reshape(len(layers), self._width)[:, :num_experts]
        self._is_busy: Any = np.zeros(num_slots, dtype=bool)  # used by the layer in progress
        self._visited = _NOWHERE
        self._used: Any = np.zeros((len(layers), num_experts), dtype=bool)  # by the pass in progress
        self._counts_uses = False
        self._own: Any = np.arange(self._first_shared).reshape(len(layers), quota)
        self._num_shared, self._next_shared = num_shared, 0
        self._ring: Any = np.tile(np.arange(self._first_shared, num_slots), 2)  # so that any round of it is a slice
        self._place: Any = np.arange(num_slots) - self._first_shared  # of a shared slot in the ring
        self._guesses = Guesses(num_slots)
        self._guessed = False  # for the layer after the one in progress
        self._unfinished: Any = None  # slots that are being filled; None if all reads have ended
        self.kept_bytes = sum(stack.nbytes for stacks in held.values() for stack in stacks.values())
        self._hits = self._misses = 0
        self._num_bytes = 0
        self._expert_bytes = source.expert_bytes

    def fill(self, uses: Sequence[Sequence[float]]) -> None:
        """Fill the slots of each layer with the experts that earlier passes used most, before the first pass.

        Args:
            uses: share of earlier passes that used each expert, by layer of the pool.
        """
        self._uses[:] = _FILLED_USES * np.asarray(uses)
        reads = []
        self._source.free_slots()
        for position, own in enumerate(self._uses):
            best = np.argsort(-own, kind="stable")[: self._quota]
            best = np.sort(best[own[best] > 0])
            slots = self._own[position, : len(best)]
            self._give_to(position, best, slots)
            reads += self._read_together(position, best, slots)
        for _, batch in reads:
            self._source.wait_for(batch)

    def begin(self, num_rows: int) -> None:
        """Begin a pass over some rows."""
        self._visited = _NOWHERE
        self._used[:] = False
        self._num_rows, self._counts_uses = num_rows, num_rows <= self._most_rows

    def fetch(self, position: int, ids: Tensor) -> tuple[Tensor, Iterator[Sequence[int]]]:
        """Bring routed experts into slots, and begin to read some of the next layer.

        Args:
            position: position of the layer among those of the pool.
            ids: experts, int64 [rows, k]; the number of experts stands for none.

        Returns:
            Slots of the experts, int64 [rows, k], where the number of slots stands for none; and what `bring` returns.
        """
        arriving = self.bring(position, ids)
        slots = self._slots_by_id[position][ids]
        if self._likely is not None:
            self.look_ahead(position, len(ids), self._likely)
        return slots, arriving

    def slots_of(self, position: int) -> Any:
        """Return the slot of each expert of a layer, int64 [N]; negative without one."""
        return self._slot_of[position, : self._num_experts]

    def bring(self, position: int, ids: Tensor) -> Iterator[Sequence[int]]:
        """Bring routed experts into slots.

        Args:
            position: position of the layer among those of the pool.
            ids: experts in host memory, int64 [rows, k]; the number of experts stands for none.

        Returns:
            Slots of the experts in groups, first those whose experts were there, then the others as they are read; an
            expert that cannot be read raises a `ModelError` there.
        """
        rows = self._rows_of(ids)
        wanted = rows.nonzero()[0]
        self._enter(position)
        self._source.free_slots()
        self._count(position, wanted)
        slot_of = self._slot_of[position]
        held = slot_of[wanted]
        is_there = held >= 0
        there, missing = held[is_there], wanted[~is_there]
        self._is_busy[there] = True
        ready = there[~self._guesses.is_taken[there]]
        guesses = self._guesses.take(position, there)
        if guesses and len(ids) == self._num_rows:
            self._empty(self._guesses.withdraw(position))
        self._hits += len(ready)
        self._misses += len(wanted) - len(ready)
        reads = [(guess.slots.tolist(), guess.batch) for guess in guesses]
        if len(missing) or guesses:
            guessed = [self._owner[guess.slots] - position * self._width for guess in guesses]
            reads += self._begin_reads(position, missing, np.concatenate([missing, *guessed]), rows)
        return self._arriving(ready.tolist(), reads)

    def _rows_of(self, ids: Tensor) -> Any:
        """Return the number of rows that use each expert."""
        return np.bincount(ids.numpy().ravel(), minlength=self._num_experts + 1)[: self._num_experts]

    def _arriving(self, ready: Sequence[int], reads: Sequence[tuple[list[int], ReadBatch]]) -> Iterator[Sequence[int]]:
        """Yield the slots that are ready, then those of each batch of reads when it has ended."""
        if ready:
            yield ready
        for slots, batch in reads:
            self._source.wait_for(batch)
            self._num_bytes += len(slots) * self._expert_bytes
            yield slots
        self._unfinished = None

    def _enter(self, position: int) -> None:
        """Free the slots of the layer before when a pass comes to a layer; further rows of a layer change nothing."""
        if position == self._visited:
            return
        self._visited = position
        self._is_busy[:] = False
        self._guessed = False
        if self._guesses.any:
            self._empty(self._guesses.release(but=position))
        if self._counts_uses:
            self._uses[position] *= _DECAY

    def _count(self, position: int, wanted: Any) -> None:
        """Count the uses of the experts of a layer, once per pass and expert."""
        if self._counts_uses:
            used = self._used[position]
            self._uses[position, wanted] += ~used[wanted]
            used[wanted] = True

    def _begin_reads(self, position: int, missing: Any, new: Any, rows: Any) -> list[tuple[list[int], ReadBatch]]:
        """Give slots to missing experts, and begin to read them.

        Args:
            position: position of the layer.
            missing: experts that must be read.
            new: missing and guessed experts; the latter exchange their slots for the layer's own if used often.
            rows: number of rows that use each expert.
        """
        slot_of = self._slot_of[position]
        worth = self._uses[position, new]
        order = np.argsort(-(worth * np.float64(1 << 20) + rows[new]), kind="stable")
        new, worth = new[order], worth[order]
        own = self._own_for(position, worth)
        is_missing = slot_of[new] < 0
        takes = is_missing[: len(own)]
        if not takes.all():
            self._exchange(position, slot_of[new[: len(own)][~takes]], own[~takes])
        missing = new[is_missing]
        slots = np.empty_like(missing)
        num_own = int(takes.sum())
        slots[:num_own] = self._own[position, own[takes]]
        slots[num_own:] = self._shared(len(missing) - num_own)
        self._give_to(position, missing, slots)
        self._is_busy[slots] = True
        self._unfinished = slot_of[new]
        order = missing.argsort()
        return self._read_together(position, missing[order], slots[order])

    def _read_together(self, position: int, experts: Any, slots: Any) -> list[tuple[list[int], ReadBatch]]:
        """Begin to read experts of a layer into slots, a few at a time, and copy their small tensors."""
        layer = self._layers[position]
        for name, stack in self._held[layer].items():
            self._stacks[name][torch.from_numpy(slots)] = stack[torch.from_numpy(experts)]
        wanted, places = experts.tolist(), slots.tolist()
        parts = [slice(first, first + _READ_TOGETHER) for first in range(0, len(wanted), _READ_TOGETHER)]
        is_few = len(wanted) < READ_THREADS
        return [(places[part], self._source.begin(layer, wanted[part], places[part], is_few)) for part in parts]

    def _own_for(self, position: int, worth: Any) -> Any:
        """Return which of the layer's own slots go to new experts that were used more often than those there.

        Args:
            position: position of the layer.
            worth: uses of the new experts, the most used first; the first of them get the slots.
        """
        slots = self._own[position]
        uses = self._flat_uses[self._owner[slots]]
        uses[self._is_busy[slots]] = np.inf
        own = np.argsort(uses, kind="stable")[: len(worth)]
        uses = uses[own]
        better = (worth[: len(own)] > uses) & (self._counts_uses or uses < 0)
        return own if better.all() else own[: int(better.argmin())]

    def _exchange(self, position: int, guessed: Any, own: Any) -> None:
        """Swap slots of guesses for slots of the layer, without moving the experts in them.

        Args:
            position: position of the layer.
            guessed: shared slots.
            own: numbers of the layer's own slots, one for each shared slot.
        """
        places = self._place[guessed]
        left = self._own[position, own]
        self._own[position, own] = guessed
        self._ring[places] = self._ring[places + self._num_shared] = left
        self._place[left] = places

    def _shared(self, count: int) -> Any:
        """Return shared slots that neither the layer in progress nor a guess uses, in the order of a ring."""
        if not count:
            return self._ring[:0]
        free = self._free_shared()
        if len(free) < count:  # the layer in progress comes first
            self._empty(self._guesses.release())
            self._guesses.settle(wait=True)
            free = self._free_shared()
        assert len(free) >= count, "the shared slots hold the experts of a layer"
        self._next_shared = (int(self._place[free[count - 1]]) + 1) % self._num_shared
        return free[:count]

    def _free_shared(self) -> Any:
        ring = self._ring[self._next_shared : self._next_shared + self._num_shared]
        return ring[~(self._is_busy[ring] | self._guesses.is_taken[ring])]

    def asks_router(self, position: int, num_rows: int) -> bool:
        """Return whether `look_ahead` asks for likely experts of the next layer.

        Args:
            position: position of the layer in progress.
            num_rows: number of its rows that are computed now.
        """
        return position + 1 < len(self._layers) and num_rows == self._num_rows and self._counts_uses

    def look_ahead(self, position: int, num_rows: int, name_likely: Likely) -> None:
        """Begin to read likely experts of the next layer into free shared slots, once for each layer.

        Args:
            position: position of the layer in progress.
            num_rows: number of its rows that are computed now.
            name_likely: names likely experts.
        """
        following = position + 1
        if self._guessed or following == len(self._layers):
            return
        self._guessed = True
        if not self.asks_router(position, num_rows):
            likely = self._all_of(following)
            room = self._num_room(position)
        else:
            ids = name_likely(following)
            if ids is None:
                return
            rows = self._rows_of(ids)
            likely = rows.nonzero()[0]
            likely = likely[self._slot_of[following, likely] < 0]
            worth = self._uses[following, likely]
            likely = likely[np.argsort(-(rows[likely] + worth / (1.0 + worth)), kind="stable")]
            likely = likely[: math.ceil(_SURE_SHARE * len(likely))]
            room = len(self._free_shared())
        likely = likely[:room]
        slots = self._shared(len(likely))
        self._give_to(following, likely, slots)
        reads = self._read_together(following, likely, slots)
        for first, (_, batch) in zip(range(0, len(likely), _READ_TOGETHER), reads, strict=True):
            self._guesses.add(Guess(following, slots[first : first + _READ_TOGETHER], batch))

    def _all_of(self, position: int) -> Any:
        """Return all experts of a layer that are in no slot, the most used first."""
        absent = (self._slot_of[position, : self._num_experts] < 0).nonzero()[0]
        return absent[np.argsort(-self._uses[position, absent], kind="stable")]

    def _num_room(self, position: int) -> int:
        """Return how many shared slots stay free if the layer in progress uses all of its experts."""
        absent = int((self._slot_of[position, : self._num_experts] < 0).sum())
        return max(len(self._free_shared()) - absent, 0)

    def _give_to(self, position: int, experts: Any, slots: Any) -> None:
        self._flat[self._owner[slots]] = _NOWHERE
        self._owner[slots] = position * self._width + experts
        self._slot_of[position, experts] = slots

    def _empty(self, slots: Any) -> None:
        """Forget the experts in slots."""
        self._flat[self._owner[slots]] = _NOWHERE
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
        self._source.drain()
        self._empty(self._guesses.release())
        if self._unfinished is not None:
            self._empty(self._unfinished)
        self._unfinished = None

    def counters(self) -> StreamCounters:
        """Return the bytes of experts that were moved, and the seconds that passes waited for them."""
        useful, useless = self._guesses.useful, self._guesses.useless
        num_bytes = self._num_bytes + useless * self._expert_bytes
        return StreamCounters(num_bytes, self._source.wait_s, self._hits, self._misses, useful, useless)

    def close(self) -> None:
        """Wait for all reads, and release files and memory."""
        self._source.close()
        self._on_close()
