"""The layout of one layer's parameters in one contiguous blob."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import blob_offsets


@dataclass(frozen=True)
class LayerLayout:
    """Names, shapes, dtypes and byte offsets of one layer's parameters within its blob."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, layer: Any, without: Set[str] = frozenset()) -> "LayerLayout":
        """Compute the layout of a decoder layer, except the parameters `without`."""
        named = {name: p for name, p in layer.named_parameters() if name not in without}
        offsets, nbytes = blob_offsets(p.nbytes for p in named.values())
        shapes, dtypes = tuple(p.shape for p in named.values()), tuple(p.dtype for p in named.values())
        return cls(tuple(named), shapes, dtypes, tuple(offsets), nbytes)

    def views(self, blob: Tensor) -> dict[str, Tensor]:
        """Return the parameters as views of a blob, uint8 [>= nbytes]."""
        return {
            name: blob[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, shape, dtype, offset in zip(self.names, self.shapes, self.dtypes, self.offsets, strict=True)
        }


def share_buffers(layer: Any, other: Any) -> None:
    """Replace a layer's buffers by those of a layer of the same class."""
    for name, buffer in other.named_buffers():
        path, _, leaf = name.rpartition(".")
        layer.get_submodule(path)._buffers[leaf] = buffer


def bind(layer: Any, views: Mapping[str, Tensor]) -> None:
    """Replace a layer's parameters by views, once; afterwards only the bytes behind the views change."""
    for name, view in views.items():
        path, _, leaf = name.rpartition(".")
        layer.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(view, requires_grad=False)
