"""A causal LM whose rows may form trees: a pass returns hidden states. Target and draft both use this class.

A pass may compute rows of several sequences. transformers' modules run unmodified. specchat supplies the attention
function, the KV cache, and a wrapper around each decoder layer. The wrapper acquires the layer's weights, checks for
cancellation, and runs long passes in row chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.engine.attention import MaskFunction, PassMask
from specchat.engine.device import copied_together
from specchat.engine.fixed_layout import FixedLayout
from specchat.engine.hops import Hops
from specchat.engine.kv_cache import TreeCache
from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.linear import held_bytes, unsettle
from specchat.engine.pipeline import WHOLE, Call, Pipeline, Turn
from specchat.engine.streaming.base import DeviceCounters, LayerStreamer
from specchat.engine.streaming.kept import KeptLayers, NothingKept
from specchat.engine.taps import LayerTaps
from specchat.models.checkpoint.mapped_file import MappedFile
from specchat.models.hf.attention import cache_for, row_scope
from specchat.models.hf.config import max_positions
from specchat.models.hf.embeddings import without_norm
from specchat.models.hf.hybrids import layer_kinds, layer_output
from specchat.models.hf.mixers import bind_mixers
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.kernels.refusals import take_refusals
from specchat.models.quant.modules import quant_linears
from specchat.records.microbatches import WHOLE_PASSES, Stretch, cuts_of, stretches_of


class PassCancelledError(Exception):
    """A pass was cancelled between two layers; internal to the engine, never shown to users."""


class TreeModel:
    """One model with its KV cache and the streamer of its layers.

    Args:
        skeleton: modules whose parameters are bound to memory, or to the streamer's slots.
        cache: KV cache, kept between passes.
        streamer: provides the layers that are not resident.
        streamed: indices of the layers that are streamed at first.
        chunk_rows: rows that one layer computes at a time.
        device: device that passes run on.
        host_embeddings: module of the input embeddings if it stays in host memory, else None.
        mapped: file that these embeddings are mapped from, closed together with this object; None if they are not.
        kept: layers in host memory that can be given back, closed together with this object; None if there are none.
        hops: owners of the layers if there are several devices, the first of them `device`; None for `device` alone.

    Attributes:
        chunk_rows: rows that one layer computes at a time.
        host_embeddings: module of the input embeddings if it stays in host memory, else None.
        mapped: file that these embeddings are mapped from, or None.
        hops: owners of the layers if there are several devices, else None.
        microbatches: numbers of microbatches of passes; only with several devices, and none for passes with taps.
        layers_done: number of layers that the current or last pass has computed; readable from other threads.
        news: one-line warnings about slower ways to compute, until `take_news`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        cache: TreeCache,
        streamer: LayerStreamer,
        streamed: Sequence[int],
        chunk_rows: int,
        device: torch.device,
        host_embeddings: Any = None,
        mapped: MappedFile | None = None,
        kept: KeptLayers | None = None,
        hops: Hops | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.cache = cache
        self.streamer = streamer
        self.device = device
        self.vocab_size: int = skeleton.config.vocab_size
        self._hf_cache = cache_for(cache.layers, lambda: self._layout, layer_kinds(skeleton.config))
        bind_mixers(skeleton.layers, cache.states)
        self.chunk_rows = chunk_rows
        self._layout: PassLayout | None = None
        self._token_ids: Tensor | None = None
        self._cancel: threading.Event | None = None
        self._taps: LayerTaps | None = None
        self.layers_done = 0
        self.news: list[str] = []
        self.host_embeddings = host_embeddings
        self.mapped = mapped
        if host_embeddings is not None:
            host_embeddings.forward = partial(self._look_up, host_embeddings.forward)
        self.kept = kept or NothingKept()
        self.hops = hops
        self.microbatches = WHOLE_PASSES
        self._pipeline: Pipeline | None = None
        self._streamed = set(streamed)
        for index, layer in enumerate(skeleton.layers):
            layer.forward = partial(self._run_layer, index, layer.forward)

    @property
    def streamed(self) -> Set[int]:
        """Indices of the layers that are streamed now."""
        return self._streamed

    @property
    def max_positions(self) -> int:
        """Longest context that the model's position encoding supports."""
        return max_positions(self.skeleton.config)

    def take_news(self) -> list[str]:
        """Return warnings for the user, each once: what this model, or a device, cannot compute as planned."""
        news, self.news = [*self.news, *take_refusals()], []
        return news

    @property
    def nbytes(self) -> int:
        """Bytes of weights, slots, buffers, cache and dequantization scratch, each storage counted once.

        Embeddings that stay in host memory are excluded.
        """
        apart = set() if self.host_embeddings is None else set(_tensors(self.host_embeddings))
        tensors = set(_tensors(self.skeleton.model)) - apart
        storages: dict[int, int] = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta
        }
        held = held_bytes(self.skeleton.model) + self.streamer.kept_bytes
        return sum(storages.values()) + held + self.generation_bytes

    @property
    def generation_bytes(self) -> int:
        """Bytes that generation needs besides weights: the KV cache and the dequantization scratch."""
        scratches = {linear.scratch for _, linear in quant_linears(self.skeleton.model)}
        return self.cache.nbytes + sum(scratch.memory.nbytes for scratch in scratches)

    def device_counters(self) -> tuple[DeviceCounters, ...]:
        """Return the totals of each device; empty for one device."""
        by_device = self.streamer.counters().by_device
        if self.hops is None or not by_device:
            return ()
        return tuple(map(DeviceCounters, by_device, self.hops.busy_s()))

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        layout: PassLayout,
        cancel: threading.Event | None = None,
        taps: LayerTaps | None = None,
    ) -> Tensor:
        """Compute the final hidden states of new rows, and append the rows to the cache.

        Args:
            token_ids: token id of each new row, one sequence after another; on the device only for models whose
                embeddings are there, too.
            layout: position and visibility of the rows, sequence by sequence; in host memory or on the device.
            cancel: event that cancels the pass before the next layer.
            taps: receives the states between layers; None if nobody reads them.

        Returns:
            Hidden states [rows, hidden] in the model's dtype, on its device.

        Raises:
            PassCancelledError: `cancel` was set; the cache is unchanged in all seats, as after any other error.
        """
        assert len(token_ids) == layout.num_rows
        lengths = self.cache.lengths
        self._token_ids = torch.as_tensor(token_ids, dtype=torch.int64)
        ids, layout = self._on_device(self._token_ids, layout)
        self._layout, self._cancel, self.layers_done = layout, cancel, 0
        self._taps = taps
        self._pipeline = self._pipeline_for(layout)
        if taps is not None:
            taps.begin()
        self.cache.begin(layout)
        self.streamer.begin(layout.num_rows)
        try:
            with row_scope(partial(self._mask_of, layout)):
                hidden = self._decode(ids, layout.positions)
            self.cache.end()
            return hidden
        except BaseException:
            for seat, length in enumerate(lengths):
                self.cache.truncate(seat, length)
            self.streamer.restart()
            if taps is not None:
                taps.begin()
            raise
        finally:
            self._layout = self._cancel = self._token_ids = self._taps = self._pipeline = None
            if self.hops is not None:
                self.hops.begin()

    def _on_device(self, ids: Tensor, layout: PassLayout) -> tuple[Tensor, PassLayout]:
        """Return token ids and layout on the device; what is in host memory crosses the link in one copy."""
        if self.device.type == "cpu":
            return ids, layout
        parts = [part.layout for part in layout.parts]
        needed = [ids, *(each.positions for each in parts), *(each.ancestors for each in parts)]
        there = iter(copied_together(needed, self.device))
        ids = next(there)
        positions = [next(there) for _ in parts]
        moved = [replace(part, positions=at, ancestors=next(there)) for part, at in zip(parts, positions, strict=True)]
        return ids, PassLayout((part.seat, each) for part, each in zip(layout.parts, moved, strict=True))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores, float32 [n, V], of hidden states [n, hidden]."""
        return self.skeleton.head(hidden).float()

    @torch.inference_mode()
    def score_fixed(self, layout: FixedLayout) -> Tensor:
        """Return scores, float32 [rows, V], of fixed rows, whose keys and values go to the cache.

        The host decides nothing between the layers, so a graph can record the pass. The cache does not count the rows,
        and nothing cancels the pass. All layers are resident and have no states; the embeddings are on the device.
        """
        self._layout = layout
        try:
            with row_scope(partial(self._mask_of, layout)):
                return self.logits(self._decode(layout.rows.ids, layout.positions))
        finally:
            self._layout = None

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], *, plain: bool = False) -> Tensor:
        """Return the input embeddings [n, hidden] of token ids.

        Args:
            token_ids: token ids.
            plain: whether to leave out a norm of the embeddings, which the first layer is given.
        """
        ids = self._token_ids = torch.tensor(token_ids, dtype=torch.int64)
        embeddings = self.skeleton.model.get_input_embeddings()
        try:
            with without_norm(embeddings) if plain else nullcontext():
                found: Tensor = embeddings(ids.to(self.device)[None])[0]
        finally:
            self._token_ids = None
        return found

    def append(self, token_ids: Sequence[int], cancel: threading.Event | None = None, seat: int = 0) -> Tensor:
        """Run `forward` on committed tokens in sequence, after the rows of one seat in the cache."""
        layout = linear_layout(self.cache.lengths[seat], len(token_ids), self.device)
        return self.forward(token_ids, PassLayout.single(layout, seat), cancel)

    def restream(self, leaving: Collection[int], given: Collection[int] = ()) -> None:
        """Stream resident layers from now on, and release host memory of layers; only between passes.

        Args:
            leaving: resident layers that leave device memory; the next passes stream them, too.
            given: layers that are read from the disk whenever they are streamed, instead of kept in host memory.
        """
        if self.device.type == "cpu":
            for index in leaving:
                unsettle(self.skeleton.layers[index])
        self.streamer = self.kept.restream(leaving, given)
        self._streamed.update(leaving)

    def bring_back(self, returning: Sequence[int]) -> None:
        """Keep streamed layers resident again, which were resident before; only between passes."""
        self.streamer = self.kept.bring_back(returning)
        self._streamed.difference_update(returning)

    def give_back(self, given: Collection[int]) -> None:
        """Release the host memory of layers, which are read from the disk from now on; only between passes."""
        on_host = self.device.type == "cpu"  # resident layers of a GPU stay there, and only lose their host copy
        self.restream([index for index in given if on_host and index not in self._streamed], given)

    def check(self) -> None:
        """Check between passes that further passes are possible; they always are on one machine."""

    def close(self) -> None:
        """Stop streaming, and close the files."""
        self.streamer.close()
        self.kept.close()
        if self.mapped is not None:
            self.mapped.close()

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Run all layers over the rows of the pass, and return the states after the last norm."""
        return self.skeleton.hidden(token_ids, positions, self._hf_cache)

    def _mask_of(self, layout: PassLayout, rule: MaskFunction) -> PassMask:
        """Return the mask of the layers with this rule of transformers."""
        return PassMask(layout, self.cache.capacity, rule)

    def _look_up(self, look_up: Callable[[Tensor], Tensor], _: Tensor) -> Tensor:
        """Return the embeddings of the pass's tokens, [1, S, hidden], looked up in host memory.

        The token ids are in host memory anyway. The rows cross the link in synchronous copies, one chunk at a time,
        because the host has nothing else to queue: 64 tree rows of 8,192 values are 1 MB. So the rows need no pinned
        memory, and no source is overwritten during its copy. The copies may wait for a slot fill in progress.

        Raises:
            CorruptCheckpointError: the file of the embeddings was cut short.
        """
        assert self._token_ids is not None
        if self.mapped is not None:
            self.mapped.check()
        chunks = self._token_ids.split(self.chunk_rows)
        if len(chunks) == 1:
            return look_up(chunks[0]).to(self.device)[None]
        first = look_up(chunks[0])
        out = torch.empty(len(self._token_ids), first.shape[1], dtype=first.dtype, device=self.device)
        out[: len(first)] = first
        for rows, ids in zip(out.split(self.chunk_rows)[1:], chunks[1:], strict=True):
            rows.copy_(look_up(ids))
        return out[None]

    def _pipeline_for(self, layout: PassLayout) -> Pipeline | None:
        """Return the microbatches of a pass that begins; None for a pass in one piece."""
        count = 1 if self._taps is not None else self.microbatches.count(layout.num_rows)
        owner = (0,) * len(self.skeleton.layers) if self.hops is None else self.hops.owner
        return self._cut(layout, owner, count) if count > 1 else None

    def _cut(self, layout: PassLayout, owner: tuple[int, ...], count: int) -> Pipeline:
        """Return the microbatches of a pass."""
        cuts = cuts_of(layout.num_rows, count)
        if layout.num_rows <= self.chunk_rows:  # their masks take as much memory as those of a pass in one piece
            layout.kept = frozenset(cuts)
        return Pipeline(stretches_of(owner, frozenset(self._streamed)), cuts, self)

    def _run_layer(self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = Call(index, forward, args, kwargs)
        self._begin_layer(index)
        if self._pipeline is not None:
            return layer_output(self.skeleton.config, self._pipeline.take(call, hidden))
        if self._taps is not None:
            self._tap(index, hidden)
        out = self._compute(call, hidden)
        is_last = index + 1 == len(self.skeleton.layers)
        if is_last and self.hops is not None:
            out = self.hops.home(out)
        if is_last and self._taps is not None:
            self._tap(index + 1, out[0] if isinstance(out, tuple) else out)
        return out

    def _begin_layer(self, index: int) -> None:
        """Note how far the pass is, and stop it if it was cancelled."""
        self.layers_done = index
        if self._cancel is not None and self._cancel.is_set():
            raise PassCancelledError

    def run_stretch(self, stretch: Stretch, calls: Sequence[Call], hidden: Tensor, turn: Turn) -> Tensor:
        """Run a microbatch through a stretch of layers, and send it on to the device of the next one."""
        hidden = self._compute_all(calls, hidden, turn)
        return hidden if self.hops is None else self.hops.move_on(stretch.last, hidden)

    def _compute_all(self, calls: Sequence[Call], hidden: Tensor, turn: Turn) -> Tensor:
        for call in calls:
            self._begin_layer(call.index)
            out = self._compute(call, hidden, turn)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _compute(self, call: Call, hidden: Tensor, turn: Turn = WHOLE) -> Any:
        """Compute a layer on its device; return what the layer returns.

        Args:
            call: layer, and what the decoder has given it besides rows.
            hidden: rows [1, n, hidden] of the pass or of a microbatch.
            turn: microbatch of the rows.
        """
        index, hops, args, kwargs = call.index, self.hops, call.args, call.kwargs
        if hops is not None:
            hidden, args, kwargs = hops.arrive(index, hidden, args, kwargs)
        is_streamed = index in self._streamed
        if is_streamed and turn.is_first:
            self.streamer.acquire(index)
        with nullcontext() if hops is None else hops.computing(index):
            out = self._run_chunks(call.forward, hidden, args, kwargs, turn.begin)
            if is_streamed and turn.is_last:
                self.streamer.release(index)
        return out

    def _tap(self, index: int, hidden: Tensor) -> None:
        """Let a head read the states that enter a layer, on the device of the head."""
        assert self._taps is not None
        if index in self._taps.layers:
            self._taps.enter(index, hidden if self.hops is None else self.hops.home(hidden))

    def _run_chunks(
        self, forward: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], first: int = 0
    ) -> Any:
        """Run one layer over rows [..., S, hidden], chunk by chunk; each chunk attends to the chunks before it.

        The result has the form that the layer returns: hidden states, or a tuple that begins with them.

        Args:
            forward: function of the layer.
            hidden: rows of the pass, or of a microbatch.
            args: further inputs of the layer, for all rows of the pass.
            kwargs: further inputs of the layer, for all rows of the pass.
            first: number of the pass's rows before these.
        """
        assert self._layout is not None
        num_rows, all_rows = hidden.shape[-2], self._layout.num_rows
        if num_rows == all_rows <= self.chunk_rows:
            self._layout.select(0, num_rows)
            return forward(hidden, *args, **kwargs)
        out = torch.empty_like(hidden)
        for begin in range(0, num_rows, self.chunk_rows):
            end = min(begin + self.chunk_rows, num_rows)
            self._layout.select(first + begin, first + end)
            rows = partial(_rows, num_rows=all_rows, begin=first + begin, end=first + end)
            cut_kwargs = {name: rows(value) for name, value in kwargs.items()}
            given = forward(hidden[..., begin:end, :], *map(rows, args), **cut_kwargs)
            out[..., begin:end, :] = given[0] if isinstance(given, tuple) else given
        return (out, *given[1:]) if isinstance(given, tuple) else out


def _tensors(module: Any) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _rows(value: Any, num_rows: int, begin: int, end: int) -> Any:
    """Return the chunk's rows of a layer input; other values unchanged.

    Rows are dimension 1 of rotary tables, positions and per-layer inputs, and dimension 2 of values per head.
    """
    if isinstance(value, tuple):
        return tuple(_rows(v, num_rows, begin, end) for v in value)
    if isinstance(value, Tensor):
        for dim in range(1, min(value.ndim, 3)):
            if value.shape[dim] == num_rows:
                return value.narrow(dim, begin, end - begin)
    return value
