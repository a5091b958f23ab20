"""The way of a pass's rows over the ranks: who sends to whom before each layer.

Rank 0 embeds the tokens and scores the rows, so it stands before the first layer and after the last one. A boundary is
the place before a layer, or after the last one. Rows cross a boundary between two ranks in one hop. Every hop of a pass
takes place, even of one that was cancelled: then a rank sends word instead of rows.
"""

from __future__ import annotations

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
    """

    def __init__(self, owner: Sequence[int], rank: int, exchange: Exchange) -> None:
        self._owner = tuple(owner)
        self._rank = rank
        self._exchange = exchange
        ends = (0, *owner, 0)
        boundaries = list(enumerate(pairwise(ends)))
        self._hops = [(at, *ends) for at, ends in boundaries if ends[0] != ends[1] and rank in ends]
        self._next = len(self._hops)
        self._num_rows = 0

    @property
    def is_done(self) -> bool:
        """Whether no rows leave this rank or come to it any more in this pass."""
        return self._next == len(self._hops)

    def owns(self, layer: int) -> bool:
        """Return whether this rank computes a layer."""
        return self._owner[layer] == self._rank

    def begin(self, num_rows: int) -> None:
        """Begin a pass over some rows."""
        assert self.is_done, "the last pass has ended on every rank"
        self._next, self._num_rows = 0, num_rows
        self._expect()

    def cross(self, boundary: int, hidden: Tensor) -> Tensor:
        """Send rows over a boundary, or receive them; return the rows for the next layer, [1, n, hidden].

        Raises:
            PassStoppedError: another rank has stopped the pass.
        """
        if self.is_done or self._hops[self._next][0] != boundary:
            return hidden
        _, source, to = self._hops[self._next]
        if source == self._rank:
            self._next += 1
            self._exchange.send(hidden[0].to("cpu").contiguous(), to)
            return hidden
        rows = self._exchange.take()
        self._next += 1
        self._expect()
        if rows is None:
            raise PassStoppedError
        return rows.to(hidden.device)[None]

    def finish(self) -> None:
        """Take part in all hops that are left of a pass that this rank has stopped."""
        while not self.is_done:
            _, source, to = self._hops[self._next]
            if source == self._rank:
                self._exchange.send(None, to)
            else:
                self._exchange.take()
            self._next += 1
            if source != self._rank:
                self._expect()

    def _expect(self) -> None:
        """Begin to receive at the next hop to this rank, so that the sender need not wait for it."""
        for _, source, _ in self._hops[self._next :]:
            if source != self._rank:
                self._exchange.expect(source, self._num_rows)
                return
