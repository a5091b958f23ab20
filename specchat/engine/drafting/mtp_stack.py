"""Several MTP layers as one source: layer k guesses the token k + 2 places behind the state that the first one reads.

A row of a token has a place in the cache of every layer. The row of layer k reads the token's embedding, and what layer
k - 1 computed for the token before; layer 0 reads the target's state of that token. So a pass runs the layers one by
one over the same rows, and hands outputs on by one token.

Two things have no meaning, and are never seen by what has: the first k rows of a text in layer k, and nodes in layers
that guess closer tokens than the node's children. Beyond as many levels as there are layers, the last layer guesses all
further tokens from its own outputs, as a single layer does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specchat.engine.attention import MaskFunction, PassMask, RowMask
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.mtp import MtpHead, MtpModel
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.models.hf.mtp import MtpStack

# Rows whose outputs are kept for each text: the last one may be computed anew.
_KEPT_ROWS = 2

# Returns what a layer reads in place of the target's states [rows, hidden], from the outputs of the layer before it.
_Inputs = Callable[[int, Tensor | None], Tensor]


class MtpStackModel(MtpModel):
    """The modules of several MTP layers, with a KV cache; all layers are resident."""

    skeleton: MtpStack

    @torch.inference_mode()
    def run(
        self,
        target: TreeModel,
        token_ids: Sequence[int],
        inputs: _Inputs,
        receive: Callable[[int, Tensor], None],
        layout: PassLayout,
        cancel: threading.Event | None,
    ) -> Tensor:
        """Run all layers over new rows, and append the rows to the cache; return the outputs of the first layer.

        Args:
            target: model whose embeddings the head shares.
            token_ids: token of each row.
            inputs: returns what a layer reads.
            receive: takes the number and the outputs [rows, hidden] of each layer.
            layout: positions and visibility of the rows.
            cancel: event that cancels the pass.

        Raises:
            PassCancelledError: `cancel` was set; the cache is unchanged.
        """

        def embed(begin: int, end: int) -> Tensor:
            return self.embedded(target, token_ids[begin:end])

        self._embed = embed
        self._inputs, self._receive = inputs, receive
        try:
            return self.forward(token_ids, layout, cancel)
        finally:
            del self._embed, self._inputs, self._receive

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        before: Tensor | None = None
        guessing: Tensor | None = None
        for index in range(len(self.skeleton.layers)):
            self._first_row = index
            states = self._inputs(index, before)
            joined = [
                self.skeleton.join_at(index, self._embed(begin, begin + len(rows)), rows)
                for begin, rows in zip(
                    range(0, len(states), self.chunk_rows), states.split(self.chunk_rows), strict=True
                )
            ]
            del states
            rows = joined[0] if len(joined) == 1 else torch.cat(joined)
            del joined
            before = self.skeleton.hidden_at(index, rows, positions, self._hf_cache)
            self._receive(index, before)
            guessing = before if guessing is None else guessing
        assert guessing is not None
        return guessing

    def _mask_of(self, layout: PassLayout, rule: MaskFunction) -> PassMask:
        return _LaterRows(layout, self.cache.capacity, rule, self._first_row)


class _LaterRows(PassMask):
    """Masks of a layer that hide the first rows of each text from all rows but themselves."""

    def __init__(self, layout: PassLayout, capacity: int, rule: MaskFunction, first: int) -> None:
        super().__init__(layout, capacity, rule)
        self._first = first

    def _mask(self, layout: RowLayout) -> RowMask:
        return _LaterRowsOfText(layout, self._function, self._first)


class _LaterRowsOfText(RowMask):
    """The mask of `_LaterRows` for one text."""

    def __init__(self, layout: RowLayout, rule: MaskFunction, first: int) -> None:
        super().__init__(layout, rule)
        self._first = first

    def _allowed(self, kv_length: int) -> Tensor:
        allowed, layout = super()._allowed(kv_length), self._layout
        hidden = min(self._first, layout.prefix + layout.num_linear)
        if hidden:
            allowed[..., :hidden] = False
            begin, end = layout.chunk
            for row in range(begin, min(end, layout.num_linear, hidden)):
                allowed[..., row - begin, layout.prefix + row] = True  # attention to nothing would be NaN
        return allowed


class MtpStackHead(MtpHead):
    """A source that scores nodes with several MTP layers, and the target's embeddings and head.

    Args:
        model: modules and cache of the head, with as many seats as the target.
        target: the target.
        max_rows: rows that growing trees may take in the cache, including nodes that later drop out.
        check: check of the head's guesses on the first rows; None for a head whose guesses may be bad.
    """

    def __init__(self, model: MtpStackModel, target: TreeModel, *, max_rows: int, check: HeadCheck | None) -> None:
        super().__init__(model, target, max_rows=max_rows, check=check)
        self._stack = model
        self._num_layers = len(model.skeleton.layers)
        # For each seat, the outputs [layers, hidden] of the last rows of its text, by row.
        self._kept: list[dict[int, Tensor]] = [{} for _ in range(model.cache.seats)]
        self._last: list[Tensor] = []

    def reset(self) -> None:
        """Empty the cache, and drop all states."""
        super().reset()
        self._kept = [{} for _ in self._kept]

    def _read_rows(
        self, tokens: Sequence[int], states: Tensor, layout: PassLayout, cancel: threading.Event | None
    ) -> Tensor:
        parts = [(part.seat, part.first, part.layout.prefix, part.layout.num_rows) for part in layout.parts]
        tails: list[list[Tensor]] = [[] for _ in parts]

        def inputs(index: int, before: Tensor | None) -> Tensor:
            if before is None:
                return states
            handed = torch.empty_like(before)
            handed[1:] = before[:-1]
            for seat, first, prefix, _ in parts:
                known = self._kept[seat].get(prefix - 1)
                # Without a row before, the state itself: a few rows of a text that went back hardly change a guess.
                handed[first] = states[first] if known is None else known[index - 1]
            return handed

        def receive(index: int, outputs: Tensor) -> None:
            for (_, first, _, num_rows), tail in zip(parts, tails, strict=True):
                tail.append(outputs[first + max(num_rows - _KEPT_ROWS, 0) : first + num_rows].clone())

        outputs = self._stack.run(self._target, tokens, inputs, receive, layout, cancel)
        self._last = []
        for (seat, _, prefix, num_rows), tail in zip(parts, tails, strict=True):
            kept = {row: each for row, each in self._kept[seat].items() if row < prefix}
            rows = torch.stack(tail, 1)
            end = prefix + num_rows
            kept |= dict(zip(range(end - len(rows), end), rows, strict=True))
            self._kept[seat] = {row: kept[row] for row in sorted(kept)[-_KEPT_ROWS:]}
            self._last.append(rows[-1])
        return outputs

    def _last_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return self._last

    def _read_nodes(
        self,
        tokens: Sequence[int],
        parents: Tensor,
        depths: Tensor,
        layout: PassLayout,
        cancel: threading.Event | None,
    ) -> tuple[Tensor, Tensor]:
        levels, found = depths.to(parents.device), list[Tensor]()

        def inputs(index: int, _: Tensor | None) -> Tensor:
            own = parents[:, index]
            return own if index == 0 else torch.where((levels <= index)[:, None], parents[:, index - 1], own)

        self._stack.run(self._target, tokens, inputs, lambda _, outputs: found.append(outputs), layout, cancel)
        outputs = torch.stack(found, 1)
        layers = levels.clamp(max=self._num_layers - 1)
        return outputs, outputs[torch.arange(len(outputs), device=layers.device), layers]
