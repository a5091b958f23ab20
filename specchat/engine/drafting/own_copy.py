"""The target's own low-bit copy as a source of draft nodes (SubSpec, arXiv 2509.18344).

The copy computes with the target's modules, but for the streamed layers it has quantized ones in device memory. So a
tree grows without streaming. Copy and target share one KV cache: the copy reads the rows that the target has computed,
and reads nothing twice. Its own rows, those of new tokens and of the nodes, come after the committed rows, and are
dropped before the target's pass. That pass stores its own rows in their places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.sources import Temperatures
from specchat.engine.kv_cache import Kept
from specchat.engine.layout import RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.sequence import TokenSequence
from specchat.engine.streaming.base import NoStreamer
from specchat.models.hf.skeleton import with_modules
from specchat.models.quant.modules import quant_linears
from specchat.records.limits import COPY_PROMPT_ROWS


class CopyModel(TreeModel):
    """The modules and the KV cache of a target, with other layers in place of the streamed ones.

    Args:
        target: model whose modules, cache and embeddings are shared; it outlives this model.
        layers: layers in place of the target's, by index; their parameters are bound to device memory.
    """

    def __init__(self, target: TreeModel, layers: Mapping[int, Any]) -> None:
        self._own = dict(layers)
        embeddings = None if target.host_embeddings is None else _unwrapped(target.host_embeddings)
        skeleton = target.skeleton
        twins = {
            f"{skeleton.layers_name}.{index}": layers[index] if index in layers else _unwrapped(layer)
            for index, layer in enumerate(skeleton.layers)
        }
        skeleton = with_modules(skeleton, twins, embeddings)
        super().__init__(
            skeleton, target.cache, NoStreamer(), (), target.chunk_rows, target.device, embeddings, target.mapped
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the layers that are not the target's, and of their dequantization scratch."""
        tensors = {id(p): p.untyped_storage() for layer in self._own.values() for p in layer.parameters()}
        storages: dict[int, int] = {storage.data_ptr(): storage.nbytes() for storage in tensors.values()}
        return sum(storages.values()) + self.generation_bytes

    @property
    def generation_bytes(self) -> int:
        """Bytes of the dequantization scratch; the cache is the target's."""
        scratches = {linear.scratch for layer in self._own.values() for _, linear in quant_linears(layer)}
        return sum(scratch.memory.nbytes for scratch in scratches)

    def close(self) -> None:
        """Do nothing: all files are the target's."""


class OwnCopy(DraftModel):
    """A source that scores nodes with the target's own low-bit copy.

    Args:
        model: copy of the target.
        max_rows: rows that growing trees may take in the target's cache, including nodes that later drop out.
    """

    name = "self"
    # Tokens per step by temperature, measured on the demo's 4-bit copy (budget 64, 40 chats that no test uses):
    # greedy: 7.2 at 0.5, 8.3 at 0.35, 9.1 at 0.25, 9.2 at 0.15, 9.0 at 0.1;
    # sampling at t=0.7: 7.5 at 0.7, 8.7 at 0.5, 9.4 at 0.35 and at 0.2, 9.3 at 0.1.
    temperatures = Temperatures(greedy=0.2, noise=0.3)
    # Greedy tokens per step of the demo's 4-bit copy alone, and with proposals of whole, half and a fifth of weight:
    # 5.38, 5.59, 5.89 and 5.71 with 16 nodes; 8.43, 8.19, 8.31 and 8.43 with 64.
    proposal_share = 0.5

    def __init__(self, model: CopyModel, *, max_rows: int) -> None:
        super().__init__(model, max_rows=max_rows, max_context=model.max_positions)
        self._most_new = COPY_PROMPT_ROWS[model.device.type]
        # For each seat of the growing trees, the rows that the target has computed.
        self._committed: dict[int, int] = {}

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree; 0 before a long prompt, which the target reads first."""
        return super().max_depth(sequence) if len(sequence.pending) <= self._most_new else 0

    def _new_rows(self, sequences: Sequence[TokenSequence]) -> tuple[list[int], list[tuple[int, RowLayout]], list[int]]:
        """Return the tokens that the target has not computed, their rows, and the place of each last token."""
        tokens, parts, last = list[int](), list[tuple[int, RowLayout]](), list[int]()
        self._committed = {sequence.seat: sequence.num_cached for sequence in sequences}
        for sequence in sequences:
            new = sequence.pending
            parts.append((sequence.seat, linear_layout(sequence.num_cached, len(new), self._model.device)))
            tokens += new
            last.append(len(tokens) - 1)
        return tokens, parts, last

    def end(self) -> None:
        """Drop the rows of the roots and of the trees: the target computes its own."""
        for seat, length in self._committed.items():
            self._model.cache.truncate(seat, length)
        self._committed = {}

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Return nothing: the target has computed the accepted nodes."""
        return ()

    def reset(self) -> None:
        """Remove every trace of NaN that the copy may have left behind the target's rows."""
        for seat, length in enumerate(self._model.cache.lengths):
            self._model.cache.wipe(seat, length)


def _unwrapped(module: torch.nn.Module) -> Any:
    """Return a module that shares everything with the given one, without the forward that a model has wrapped."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    return twin
