"""Reading a model into memory as planned: resident layers now, the others as passes need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.attention import tree_attention
from specchat.engine.kv_cache import TreeCache
from specchat.engine.linear import use_fast_products
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import LayerStreamer, NoStreamer
from specchat.engine.streaming.cpu import MappedStreamer, MixedStreamer, ThreadStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, pinner
from specchat.engine.streaming.readers import LayerReader, layer_reader_for
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import kv_shapes, load_config
from specchat.models.hf.skeleton import Skeleton, build_skeleton, lookup_embeddings
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.choose_recipe import choose_recipe
from specchat.models.weights.layout import LayerLayout, bind
from specchat.models.weights.quantizing_reader import open_reader
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import apply_recipe
from specchat.records.model import ModelSource


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache_rows: int,
    chunk_rows: int,
    resident: Sequence[int] | None = None,
    num_slots: int = 0,
    in_ram: Sequence[int] = (),
    host_embeddings: bool = False,
    pack: Pack | None = None,
    quant: str = "none",
    warn: Callable[[str], None] = lambda _: None,
) -> TreeModel:
    """Reads a model into memory: resident layers and everything outside the layers now, the rest as passes need it.

    Args:
        source: local files.
        dtype: of weights, activations and cache.
        device: where passes run.
        cache_rows: rows that the cache must hold.
        chunk_rows: rows that one layer computes at a time.
        resident: indices of layers that stay; None for all.
        num_slots: staging buffers for the others.
        in_ram: indices of the others whose bytes stay in host memory between passes.
        host_embeddings: whether input embeddings stay in host memory; of a model whose head does not share them.
        pack: the weights repacked, if they have been; else they are read from `source`.
        quant: what the matrices are stored in; those read from `source` are quantized here.
        warn: told in one line of what the system refused and what that costs.
    """
    skeleton = build_skeleton(load_config(source.path), dtype, tree_attention)
    stays = set(range(len(skeleton.layers)) if resident is None else resident)
    streamed = [index for index in range(len(skeleton.layers)) if index not in stays]
    kept = [index for index in streamed if index in set(in_ram)]
    with ExitStack() as undo:  # after an error, what is open or runs would keep memory that a smaller plan needs
        reader = undo.enter_context(_open_reader(skeleton, source, pack, quant))
        embeddings = lookup_embeddings(skeleton) if host_embeddings else None
        assert not host_embeddings or embeddings is not None, "what the head shares stays with it"
        reader.read_rest(device, on_host=embeddings)
        read_layer = partial(_read_layer, reader, None if pack is None else ChunkVerifier(pack))
        for index in sorted(stays):
            layout = LayerLayout.of(skeleton.layers[index])
            blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
            read_layer(index, layout, blob)
            bind(skeleton.layers[index], layout.views(blob.to(device)))
        cache = TreeCache(kv_shapes(skeleton.config), cache_rows, dtype, device)
        if device.type == "cpu":
            use_fast_products(skeleton.model)
        streamer: LayerStreamer = NoStreamer()
        if streamed:
            filler = layer_reader_for(
                skeleton.layers, streamed, reader, pack, cached=kept if device.type == "cpu" else ()
            )
            undo.callback(filler.close)
            if device.type == "cuda":
                host = HostLayers(skeleton.layers, streamed, kept, num_slots, read_layer, filler, pinner(device, warn))
                undo.callback(host.close)
                streamer = CudaStreamer(skeleton.layers, streamed, num_slots, host, device)
            else:
                streamer = _cpu_streamer(skeleton.layers, streamed, kept, num_slots, filler, pack)
        undo.pop_all()
    if pack is not None or not streamed:
        reader.close()
    return TreeModel(skeleton, cache, streamer, streamed, chunk_rows, device, embeddings)


def _open_reader(skeleton: Skeleton, source: ModelSource, pack: Pack | None, quant: str) -> WeightReader:
    """Replaces the modules of quantized matrices, and finds what fills them."""
    recipe = choose_recipe(source, skeleton, quant)
    if pack is None:
        return open_reader(skeleton, open_checkpoint(source.path), recipe)
    if recipe is not None:
        apply_recipe(skeleton, recipe)
    pack.rest_checkpoint()  # checks what is read next
    return WeightReader(skeleton, pack.checkpoint())


def _read_layer(
    reader: WeightReader, verifier: ChunkVerifier | None, index: int, layout: LayerLayout, blob: Tensor
) -> None:
    """Fills a blob with a layer, checked if there are checksums."""
    reader.read_layer(index, layout.views(blob))
    if verifier is not None:
        verifier.verify_layer(index, bytes_of(blob[: layout.nbytes]))


def _cpu_streamer(
    layers: Sequence[Any],
    streamed: Sequence[int],
    in_ram: Sequence[int],
    num_slots: int,
    filler: LayerReader,
    pack: Pack | None,
) -> LayerStreamer:
    """Packed layers that fit in memory are computed in the page cache; all others are read into slots."""
    if pack is None:
        return ThreadStreamer(layers, streamed, num_slots, filler)
    mapped, read = in_ram, [index for index in streamed if index not in set(in_ram)]
    ways: dict[int, LayerStreamer] = {}
    with ExitStack() as undo:
        if mapped:
            in_place = MappedStreamer(layers, mapped, pack)
            undo.callback(in_place.close)
            ways |= dict.fromkeys(mapped, in_place)
        if read:
            ways |= dict.fromkeys(read, ThreadStreamer(layers, read, min(num_slots, len(read)), filler))
        undo.pop_all()
    return MixedStreamer(ways) if mapped and read else ways[streamed[0]]
