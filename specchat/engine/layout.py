"""Positions and visibility of the rows of a pass, sequence by sequence.

A pass computes the new rows of one or more sequences, one sequence after another. Each sequence has a seat, which is a
region of the caches. The rows of one sequence are a part of the pass. Rows of different parts never see each other, so
everything that looks across rows (attention, caches, states) works part by part. A chat is a pass of one part.

Within a part, committed tokens in sequence come first, then the nodes of a draft tree. A node sees the committed
tokens, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowLayout:
    """Positions and visibility of one sequence's rows.

    Attributes:
        prefix: number of cache rows that every row of this pass sees.
        num_linear: number of new rows in sequence; each sees the rows before; 0 if tree rows are in the cache already.
        ancestors: tree rows that each new tree row sees, itself included; bool [n, r + n] for r earlier and n new ones.
        positions: logical positions of the rows after the prefix, int64 [num_linear + r + n].
        chunk: range [begin, end) of the new rows that are computed now.
    """

    prefix: int
    num_linear: int
    ancestors: Tensor
    positions: Tensor
    chunk: tuple[int, int] = (0, 0)

    @property
    def num_rows(self) -> int:
        """Number of new rows in this pass."""
        return self.num_linear + self.ancestors.shape[0]

    @property
    def num_earlier(self) -> int:
        """Number of tree rows that are in the cache already, r."""
        return self.ancestors.shape[1] - self.ancestors.shape[0]

    @property
    def length(self) -> int:
        """Number of rows in the cache after the current chunk."""
        return self.prefix + self.num_earlier + self.chunk[1]

    def visible(self, kv_length: int) -> Tensor:
        """Return which cache rows the chunk's rows see, before the architecture's rule: bool [rows, kv_length]."""
        begin, end = self.chunk
        after = self.prefix + self.num_linear  # first tree row's index in the cache
        out = torch.zeros(end - begin, kv_length, dtype=torch.bool, device=self.positions.device)
        out[:, : self.prefix] = True
        split = min(max(self.num_linear, begin), end)  # rows [begin, split) are in sequence, [split, end) are nodes
        if begin < split:
            out[: split - begin, self.prefix : self.prefix + split] = _causal(begin, split, self.positions.device)
        if split < end:
            first, last = split - self.num_linear, end - self.num_linear
            num_seen = self.num_earlier + last
            out[split - begin :, self.prefix : after] = True
            out[split - begin :, after : after + num_seen] = self.ancestors[first:last, :num_seen]
        return out

    def query_positions(self) -> Tensor:
        """Return the logical positions of the current chunk's rows, int64 [rows]."""
        begin, end = self.chunk
        return self.positions[self.num_earlier + begin : self.num_earlier + end]

    def key_positions(self, kv_length: int) -> Tensor:
        """Return the logical positions of the first `kv_length` cache rows; rows past the chunk are masked anyway."""
        tail = self.positions[: kv_length - self.prefix]
        out = torch.zeros(kv_length, dtype=torch.int64, device=self.positions.device)
        out[: self.prefix] = torch.arange(self.prefix, device=out.device)
        out[self.prefix : self.prefix + tail.shape[0]] = tail
        return out


def linear_layout(prefix: int, num_rows: int, device: torch.device) -> RowLayout:
    """Return the layout of committed tokens in sequence, after `prefix` cached rows."""
    nothing = torch.zeros(0, 0, dtype=torch.bool, device=device)
    return RowLayout(prefix, num_rows, nothing, torch.arange(prefix, prefix + num_rows, device=device))


@dataclass(frozen=True)
class Part:
    """One sequence's rows of a pass.

    Attributes:
        seat: region of the caches that holds the sequence.
        first: index of the part's first row among the rows of the pass.
        layout: positions and visibility of the rows.
    """

    seat: int
    first: int
    layout: RowLayout


class PassLayout:
    """The parts of a pass, and the rows that are computed now.

    Args:
        rows: seat and rows of each sequence, in the order of the pass; no seat twice.

    Attributes:
        parts: all parts of the pass.
        num_rows: number of new rows in the pass.
        first_seat, last_seat: lowest and highest seat of the pass.
        chunk: range [begin, end) of the pass's rows that are computed now.
        current: parts with rows in the chunk, each with the places of these rows within the chunk.
        kept: chunks that are computed layer after layer, so that their masks are kept.
    """

    def __init__(self, rows: Iterable[tuple[int, RowLayout]]) -> None:
        parts, first = list[Part](), 0
        for seat, layout in rows:
            parts.append(Part(seat, first, layout))
            first += layout.num_rows
        seats = {part.seat for part in parts}
        assert len(seats) == len(parts) > 0, "a pass has one part per sequence"
        self.parts = tuple(parts)
        self.num_rows = first
        self.first_seat, self.last_seat = min(seats), max(seats)
        self.chunk = (0, 0)
        self.current: tuple[tuple[Part, slice], ...] = ()
        self.kept: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def single(cls, layout: RowLayout, seat: int = 0) -> PassLayout:
        """Return the layout of a pass over one sequence."""
        return cls([(seat, layout)])

    @property
    def positions(self) -> Tensor:
        """Logical positions of the new rows, int64 [num_rows]."""
        positions = [part.layout.positions[part.layout.num_earlier :] for part in self.parts]
        return positions[0] if len(positions) == 1 else torch.cat(positions)

    def select(self, begin: int, end: int) -> None:
        """Set the rows of the pass that are computed now; a chunk may begin and end within parts."""
        if self.chunk == (begin, end):
            return
        self.chunk = begin, end
        current = []
        for part in self.parts:
            first, last = max(begin, part.first), min(end, part.first + part.layout.num_rows)
            if first < last:
                part.layout.chunk = first - part.first, last - part.first
                current.append((part, slice(first - begin, last - begin)))
        self.current = tuple(current)


def _causal(begin: int, end: int, device: torch.device) -> Tensor:
    """Return rows begin..end of a causal mask over `end` columns, bool [end - begin, end]."""
    return torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin)
