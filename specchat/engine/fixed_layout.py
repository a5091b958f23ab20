"""A pass over tree rows in tensors of fixed sizes, whose values change from pass to pass.

`RowLayout` grows with the text, so every pass has tensors of other shapes. A CUDA graph repeats kernels with the shapes
and addresses of the pass that it recorded. So here the rows see the first `keys` rows of their seat, whatever the seat
holds, and hidden ones are masked. Keys and values go to rows whose numbers are on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout, RowLayout


@dataclass(kw_only=True)
class FixedRows(RowLayout):
    """Positions and visibility of tree rows, in tensors of fixed sizes.

    Attributes:
        ids: token id of each row, int64 [rows].
        places: rows of the buffers that keys and values go to, int64 [rows].
        seen: rows of the seat that each row sees, bool [rows, keys].
        key_at: logical positions of the first rows of the seat, int64 [keys].
    """

    ids: Tensor
    places: Tensor
    seen: Tensor
    key_at: Tensor

    @classmethod
    def of(cls, rows: int, keys: int, device: torch.device) -> FixedRows:
        """Return rows whose values are still to be filled in.

        Args:
            rows: number of rows.
            keys: number of rows of the seat that they may see, a multiple of the alignment.
            device: device of the tensors.
        """
        nothing = torch.zeros(rows, rows, dtype=torch.bool, device=device)
        positions, ids, places = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        seen = torch.zeros(rows, keys, dtype=torch.bool, device=device)
        key_at = torch.zeros(keys, dtype=torch.int64, device=device)
        return cls(
            prefix=0,
            num_linear=0,
            ancestors=nothing,
            positions=positions,
            ids=ids,
            places=places,
            seen=seen,
            key_at=key_at,
        )

    @property
    def length(self) -> int:
        """Number of rows of the seat that may be seen."""
        return len(self.key_at)

    def visible(self, kv_length: int) -> Tensor:
        """Return which rows of the seat each row sees; `kv_length` is the fixed number."""
        assert kv_length == self.length and self.chunk == (0, len(self.ids))
        return self.seen

    def key_positions(self, kv_length: int) -> Tensor:
        """Return the logical positions of the rows of the seat; `kv_length` is the fixed number."""
        assert kv_length == self.length
        return self.key_at

    def fill(self, tokens: Tensor, layout: RowLayout, offset: int) -> None:
        """Take over the values of a pass over tree rows alone; nothing is computed on the host.

        Args:
            tokens: token id of each row, int64 [rows], on the device.
            layout: positions and visibility of the rows, on the device.
            offset: first row of the seat in the buffers.
        """
        num_rows, keys = len(self.ids), self.length
        assert layout.num_rows == num_rows and not layout.num_linear
        layout.chunk = 0, num_rows
        first = offset + layout.prefix + layout.num_earlier
        self.ids.copy_(tokens)
        self.positions.copy_(layout.query_positions())
        self.seen.copy_(layout.visible(keys))
        self.key_at.copy_(layout.key_positions(keys))
        torch.arange(first, first + num_rows, out=self.places)


class FixedLayout(PassLayout):
    """A pass over fixed rows of one seat.

    Args:
        seat: region of the caches.
        rows: rows of the pass.

    Attributes:
        rows: rows of the pass.
    """

    def __init__(self, seat: int, rows: FixedRows) -> None:
        super().__init__([(seat, rows)])
        self.rows = rows
