"""Load a model as planned: resident layers at once, streamed layers during passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.kv_cache import TreeCache
from specchat.engine.linear import settle, use_fast_matmuls
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import LayerStreamer, NoStreamer
from specchat.engine.streaming.cpu import MappedStreamer, MixedStreamer, ThreadStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, pinner
from specchat.engine.streaming.readers import LayerReader, layer_reader_for
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.hf.matrices import plain_linears
from specchat.models.hf.skeleton import lookup_embeddings
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout, bind
from specchat.models.weights.open import ModelWeights
from specchat.models.weights.reader import WeightReader
from specchat.records.plan import Placement, Workload


def load_model(
    weights: ModelWeights,
    work: Workload,
    placement: Placement,
    *,
    cache_rows: int,
    tree_rows: int | None = None,
    grows: bool = False,
    pack: Pack | None = None,
    warn: Callable[[str], None] = lambda _: None,
    model_class: type[TreeModel] = TreeModel,
) -> TreeModel:
    """Load resident layers and all parameters outside the layers, and prepare streaming of the other layers.

    Args:
        weights: model to load; the result owns its modules, and its files are closed as soon as nothing reads them.
        work: device, dtype and rows of passes.
        placement: tiers of the layers, and the number of slots.
        cache_rows: rows that each seat of the KV cache must hold.
        tree_rows: rows among them that a tree may take; None for all beyond the context.
        grows: whether trees grow over several passes, as a draft's trees do.
        pack: pack to read layers from; None reads the checkpoint's own files.
        warn: receives one-line warnings about refused memory pinning and its cost.
        model_class: class of the result.
    """
    skeleton, device, dtype = weights.skeleton, torch.device(work.device), torch_dtype(work.dtype)
    layers, streamed = skeleton.layers, placement.streamed
    with ExitStack() as undo:  # after an error, free the memory of files and threads for a retry with a smaller plan
        reader = undo.enter_context(weights.reader if pack is None else _pack_reader(weights, pack))
        embeddings = lookup_embeddings(skeleton) if work.host_embeddings else None
        assert not work.host_embeddings or embeddings is not None, "embeddings tied to the head stay with the head"
        mapped = reader.read_rest(device, on_host=embeddings)
        if mapped is not None:
            undo.enter_context(mapped)
        read_layer = partial(_read_layer, reader, None if pack is None else ChunkVerifier(pack))
        expanded = set(placement.expanded)
        for index in placement.resident:
            layout = LayerLayout.of(layers[index])
            blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
            read_layer(index, layout, blob)
            bind(layers[index], layout.views(blob.to(device)))
            if device.type == "cpu":
                del blob
                settle(layers[index], plain_linears(layers[index]), dtype, expands=index in expanded)
        cache = TreeCache(
            weights.kv_shapes,
            cache_rows,
            dtype,
            device,
            work.seats,
            tree_rows=cache_rows - work.ctx if tree_rows is None else tree_rows,
            grows=grows,
            num_points=work.restore_points,
        )
        if device.type == "cpu":
            use_fast_matmuls(skeleton.model)
        streamer: LayerStreamer = NoStreamer()
        if streamed:
            slots, in_ram = placement.slots, placement.in_ram
            cached = in_ram if device.type == "cpu" else ()
            layer_reader = layer_reader_for(layers, streamed, reader, pack, cached=cached)
            undo.callback(layer_reader.close)
            if device.type == "cuda":
                host = HostLayers(layers, streamed, in_ram, slots, read_layer, layer_reader, pinner(device, warn))
                undo.callback(host.close)
                streamer = CudaStreamer(layers, streamed, slots, host, device)
            else:
                streamer = _cpu_streamer(layers, streamed, in_ram, slots, layer_reader, pack)
        undo.pop_all()
    if pack is not None or not streamed:
        reader.close()
    return model_class(skeleton, cache, streamer, streamed, work.chunk_rows, device, embeddings, mapped)


def _pack_reader(weights: ModelWeights, pack: Pack) -> WeightReader:
    """Return the reader of a pack, after checking the pack's tensors outside the layers."""
    weights.close()
    pack.rest_checkpoint()
    return WeightReader(weights.skeleton, pack.checkpoint(), is_pack=True)


def _read_layer(
    reader: WeightReader, verifier: ChunkVerifier | None, index: int, layout: LayerLayout, blob: Tensor
) -> None:
    """Fill a blob with a layer, and verify the checksums if there is a verifier."""
    reader.read_layer(index, layout.views(blob))
    if verifier is not None:
        verifier.verify_layer(index, bytes_of(blob[: layout.nbytes]))


def _cpu_streamer(
    layers: Sequence[Any],
    streamed: Sequence[int],
    in_ram: Sequence[int],
    num_slots: int,
    reader: LayerReader,
    pack: Pack | None,
) -> LayerStreamer:
    """Return a streamer that maps packed layers in `in_ram` from the page cache and reads all others into slots."""
    if pack is None:
        return ThreadStreamer(layers, streamed, num_slots, reader)
    mapped, read = in_ram, [index for index in streamed if index not in set(in_ram)]
    streamers: dict[int, LayerStreamer] = {}
    with ExitStack() as undo:
        if mapped:
            in_place = MappedStreamer(layers, mapped, pack)
            undo.callback(in_place.close)
            streamers |= dict.fromkeys(mapped, in_place)
        if read:
            streamers |= dict.fromkeys(read, ThreadStreamer(layers, read, min(num_slots, len(read)), reader))
        undo.pop_all()
    return MixedStreamer(streamers) if mapped and read else streamers[streamed[0]]
