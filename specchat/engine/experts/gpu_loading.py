"""Preparing a pool of expert slots on a GPU, and bringing experts into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specchat.engine.experts.gpu import GpuSlots, GpuSource
from specchat.engine.experts.loading import PooledExperts
from specchat.engine.experts.pool import ExpertPool
from specchat.engine.experts.reader import WINDOW_BYTES, ExpertReader, HostSlots, Verify
from specchat.engine.streaming.host_layers import Pinner
from specchat.engine.streaming.slots import page_aligned
from specchat.models.hf.expert_tables import ExpertTables
from specchat.models.hf.experts import use_tables
from specchat.models.hf.routers import Routers
from specchat.models.packs.verify import ChunkVerifier
from specchat.models.weights.reader import WeightReader
from specchat.records.limits import EXPERT_WINDOWS
from specchat.records.plan import ExpertSlots
from specchat.units import format_bytes


def make_gpu_pool(
    pooled: PooledExperts,
    slots: ExpertSlots,
    reader: WeightReader,
    verifier: ChunkVerifier | None,
    device: torch.device,
    pin: Pinner,
    warn: Callable[[str], None],
    most_rows: int,
) -> ExpertPool:
    """Allocate a pool on a GPU, read the experts that stay in host memory, and let the modules compute from the pool.

    Args:
        pooled: experts of the model.
        slots: numbers of slots, and of experts in host memory.
        reader: reader of the small tensors that stay in the GPU's memory.
        verifier: verifier of a pack; None for files without checksums.
        device: CUDA device.
        pin: pins host memory; closed together with the pool.
        warn: receives a one-line warning about memory that could not be pinned, and its cost.
        most_rows: rows of the largest pass whose uses of experts are counted.
    """
    layers, layout = pooled.layers, pooled.layout
    num_slots = len(layers) * slots.quota + slots.shared
    verify = None if verifier is None else verifier.verify_stored
    with ExitStack() as undo:
        undo.callback(pin.close)
        keeps_all = slots.in_host >= layers[0].num_experts
        windows = [] if keeps_all else [_pinned(pin, WINDOW_BYTES) for _ in range(EXPERT_WINDOWS)]
        kept = _keep(pooled, slots, pin, warn, verify)
        in_cache = [each.layer for each in layers if slots.in_host and each.layer not in kept]
        if in_cache and not windows:
            windows = [page_aligned(WINDOW_BYTES) for _ in range(EXPERT_WINDOWS)]
        held = {layer: _to(device, own) for layer, own in pooled.read_held(reader, verifier).items()}
        memory = GpuSlots(num_slots, layout.nbytes, device, windows)
        undo.callback(memory.close)
        expert_reader = ExpertReader(pooled.extents, memory, in_cache, verify) if windows else None
        source = GpuSource(memory, kept, expert_reader, pooled.expert_bytes)
        undo.callback(source.close)
        pool = ExpertPool(
            [each.layer for each in layers],
            layers[0].num_experts,
            slots.quota,
            slots.shared,
            source,
            {each.layer: {} for each in layers},
            {},
            most_rows,
            on_close=pin.close,
        )
        tables = ExpertTables(layers[0], layout.stacks(memory.slab), layout.nbytes, partial(_pinned, pin))
        if slots.uses:
            pool.fill(slots.uses)
        undo.pop_all()
    pool.kept_bytes = memory.slab.nbytes + sum(stack.nbytes for own in held.values() for stack in own.values())
    routers = Routers(pooled.decoder_layers, layers) if slots.looks_ahead else None
    for position, each in enumerate(layers):
        use_tables(each, tables.compute_with(partial(bring, pool, routers, position), held[each.layer]))
    return pool


def bring(
    pool: ExpertPool, routers: Routers | None, position: int, ids: Tensor, place: Callable[[Any], None]
) -> Tensor:
    """Bring routed experts of a layer into slots on a GPU, and begin with likely ones of the next layer.

    Routed and likely experts cross the link together: the host waits once. What the layer needs is queued before what
    the next one may need.

    Args:
        pool: pool of slots on the GPU.
        routers: routers that name likely experts; None for no guesses.
        position: position of the layer among those of the pool.
        ids: routed experts on the GPU, int64 [rows, k].
        place: receives the slot of each expert of the layer.

    Returns:
        The ids in host memory.
    """
    likely: Tensor | None = None
    if routers is not None:
        routers.saw(position, ids)
        if pool.asks_router(position, len(ids)):
            likely = routers.likely(position + 1)
    on_host, likely_on_host = _to_host(ids, likely)
    arriving = pool.bring(position, on_host)
    place(pool.slots_of(position))
    if routers is not None:
        pool.look_ahead(position, len(ids), lambda _: likely_on_host)
    for _ in arriving:  # all experts of a layer are computed together
        pass
    return on_host


def _to_host(ids: Tensor, likely: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Copy ids to the host, and likely ones with them."""
    if likely is None:
        return ids.cpu(), None
    both = torch.cat([ids.reshape(-1), likely.reshape(-1)]).cpu()
    return both[: ids.numel()].view(ids.shape), both[ids.numel() :].view(likely.shape)


def _keep(
    pooled: PooledExperts, slots: ExpertSlots, pin: Pinner, warn: Callable[[str], None], verify: Verify | None
) -> dict[int, dict[int, Tensor]]:
    """Read experts into pinned memory, as slots hold them, by layer and expert.

    Where the system refuses to pin memory, layers are left out: reading them from the page cache needs no more memory.
    """
    if not slots.in_host:
        return {}
    layers, nbytes = pooled.layers, pooled.layout.nbytes
    blobs = {each.layer: page_aligned(slots.in_host * nbytes) for each in layers}
    num_pinned = pin.pin(list(blobs.values()))
    if num_pinned < len(layers):
        total, left = len(layers) * slots.in_host * nbytes, (len(layers) - num_pinned) * slots.in_host * nbytes
        warn(
            f"cannot pin {format_bytes(left)} of {format_bytes(total)} for experts: "
            "these are read through the page cache, which is slower"
        )
    end = max(each.target + each.nbytes for each in pooled.extents[layers[0].layer][0])
    kept: dict[int, dict[int, Tensor]] = {}
    for position, layer in enumerate(list(blobs)[:num_pinned]):
        experts = _in_host(slots, position, layers[0].num_experts)
        host_slots = HostSlots(blobs[layer], nbytes)
        with closing(ExpertReader({layer: pooled.extents[layer]}, host_slots, (), verify)) as reader:
            reader.begin(layer, experts, range(len(experts)), is_few=False).wait()
        views = blobs[layer].view(-1, nbytes)[:, :end]
        kept[layer] = dict(zip(experts, views, strict=True))
    return kept


def _pinned(pin: Pinner, nbytes: int) -> Tensor:
    """Return host memory that is pinned if the system allows it."""
    memory = page_aligned(nbytes)
    pin.pin([memory])
    return memory


def _in_host(slots: ExpertSlots, position: int, num_experts: int) -> Sequence[int]:
    """Return the experts of a layer that stay in host memory: the most used ones beside those that fill the pool."""
    uses = np.asarray(slots.uses[position]) if slots.uses else np.zeros(num_experts)
    ranked = np.roll(np.argsort(-uses, kind="stable"), -slots.quota)
    return [int(expert) for expert in np.sort(ranked[: slots.in_host])]


def _to(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
