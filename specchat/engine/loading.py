"""Load a model as planned: resident layers at once, streamed layers during passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from specchat.engine.kv_cache import TreeCache
from specchat.engine.linear import use_fast_matmuls
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import LayerStreamer, NoStreamer
from specchat.engine.streaming.cuda import CudaStreamer
from specchat.engine.streaming.host_layers import HostLayers, pinner
from specchat.engine.streaming.kept import CpuTiers, KeptLayers, NothingKept, PinnedLayers
from specchat.engine.streaming.readers import layer_reader_for
from specchat.engine.streaming.slots import page_aligned
from specchat.errors import AllocationError, is_lack_of_memory
from specchat.hardware.pressure import MemoryWatch
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.hf.skeleton import lookup_embeddings
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.layout import LayerLayout, bind
from specchat.models.weights.open import ModelWeights
from specchat.models.weights.reader import WeightReader
from specchat.records.plan import Placement, Plan, Workload
from specchat.units import format_bytes


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
        for index in placement.resident:
            layout = LayerLayout.of(layers[index])
            blob = page_aligned(layout.nbytes)  # a mapping of its own, so that its memory can be given back
            read_layer(index, layout, blob)
            bind(layers[index], layout.views(blob.to(device)))
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
        kept: KeptLayers = NothingKept()
        if device.type == "cpu":
            open_reader = partial(layer_reader_for, layers, reader, pack, placement.in_ram)
            kept = tiers = CpuTiers(layers, placement, open_reader, pack, reader.close)
            streamer = tiers.streamer
        elif streamed:
            slots, in_ram = placement.slots, placement.in_ram
            layer_reader = layer_reader_for(layers, reader, pack, cached=())
            undo.callback(layer_reader.close)
            host = HostLayers(layers, streamed, in_ram, slots, read_layer, layer_reader, pinner(device, warn))
            undo.callback(host.close)
            streamer = CudaStreamer(layers, streamed, slots, host, device)
            kept = PinnedLayers(streamer)
        undo.pop_all()
    if pack is not None or (device.type != "cpu" and not streamed):
        reader.close()
    return model_class(skeleton, cache, streamer, streamed, work.chunk_rows, device, embeddings, mapped, kept)


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


def check_room(plan: Plan, watch: MemoryWatch | None) -> None:
    """Check that the host memory of a plan is free, because the system would swap, or end the process, without a word.

    Raises:
        AllocationError: less is free.
    """
    needed = plan.device_bytes if plan.work.device == "cpu" else plan.host_bytes
    free = None if watch is None else watch.available_bytes()
    if free is not None and needed > free:
        raise AllocationError(
            f"cannot allocate {format_bytes(needed)} of RAM: {format_bytes(free)} of it is free",
            hint="close other programs, or set a smaller --vram, --ram or --ctx",
        )


@contextmanager
def allocating(plan: Plan) -> Iterator[None]:
    """Convert out-of-memory errors of libraries into AllocationError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
    else:
        return
    # Raise outside the handler: the caught error's frames keep earlier allocations alive.
    raise AllocationError(
        f"cannot allocate {format_bytes(plan.device_bytes)} on {plan.work.device}",
        hint="close other programs, or set a smaller --vram or --ctx",
    )
