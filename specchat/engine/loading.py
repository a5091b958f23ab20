"""Load a model as planned: resident layers at once, streamed layers during passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.experts.gpu_loading import make_gpu_pool
from specchat.engine.experts.loading import PooledExperts, read_beside
from specchat.engine.experts.pool import ExpertPool
from specchat.engine.hops import Hops
from specchat.engine.kv_cache import TreeCache
from specchat.engine.linear import settle, use_fast_matmuls
from specchat.engine.model import TreeModel
from specchat.engine.streaming.devices import LayerFiles, open_streamers
from specchat.engine.streaming.host_layers import pinner
from specchat.engine.streaming.kept import NothingKept
from specchat.engine.streaming.readers import LayerReader, SharedReader, read_layers
from specchat.engine.streaming.slots import page_aligned
from specchat.engine.warming import warm_up
from specchat.errors import AllocationError, is_lack_of_memory
from specchat.hardware.pressure import MemoryWatch
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.checkpoint.mapped_file import MappedFile
from specchat.models.hf.matrices import plain_linears
from specchat.models.hf.skeleton import Skeleton, lookup_embeddings
from specchat.models.packs.file_format import bytes_of
from specchat.models.packs.pack import Pack
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.quant.modules import QuantLinear, Scratch, quant_linears
from specchat.models.weights.layout import LayerLayout, bind
from specchat.models.weights.open import ModelWeights
from specchat.models.weights.reader import WeightReader
from specchat.records.model import KvShape
from specchat.records.plan import ELSEWHERE, Placement, Plan, Workload
from specchat.threads import Thread
from specchat.units import format_bytes


def load_model(
    weights: ModelWeights,
    work: Workload,
    placement: Placement,
    *,
    cache_rows: int,
    resident: Sequence[int] | None = None,
    tree_rows: int | None = None,
    grows: bool = False,
    pack: Pack | None = None,
    warn: Callable[[str], None] = lambda _: None,
    model_class: Callable[..., TreeModel] = TreeModel,
    cache_class: type[TreeCache] = TreeCache,
    reads_rest: bool = True,
) -> TreeModel:
    """Load resident layers and all parameters outside the layers, and prepare streaming of the other layers.

    Args:
        weights: model to load; the result owns its modules, and its files are closed as soon as nothing reads them.
        work: device, dtype and rows of passes.
        placement: tiers of the layers, and the number of slots.
        cache_rows: rows that each seat of the KV cache must hold at first.
        resident: indices of the layers that stay in device memory at first, ascending, among them those of the
            placement; None for those alone.
        tree_rows: rows among them that a tree may take; None for all beyond the context.
        grows: whether trees grow over several passes, as a draft's trees do.
        pack: pack to read layers from; None reads the checkpoint's own files.
        warn: receives one-line warnings about refused memory pinning and its cost.
        model_class: class of the result.
        cache_class: class of its cache.
        reads_rest: whether parameters outside the layers are read, too; only with owners of layers in the placement.
    """
    skeleton, device, dtype = weights.skeleton, torch.device(work.device), torch_dtype(work.dtype)
    layers, later = skeleton.layers, placement.streamed
    devices = [torch.device(name) for name in placement.devices or (work.device,)]
    assert devices[0] == device, "embeddings, head and draft are on the first device"
    resident = placement.resident if resident is None else resident
    streamed = [index for index in later if index not in set(resident)]
    assert not later or streamed, "a layer that will be streamed is streamed at first, too"
    with ExitStack() as undo:  # after an error, free the memory of files and threads for a retry with a smaller plan
        preparing = _prepare_formats(skeleton, dtype) if "cpu" in {each.type for each in devices} else None
        if preparing is not None:
            undo.callback(preparing.join)
        reader = undo.enter_context(weights.reader if pack is None else _pack_reader(weights, pack))
        embeddings = lookup_embeddings(skeleton) if work.host_embeddings else None
        assert not work.host_embeddings or embeddings is not None, "embeddings tied to the head stay with the head"
        mapped = _read_beside_layers(reader, device, embeddings, undo, reads_rest=reads_rest)
        verifier = None if pack is None else ChunkVerifier(pack)
        settle_layer = partial(_settle, layers, dtype, placement.expanded)
        pooled = None if placement.experts is None else PooledExperts.of(skeleton, reader)
        files = LayerFiles(layers, reader, pack, settle_layer, warn)
        shared = SharedReader(lambda: files.open(cached=()), len(devices) + 1)
        by_threads: LayerReader | None = None
        if pooled is None and any(each.type != "cpu" for each in devices):
            by_threads = shared.part(len(devices))
            undo.callback(by_threads.close)
        for number, there in enumerate(devices):
            owned = placement.owned(number)
            stays = [index for index in owned if index in set(resident)]
            if pooled is None:
                _read_resident(files, stays, there, partial(_read_layer, reader, verifier), by_threads)
            else:
                _read_beside_experts(layers, stays, pooled, reader, verifier, there)
            if number:
                _move_in(layers, owned, there)
        cache = cache_class(
            _kept_shapes(weights, placement),
            cache_rows,
            dtype,
            device,
            work.seats,
            tree_rows=cache_rows - work.ctx if tree_rows is None else tree_rows,
            grows=grows,
            num_points=work.restore_points,
            devices=[devices[owner] for owner in placement.owner] or None,
        )
        if device.type == "cpu":
            _speed_up(skeleton, placement, dtype, reads_rest=reads_rest)
        streamer, kept = (
            open_streamers(files, placement, resident, devices, shared)
            if pooled is None
            else (_make_pool(pooled, work, placement, reader, verifier, warn), NothingKept())
        )
        undo.pop_all()
    if preparing is not None:
        preparing.join()
    if by_threads is not None:
        by_threads.close()
    reads_checkpoint = pack is None and pooled is None and (bool(streamed) or "cpu" in {each.type for each in devices})
    if not reads_checkpoint:
        reader.close()
    hops = Hops(placement.owner, devices) if len(devices) > 1 else None
    model = model_class(skeleton, cache, streamer, streamed, work.chunk_rows, device, embeddings, mapped, kept, hops)
    model.microbatches = placement.microbatches
    return model


def _read_beside_layers(
    reader: WeightReader, device: torch.device, embeddings: torch.nn.Module | None, undo: ExitStack, *, reads_rest: bool
) -> MappedFile | None:
    """Read what is no layer's parameter, and return the mapped file of embeddings in host memory, which `undo` closes.

    Args:
        reader: files of the model.
        device: destination.
        embeddings: module whose matrix stays in host memory; None for none.
        undo: stack that closes the result after an error.
        reads_rest: whether more than buffers are read.
    """
    if not reads_rest:
        reader.read_buffers(device)
        return None
    mapped = reader.read_rest(device, on_host=embeddings)
    return None if mapped is None else undo.enter_context(mapped)


def _prepare_formats(skeleton: Skeleton, dtype: torch.dtype) -> Thread:
    """Start to make ready what the formats need on a CPU, while layers are read: functions may have to be compiled.

    What fails here is tried again where it is needed first, and fails there for all to see.
    """
    formats = {linear.format for _, linear in quant_linears(skeleton.model)}

    def prepare() -> None:
        with suppress(Exception):
            for each in formats:
                each.prepare(dtype)

    thread = Thread(prepare)
    thread.start()
    return thread


def _speed_up(skeleton: Skeleton, placement: Placement, dtype: torch.dtype, *, reads_rest: bool) -> None:
    """Use the CPU's fast products in what was read, and keep the copy of a packed head that the placement has."""
    if not reads_rest:
        for index in placement.owned(0):
            use_fast_matmuls(skeleton.layers[index])
        return
    use_fast_matmuls(skeleton.model)
    head = skeleton.model.get_output_embeddings()
    if placement.head_copy_bytes and isinstance(head, QuantLinear):
        head.hold(dtype, keeps_segments=True)


def _kept_shapes(weights: ModelWeights, placement: Placement) -> list[KvShape]:
    """Return the shapes of what the layers of this machine cache; those of other machines cache nothing here."""
    shapes = list(weights.kv_shapes)
    for index, owner in enumerate(placement.owner):
        if owner == ELSEWHERE:
            shapes[index] = KvShape(0, 0, 0)
    return shapes


def _move_in(layers: Sequence[Any], owned: Sequence[int], device: torch.device) -> None:
    """Give layers of another device than the first what they need there besides parameters."""
    scratch = Scratch()
    for index in owned:
        for module in layers[index].modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        for _, linear in quant_linears(layers[index]):
            linear.scratch = scratch
        if device.type == "cpu":
            use_fast_matmuls(layers[index])


def load_target(plan: Plan, weights: ModelWeights, pack: Pack | None, warn: Callable[[str], None]) -> TreeModel:
    """Load a target for the first stage of a chat.

    Args:
        plan: sizes and placement.
        weights: weights of the target.
        pack: pack of the target; None reads the checkpoint's own files.
        warn: receives one-line warnings about refused memory pinning and its cost.
    """
    stage, tree_rows = plan.first_stage, plan.work.tree_rows
    model = load_model(
        weights,
        plan.work,
        plan.placement,
        cache_rows=stage.ctx + tree_rows,
        resident=stage.resident,
        tree_rows=tree_rows,
        pack=pack,
        warn=warn,
    )
    warm_up(model.skeleton, (plan.work.seats, plan.work.seats + plan.work.tree_budget), plan.work)
    return model


def load_layers(weights: ModelWeights, indices: Sequence[int], device: torch.device, pack: Pack | None) -> Any:
    """Load some layers of a model into device memory, and close its files; nothing outside these layers is read.

    Args:
        weights: model whose layers are loaded; the result owns its modules.
        indices: indices of the layers.
        device: destination.
        pack: pack to read from; None reads the checkpoint's own files.

    Returns:
        All layers of the model, of which the given ones have weights; their buffers are not read.
    """
    layers = weights.skeleton.layers
    with weights.reader if pack is None else _pack_reader(weights, pack) as reader:
        read_layer = partial(_read_layer, reader, None if pack is None else ChunkVerifier(pack))
        for index in _bind_each(layers, indices, read_layer, device):
            if device.type == "cpu":
                use_fast_matmuls(layers[index])
    return layers


def _read_resident(
    files: LayerFiles,
    indices: Sequence[int],
    device: torch.device,
    read_layer: Callable[[int, LayerLayout, Tensor], None],
    by_threads: LayerReader | None,
) -> None:
    """Read layers into the memory of a device.

    A GPU's are read past the page cache, which would hold another copy of them. A CPU's are settled.

    Args:
        files: layers and their files.
        indices: indices of the layers.
        device: destination.
        read_layer: fills a blob with one layer.
        by_threads: reader for the layers of GPUs.
    """
    if device.type == "cpu":
        for index in _bind_each(files.layers, indices, read_layer, device):
            files.settle(index)
    elif by_threads is not None:
        for _ in _bind_each(files.layers, indices, lambda i, _, blob: read_layers(by_threads, {i: blob}), device):
            pass


def _bind_each(
    layers: Sequence[Any],
    indices: Sequence[int],
    read_layer: Callable[[int, LayerLayout, Tensor], None],
    device: torch.device,
) -> Iterator[int]:
    """Read layers into device memory, each into a blob of its own, and yield the index of each."""
    for index in indices:
        layout = LayerLayout.of(layers[index])
        blob = page_aligned(layout.nbytes)  # a mapping of its own, so that its memory can be given back
        read_layer(index, layout, blob)
        bind(layers[index], layout.views(blob.to(device)))
        del blob  # the caller may replace the layer's parameters
        yield index


def _settle(layers: Sequence[Any], dtype: torch.dtype, expanded: Sequence[int], index: int) -> None:
    settle(layers[index], plain_linears(layers[index]), dtype, expands=index in expanded)


def _read_beside_experts(
    layers: Sequence[Any],
    indices: Sequence[int],
    pooled: PooledExperts,
    reader: WeightReader,
    verifier: ChunkVerifier | None,
    device: torch.device,
) -> None:
    """Read everything but the pooled experts of layers, each into a blob of its own."""
    for index in indices:
        layout = LayerLayout.of(layers[index], without=pooled.names(index))
        blob = page_aligned(layout.nbytes)
        if pooled.names(index):
            read_beside(reader, verifier, index, layout.views(blob))
        else:
            _read_layer(reader, verifier, index, layout, blob)
        bind(layers[index], layout.views(blob.to(device)))


def _make_pool(
    pooled: PooledExperts,
    work: Workload,
    placement: Placement,
    reader: WeightReader,
    verifier: ChunkVerifier | None,
    warn: Callable[[str], None],
) -> ExpertPool:
    """Prepare the pool of expert slots on the device."""
    assert placement.experts is not None
    slots, tree_rows, device = placement.experts, work.seats + work.tree_budget, torch.device(work.device)
    if device.type == "cpu":
        return pooled.make_pool(slots, reader, verifier, placement.in_ram, tree_rows)
    return make_gpu_pool(pooled, slots, reader, verifier, device, pinner(device, warn), warn, tree_rows)


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

    What the watch keeps available must stay so. Libraries take a part of it while an engine is loaded.

    Raises:
        AllocationError: less is free.
    """
    needed = plan.device_bytes if plan.work.device == "cpu" else plan.host_bytes
    spare = None if watch is None else watch.spare_bytes()
    if spare is not None and needed > spare:
        raise AllocationError(
            f"cannot allocate {format_bytes(needed)} of RAM: {format_bytes(spare)} of it may be used",
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
    where, num_bytes = plan.work.device, plan.device_bytes
    if plan.devices:
        where, num_bytes = ", ".join(each.device for each in plan.devices), sum(each.num_bytes for each in plan.devices)
    raise AllocationError(
        f"cannot allocate {format_bytes(num_bytes)} on {where}",
        hint="close other programs, or set a smaller --vram or --ctx",
    )
