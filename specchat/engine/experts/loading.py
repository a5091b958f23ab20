"""Preparing a pool of expert slots for a model, before its resident layers are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.experts.pool import ExpertPool
from specchat.engine.experts.reader import ExpertReader, HostSlots, LayerExtents
from specchat.engine.streaming.slots import page_aligned
from specchat.models.hf.experts import Fetch, LayerExperts, slot_lists, use_slots
from specchat.models.hf.routers import Routers
from specchat.models.hf.skeleton import Skeleton
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.experts import ExpertLayout, expert_extents, pooled_experts, read_held
from specchat.models.weights.reader import WeightReader
from specchat.records.plan import ExpertSlots


@dataclass(frozen=True)
class PooledExperts:
    """The experts of a model that are read one by one.

    Attributes:
        decoder_layers: all decoder layers of the model.
        layers: experts of each layer that takes part.
        layout: tensors of one expert.
        extents: byte ranges of the experts, by decoder layer.
    """

    decoder_layers: Sequence[Any]
    layers: Sequence[LayerExperts]
    layout: ExpertLayout
    extents: Mapping[int, LayerExtents]

    @classmethod
    def of(cls, skeleton: Skeleton, reader: WeightReader) -> PooledExperts:
        """Find the experts of a model and their places; the plan knows that the files have places."""
        layers = pooled_experts(skeleton)
        layout = ExpertLayout.of(layers[0])
        extents: dict[int, LayerExtents] = {}
        for each in layers:
            places = expert_extents(reader, each, layout)
            assert places is not None, f"the experts of layer {each.layer} must be converted"
            extents[each.layer] = places
        return cls(skeleton.layers, layers, layout, extents)

    def names(self, layer: int) -> frozenset[str]:
        """Return the parameters of a layer that lie in the pool, by name within the layer."""
        return next((each.names for each in self.layers if each.layer == layer), frozenset())

    @property
    def expert_bytes(self) -> int:
        """Bytes that are read for one expert."""
        return sum(extent.nbytes for extent in self.extents[self.layers[0].layer][0])

    def read_held(self, reader: WeightReader, verifier: ChunkVerifier | None) -> dict[int, Mapping[str, Tensor]]:
        """Read the small tensors of all experts [experts, ...], by decoder layer, and verify their checksums."""
        held: dict[int, Mapping[str, Tensor]] = {}
        for each in self.layers:
            _verify(verifier, reader, each.layer, [each.name_of(piece.name) for piece in self.layout.held])
            held[each.layer] = read_held(reader, each, self.layout)
        return held

    def make_pool(
        self,
        slots: ExpertSlots,
        reader: WeightReader,
        verifier: ChunkVerifier | None,
        cached: Collection[int],
        most_rows: int,
    ) -> ExpertPool:
        """Allocate the pool, and let the modules compute from it.

        Args:
            slots: numbers of slots.
            reader: reader of the small tensors that stay in memory.
            verifier: verifier of a pack; None for files without checksums.
            cached: decoder layers whose experts are read through the page cache.
            most_rows: rows of the largest pass whose uses of experts are counted.
        """
        layout, num_slots = self.layout, len(self.layers) * slots.quota + slots.shared
        held = self.read_held(reader, verifier)
        slab = page_aligned(num_slots * layout.nbytes)
        stacks = layout.stacks(slab)
        verify = None if verifier is None else verifier.verify_stored
        routers = Routers(self.decoder_layers, self.layers) if slots.looks_ahead else None
        with ExitStack() as undo:
            expert_reader = ExpertReader(self.extents, HostSlots(slab, layout.nbytes), cached, verify)
            undo.callback(expert_reader.close)
            pool = ExpertPool(
                [each.layer for each in self.layers],
                self.layers[0].num_experts,
                slots.quota,
                slots.shared,
                expert_reader,
                held,
                {piece.name: stacks[piece.name] for piece in layout.held},
                most_rows,
                None if routers is None else routers.likely,
            )
            if slots.uses:
                pool.fill(slots.uses)
            undo.pop_all()
        lists = slot_lists(self.layers[0], stacks, num_slots)
        for position, each in enumerate(self.layers):
            fetch = partial(pool.fetch, position)
            use_slots(each, stacks, lists, fetch if routers is None else partial(_watched, routers, position, fetch))
        return pool


def _watched(routers: Routers, position: int, fetch: Fetch, ids: Tensor) -> tuple[Tensor, Iterator[Sequence[int]]]:
    """Show the ids of a layer's experts to what finds its router, and fetch the experts."""
    routers.saw(position, ids)
    return fetch(ids)


def read_beside(
    reader: WeightReader, verifier: ChunkVerifier | None, layer: int, views: Mapping[str, torch.Tensor]
) -> None:
    """Fill the parameters of a layer that are not in the pool, and verify their checksums if there is a verifier."""
    _verify(verifier, reader, layer, views)
    reader.read_layer(layer, views)


def _verify(verifier: ChunkVerifier | None, reader: WeightReader, layer: int, names: Collection[str]) -> None:
    if verifier is None:
        return
    places = reader.places(layer)
    for name in names:
        verifier.verify_stored(layer, places[name].offset, places[name].offset + places[name].nbytes)
