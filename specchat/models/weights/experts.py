"""One expert's tensors in a slot, and their places in the files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import blob_offsets
from specchat.models.hf.experts import LayerExperts, find_experts
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.modules import format_key
from specchat.models.weights.reader import WeightReader
from specchat.records.model import is_held_piece


@dataclass(frozen=True)
class Piece:
    """One tensor of an expert.

    Attributes:
        name: name within the experts' module, as in `LayerExperts.pieces`.
        shape: shape of one expert's tensor.
        dtype: dtype of the tensor.
        offset: first byte within the slot.
        is_stacked: whether one parameter holds the piece of all experts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    is_stacked: bool

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertLayout:
    """The tensors of one expert within a slot.

    Attributes:
        pieces: tensors by ascending offset.
        nbytes: length of a slot, a multiple of a page.
    """

    pieces: tuple[Piece, ...]
    nbytes: int

    @classmethod
    def of(cls, experts: LayerExperts) -> "ExpertLayout":
        """Compute the layout of the experts of a layer, from parameters that may be on meta."""
        tensors = experts.pieces
        offsets, nbytes = blob_offsets(tensor.nbytes for tensor in tensors.values())
        pieces = (
            Piece(name, tuple(tensor.shape), tensor.dtype, offset, experts.is_stacked(name))
            for (name, tensor), offset in zip(tensors.items(), offsets, strict=True)
        )
        return cls(tuple(pieces), nbytes)

    @property
    def held(self) -> tuple[Piece, ...]:
        """Pieces too small to be read for each expert; they stay in memory for all experts of all layers."""
        total = sum(piece.nbytes for piece in self.pieces)
        return tuple(piece for piece in self.pieces if piece.is_stacked and is_held_piece(piece.nbytes, total))

    def stacks(self, slab: Tensor) -> dict[str, Tensor]:
        """Return all slots of a slab, uint8 [slots * nbytes], as stacked parameters: strided views [slots, ...]."""
        num_slots = slab.numel() // self.nbytes
        return {piece.name: self._stack(slab.view(piece.dtype), piece, num_slots) for piece in self.pieces}

    def _stack(self, flat: Tensor, piece: Piece, num_slots: int) -> Tensor:
        item = piece.dtype.itemsize
        strides = [prod(piece.shape[dim + 1 :]) for dim in range(len(piece.shape))]
        return flat.as_strided((num_slots, *piece.shape), (self.nbytes // item, *strides), piece.offset // item)


@dataclass(frozen=True)
class Extent:
    """A byte range of one expert: its file, its start there, its start in the slot (`target`), and its size."""

    path: Path
    begin: int
    target: int
    nbytes: int


def pooled_experts(skeleton: Skeleton) -> tuple[LayerExperts, ...]:
    """List the layers whose experts may share one pool: those of the commonest layout and number of experts."""
    found = {experts: _kind(experts) for experts in _unique(find_experts(skeleton))}
    if not found:
        return ()
    commonest = Counter(found.values()).most_common(1)[0][0]
    return tuple(experts for experts, layout in found.items() if layout == commonest)


def _kind(experts: LayerExperts) -> tuple[object, ...]:
    """Return what experts of two layers have in common if they can share slots."""
    formats = [format_key(matrices[0]) for matrices in experts.lists.values()]
    return ExpertLayout.of(experts), experts.num_experts, *formats


def _unique(experts: Sequence[LayerExperts]) -> Sequence[LayerExperts]:
    """Return the experts whose module no other layer uses."""
    uses = Counter(id(each.module) for each in experts)
    return [each for each in experts if uses[id(each.module)] == 1]


def expert_extents(
    reader: WeightReader, experts: LayerExperts, layout: ExpertLayout
) -> tuple[tuple[Extent, ...], ...] | None:
    """Return the byte ranges of each expert of a layer, except `layout.held`.

    Returns:
        Byte ranges by expert; None if the files do not hold the experts as the model computes with them.
    """
    extents: list[list[Extent]] = [[] for _ in range(experts.num_experts)]
    for piece in layout.pieces:
        if piece in layout.held:
            continue
        names = [experts.name_of(piece.name, expert) for expert in range(experts.num_experts)]
        places = (
            reader.stack_places(experts.layer, names[0])
            if piece.is_stacked
            else reader.stored_places(experts.layer, names)
        )
        if places is None:
            return None
        for own, infos in zip(extents, places, strict=True):
            target = piece.offset
            for info in infos:
                own.append(Extent(info.file, info.offset, target, info.nbytes))
                target += info.nbytes
            assert target == piece.offset + piece.nbytes, f"{piece.name} of layer {experts.layer}"
    return tuple(map(tuple, extents))


def read_held(reader: WeightReader, experts: LayerExperts, layout: ExpertLayout) -> Mapping[str, Tensor]:
    """Read the small pieces of all experts of a layer: stacked parameters [N, ...] by name within the module."""
    stacks = {
        piece.name: torch.empty(experts.num_experts, *piece.shape, dtype=piece.dtype, device="cpu")
        for piece in layout.held
    }
    reader.read_plain(experts.layer, {experts.name_of(name): stack for name, stack in stacks.items()})
    return stacks


def have_places(reader: WeightReader, skeleton: Skeleton) -> bool:
    """Return whether the experts of a model can be read one by one from its files."""
    pooled = pooled_experts(skeleton)
    return bool(pooled) and all(expert_extents(reader, each, ExpertLayout.of(each)) is not None for each in pooled)
