"""Passes of a draft model over the nodes of a growing tree, each of which a GPU's host starts with one launch.

A pass of a small model is hundreds of short kernels: 720 with Llama-3.2-1B, 1,670 with Qwen3-0.6B. The host takes about
as long to queue them as the GPU to compute them. A CUDA graph repeats recorded kernels, with the same addresses and
shapes. So passes are computed over tensors of fixed sizes (`engine.fixed_layout`). The nodes of a pass are always as
many, and keys come in a few sizes. The modules are those that compute every other pass.

The first pass of each size is computed as usual, which lets kernels be chosen and memory be taken, the second one is
recorded. All recordings share one pool of memory. When the cache or the scratch memory has moved, they are dropped.
Not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specchat.engine.fixed_layout import FixedLayout, FixedRows
from specchat.engine.layout import RowLayout
from specchat.engine.model import TreeModel
from specchat.models.hf.config import has_dynamic_positions
from specchat.models.quant.modules import quant_linears

# Fewest keys of a pass; more keys come in powers of two. Attention to 512 keys takes a few percent of a pass.
_LEAST_KEYS = 512


@dataclass
class _Recording:
    """A pass of one size.

    Attributes:
        layout: rows of the pass, whose values change.
        is_warm: whether a pass of this size was computed already.
        graph: recorded pass; None before.
    """

    layout: FixedLayout
    is_warm: bool = False
    graph: torch.cuda.CUDAGraph | None = None


class PassGraphs:
    """Passes over tree rows of a model, all of whose layers are resident.

    Args:
        model: draft model.
        records: whether passes are recorded; else they are only computed over tensors of fixed sizes.

    Attributes:
        num_recorded: number of passes that were recorded.
    """

    def __init__(self, model: TreeModel, *, records: bool = True) -> None:
        self.num_recorded = 0
        self._model = model
        self._records = records
        self._scratches = list(
            {id(each.scratch): each.scratch for _, each in quant_linears(model.skeleton.model)}.values()
        )
        self._passes: dict[tuple[int, int, int], _Recording] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None
        # One tensor of scores for the passes of all sizes with as many rows, or each recording would keep its own.
        self._scores: dict[int, Tensor] = {}

    @staticmethod
    def serves(model: TreeModel) -> bool:
        """Return whether a model's passes can be recorded: their kernels must not depend on values.

        Rotary positions that are scaled by the length of the text are computed on the host.
        """
        on_one_gpu = model.device.type == "cuda" and model.hops is None and model.host_embeddings is None
        is_plain = not model.streamed and model.cache.recurrent is None
        return on_one_gpu and is_plain and not has_dynamic_positions(model.skeleton.config)

    def compute(self, seat: int, tokens: Tensor, layout: RowLayout) -> Tensor:
        """Compute tree rows, append them to the cache, and return their scores, which the next call overwrites.

        Args:
            seat: region of the cache.
            tokens: token id of each row, int64 [rows], on the device.
            layout: positions and visibility of the rows, on the device.

        Returns:
            Scores, float32 [rows, V].
        """
        self._drop_what_moved()
        rows, cache = layout.num_rows, self._model.cache
        keys = min(_keys_for(layout.prefix + layout.num_earlier + rows), cache.capacity)
        recording = self._passes.get((seat, rows, keys))
        if recording is None:
            recording = _Recording(FixedLayout(seat, FixedRows.of(rows, keys, self._model.device)))
            self._passes[seat, rows, keys] = recording
        recording.layout.rows.fill(tokens, layout, seat * cache.capacity)
        scores = self._computed(recording)
        cache.advance(seat, rows)
        return scores

    def _computed(self, recording: _Recording) -> Tensor:
        if recording.graph is None and self._records and recording.is_warm:
            self._record(recording)
        rows = recording.layout.num_rows
        if recording.graph is not None:
            recording.graph.replay()
            return self._scores[rows]
        recording.is_warm = True
        scores = self._model.score_fixed(recording.layout)
        if rows not in self._scores:
            self._scores[rows] = torch.empty_like(scores)
        return scores

    @torch.inference_mode()
    def _record(self, recording: _Recording) -> None:
        """Record a pass without computing it; do without recordings from now on if that fails."""
        self.num_recorded += 1
        graph = torch.cuda.CUDAGraph()
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Other threads may take memory meanwhile, which is no part of the pass.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._scores[recording.layout.num_rows].copy_(self._model.score_fixed(recording.layout))
        except RuntimeError as error:
            self._records = False
            reason = str(error).strip().partition("\n")[0]
            self._model.news.append(f"draft passes cannot be recorded as CUDA graphs, so they are slower: {reason}")
        else:
            recording.graph = graph

    def _drop_what_moved(self) -> None:
        """Drop all recordings if buffers have moved that recorded kernels read or write."""
        scratches = (each.memory.data_ptr() for each in self._scratches)
        addresses = (*self._model.cache.addresses, *scratches)
        if addresses != self._addresses:
            self._passes.clear()
            self._addresses = addresses


def _keys_for(num_rows: int) -> int:
    """Return the keys of a pass after which a cache holds `num_rows` rows."""
    return max(_LEAST_KEYS, 1 << (num_rows - 1).bit_length())
