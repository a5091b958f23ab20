"""An EAGLE-3 head as a source of draft nodes: a layer that reads the states between three of the target's layers.

Row t reads the joined states behind token t, and token t + 1; nodes read their parent's output in place of states. So
cache and trees are those of an MTP head. Three things differ: what stands in place of the state, scores of the head's
own, for the part of the vocabulary that it knows, and often embeddings of its own (EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from specchat.engine.drafting.head_check import HeadCheck, choices
from specchat.engine.drafting.mtp import MtpHead, MtpModel
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates
from specchat.engine.taps import LayerTaps
from specchat.models.hf.eagle3 import Eagle3Skeleton
from specchat.records.limits import MOST_CHECKED_ROWS


class Eagle3Model(MtpModel):
    """The modules of an EAGLE-3 head, with a KV cache; its layer is resident."""

    skeleton: Eagle3Skeleton

    def embedded(self, target: TreeModel, token_ids: Sequence[int]) -> Tensor:
        """Return the embeddings [n, hidden] of token ids: the head's own, or the target's."""
        return self.embed(token_ids) if self.skeleton.has_embeddings else target.embed(token_ids)

    def scores(self, target: TreeModel, outputs: Tensor) -> Tensor:
        """Return the scores, float32 [n, V], of outputs [n, hidden]; tokens that the head does not know come last."""
        return self.skeleton.scores(outputs)


class Eagle3Head(MtpHead):
    """A source that scores nodes with an EAGLE-3 head.

    Args:
        model: modules and cache of the head, with as many seats as the target.
        target: the target.
        max_rows: rows that growing trees may take in the cache, including nodes that later drop out.
        check: check of the head's guesses on the first rows; None for a head whose guesses may be bad.
    """

    name = "eagle3"

    def __init__(self, model: Eagle3Model, target: TreeModel, *, max_rows: int, check: HeadCheck | None) -> None:
        super().__init__(model, target, max_rows=max_rows, check=check)
        skeleton = model.skeleton
        layers = skeleton.tapped_layers(len(target.skeleton.layers))
        self.taps = LayerTaps(layers, skeleton.config.hidden_size, skeleton.project, model.chunk_rows)
        # For each seat, the target's choice behind each of the last tokens, until the check is done.
        self._choices: list[dict[int, int]] = [{} for _ in range(model.cache.seats)]

    def receive(self, seat: int, states: FinalStates) -> None:
        """Take the joined states of rows that became final."""
        assert states.tapped is not None, "a pass with the head's taps"
        if self._check is not None and not self._check.is_done:
            known = {at: token for at, token in self._choices[seat].items() if at < states.first}
            rows = states.hidden[-MOST_CHECKED_ROWS:]
            first = states.first + len(states.hidden) - len(rows)
            self._choices[seat] = known | dict(enumerate(choices(self._target.logits, rows), first))
        super().receive(seat, replace(states, hidden=states.tapped, tapped=None))

    def reset(self) -> None:
        """Empty the cache, and drop all states."""
        super().reset()
        self._choices = [{} for _ in self._choices]

    def _compare(self, seat: int, first: int, outputs: Tensor, states: Tensor) -> None:
        """Compare new rows: the output of a row and the target's state of the next one guess the same token."""
        if self._check is None or self._check.is_done:
            return
        known = self._choices[seat]
        rows = [row for row in range(len(outputs)) if first + row + 1 in known]
        if rows:
            ours = choices(lambda block: self._model.scores(self._target, block), outputs[rows])
            self._check.count(ours, [known[first + row + 1] for row in rows])
