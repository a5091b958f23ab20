"""How the keys and values of layers share buffers: what engine and planner must agree on."""

from __future__ import annotations

from collections.abc import Sequence

from specchat.records.model import KvShape
from specchat.units import MIB

# Most bytes of a buffer that several layers share, by kind of device. A GPU moves the accepted rows of a buffer in two
# kernels, whatever the number of layers. When a cache grows, one old buffer at a time lies beside the new ones, in
# place of the workspaces of a pass. A CPU gains nothing from shared buffers, so each layer has its own.
_MOST_SHARED_BYTES = {"cpu": 0, "cuda": 128 * MIB}
# CUDA's allocator of torch rounds blocks from 10 MiB on up to a multiple of 2 MiB; smaller ones share larger blocks.
_ROUNDED_FROM, _ROUNDED_TO = 10 * MIB, 2 * MIB


def slabs_of(shapes: Sequence[KvShape], rows: int, item_bytes: int, device: str) -> list[list[int]]:
    """Return the layers of each buffer, ascending: neighbours among the layers of one shape.

    Args:
        shapes: shape of what each layer caches.
        rows: number of rows of a layer.
        item_bytes: bytes of one number.
        device: kind of device, "cpu" or "cuda".
    """
    slabs, last = list[list[int]](), dict[tuple[int, int, int], list[int]]()
    for index, shape in enumerate(shapes):
        size = shape.heads, shape.key_dim, shape.value_dim
        layer_bytes = rows * shape.numbers_per_row * item_bytes
        slab = last.get(size)
        if slab is None or (len(slab) + 1) * layer_bytes > _MOST_SHARED_BYTES[device]:
            slab = last[size] = []
            slabs.append(slab)
        slab.append(index)
    return slabs


def allocated_bytes(shapes: Sequence[KvShape], rows: int, item_bytes: int, device: str) -> int:
    """Return the bytes that the buffers take, with what the allocator of a GPU rounds up; see `slabs_of`."""
    total = 0
    for slab in slabs_of(shapes, rows, item_bytes, device):
        shape = shapes[slab[0]]
        dims = [2 * shape.key_dim] if shape.key_dim == shape.value_dim else [shape.key_dim, shape.value_dim]
        for dim in dims:
            nbytes = len(slab) * rows * shape.heads * dim * item_bytes
            is_rounded = device == "cuda" and nbytes >= _ROUNDED_FROM
            total += -(-nbytes // _ROUNDED_TO) * _ROUNDED_TO if is_rounded else nbytes
    return total
