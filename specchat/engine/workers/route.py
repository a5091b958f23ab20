"""The way of a pass's rows over the ranks: who sends to whom before each layer.

Rank 0 embeds the tokens and scores the rows, so it stands before the first layer and after the last one. A boundary is
the place before a layer, or after the last one. Rows cross a boundary between two ranks in one hop. Every hop of a pass
takes place, even of one that was cancelled: then a rank sends word instead of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor


class PassStoppedError(Exception):
    """Another rank has stopped the pass; internal to the engine."""


class Exchange(Protocol):
    """Sends rows to other ranks and receives rows of them; see `rows.RowExchange`."""

    def send(self, rows: Tensor | None, to: int) -> None:
        """Send rows on the CPU, [n, hidden]; None tells that the pass was stopped."""

    def expect(self, source: int, num_rows: int) -> None:
        """Begin to receive rows; they are taken in the order in which they are expected."""

    def take(self) -> Tensor | None:
        """Wait for the rows that were expected first; None if the pass was stopped."""


class Route:
    """The hops of one rank.

    Args:
        owner: rank of each layer.
        rank: rank of this process.
        exchange: transport of the rows.

    Attributes:
        owner: rank of each layer.
        wait_s: seconds since loading that this rank waited for rows within passes.
        sent_bytes: bytes of rows that it has sent since loading.
    """

    def __init__(self, owner: Sequence[int], rank: int, exchange: Exchange) -> None:
        self.owner = tuple(owner)
        self._rank = rank
        self._exchange = exchange
        ends = (0, *owner, 0)
        boundaries = list(enumerate(pairwise(ends)))
        self._hops = {at: ends for at, ends in boundaries if ends[0] != ends[1] and rank in ends}
        self.wait_s = 0.0
        self.sent_bytes = 0
        self._left = dict[int, int]()  # microbatches that have not crossed yet, by boundary

    @property
    def is_done(self) -> bool:
        """Whether no rows leave this rank or come to it any more in this pass."""
        return not self._left

    def owns(self, layer: int) -> bool:
        """Return whether this rank computes a layer."""
        return self.owner[layer] == self._rank

    def begin(self, num_rows: Sequence[int]) -> None:
        """Begin a pass, and to receive at all hops to this rank, so that no sender need wait for it.

        Args:
            num_rows: number of rows of each microbatch; all come over a boundary before the first one over the next.
        """
        assert self.is_done, "the last pass has ended on every rank"
        for boundary, (source, _) in self._hops.items():
            self._left[boundary] = len(num_rows)
            if source != self._rank:
                for each in num_rows:
                    self._exchange.expect(source, each)

    def cross(self, boundary: int, hidden: Tensor) -> Tensor:
        """Send rows over a boundary, or receive them; return the rows for the next layer, [1, n, hidden].

        Raises:
            PassStoppedError: another rank has stopped the pass.
        """
        if boundary not in self._left:
            return hidden
        source, to = self._hops[boundary]
        if source == self._rank:
            self._count(boundary)
            self._exchange.send(hidden[0].to("cpu").contiguous(), to)
            self.sent_bytes += hidden.nbytes
            return hidden
        begin = time.perf_counter()
        rows = self._exchange.take()
        self.wait_s += time.perf_counter() - begin
        self._count(boundary)
        if rows is None:
            raise PassStoppedError
        return rows.to(hidden.device)[None]

    def finish(self) -> None:
        """Take part in all hops that are left of a pass that this rank has stopped."""
        while not self.is_done:
            boundary = next(iter(self._left))
            source, to = self._hops[boundary]
            if source == self._rank:
                self._exchange.send(None, to)
            else:
                self._exchange.take()
            self._count(boundary)

    def _count(self, boundary: int) -> None:
        self._left[boundary] -= 1
        if not self._left[boundary]:
            del self._left[boundary]
