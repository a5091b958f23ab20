"""An assistant as a source of draft nodes: layers that attend to the target's own keys and values.

A node reads its token, and its parent's output in place of the target's state. All nodes of a tree stand at the
position of the text's last token and see the committed rows of the target's cache alone. So nodes do not see each
other, nothing is cached, and nothing must be undone. Only the state before the last token is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specchat.engine.attention import MaskFunction, PassMask, RowMask
from specchat.engine.drafting.draft_model import runs
from specchat.engine.drafting.head_check import HeadCheck, choices
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.engine.kv_cache import Kept
from specchat.engine.layout import Part, PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps
from specchat.engine.tree import ROOT
from specchat.models.hf.assistant import AssistantSkeleton, shared_layers
from specchat.records.limits import MOST_CHECKED_ROWS, padded_rows


class AssistantModel(TreeModel):
    """The modules of an assistant, whose layers are resident and cache nothing."""

    skeleton: AssistantSkeleton

    @torch.inference_mode()
    def read(
        self,
        target: TreeModel,
        token_ids: Sequence[int],
        states: Tensor,
        layout: PassLayout,
        cancel: threading.Event | None,
    ) -> Tensor:
        """Compute the normed states [rows, d] of new rows, which attend to the target's committed rows.

        Args:
            target: model whose embeddings, keys and values the assistant reads.
            token_ids: token of each row.
            states: the target's state before each token, or the parent's output in its place, [rows, D].
            layout: parts with one prefix each, the seat's committed rows, and the positions of the rows.
            cancel: event that cancels the pass.

        Raises:
            PassCancelledError: `cancel` was set.
        """
        self._target, self._read = target, layout
        self._rows = self.skeleton.join(target.embed(token_ids), states)
        try:
            return self.forward(token_ids, layout, cancel)
        finally:
            del self._rows, self._target, self._read  # no ledger counts these rows after the pass

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores, float32 [n, V], of normed states [n, d]."""
        return self.skeleton.scores(hidden)

    @torch.inference_mode()
    def outputs(self, hidden: Tensor) -> Tensor:
        """Return what children read, [n, D], of normed states [n, d]."""
        return self.skeleton.outputs_of(hidden)

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        cache, layers = self._target.cache, shared_layers(self._target.skeleton.config)
        seats = slice(self._read.first_seat * cache.capacity, (self._read.last_seat + 1) * cache.capacity)
        held = {kind: cache.layers[layer] for kind, layer in layers.items()}
        shared = {kind: (rows.keys[:, :, seats], rows.values[:, :, seats]) for kind, rows in held.items()}
        hidden: Tensor = self.skeleton.hidden_of(self._rows, positions, self._hf_cache, shared)
        return hidden

    def _mask_of(self, layout: PassLayout, rule: MaskFunction) -> PassMask:
        return _CommittedMask(layout, self._target.cache.capacity, self.skeleton.rule_of(rule))


class _CommittedMask(PassMask):
    """The masks of rows that see committed rows of the target alone."""

    def _mask(self, layout: RowLayout) -> RowMask:
        return _CommittedRows(layout, self._function)

    def _region(self, part: Part) -> slice:
        begin = (part.seat - self._layout.first_seat) * self._capacity
        return slice(begin, begin + padded_rows(part.layout.prefix))


class _CommittedRows(RowMask):
    """The mask of one part: the position of a row alone tells what it sees."""

    def _allowed(self, kv_length: int) -> Tensor:
        queries = self._layout.query_positions()
        keys = torch.arange(kv_length, device=queries.device)
        zero = keys.new_zeros(1, 1, 1, 1)
        return self._function(zero, zero, queries[None, None, :, None], keys[None, None, None, :])


@dataclass
class _Seat:
    """What the assistant knows of the sequence in a seat.

    Attributes:
        text: committed tokens; all but the last one have had states.
        states: states of the last of them, [rows, D]: of one row, and of more until the check is done; None without.
    """

    text: list[int] = field(default_factory=list)
    states: Tensor | None = None


class Assistant:
    """A source that scores nodes with an assistant of the target.

    Args:
        model: modules of the assistant, with as many seats as the target.
        target: the target.
        max_rows: nodes of growing trees that may be expanded, including nodes that later drop out.
        check: check of the guesses on the first rows; None for an assistant whose guesses may be bad.
    """

    name = "assistant"
    wants_states = True
    taps: LayerTaps | None = None
    knows_all_levels = False
    expands_chains = False
    temperatures = SMALL_DRAFT
    proposal_share = 1.0

    def __init__(self, model: AssistantModel, target: TreeModel, *, max_rows: int, check: HeadCheck | None) -> None:
        self.models: Sequence[TreeModel] = (model,)
        self._model = model
        self._target = target
        self._max_rows = max_rows
        self._check = check
        self._held = [_Seat() for _ in range(target.cache.seats)]
        self._roots: list[tuple[int, int]] = []  # seat of each tree, and the position of its root
        # For each tree, the outputs of the root and of the expanded nodes so far, [1 + max_rows, D].
        self._outputs: list[Tensor] = []
        self._num_expanded: list[int] = []

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree; 0 if the target has not read the tokens before the last one."""
        held = self._held[sequence.seat]
        is_read = held.states is not None and len(sequence.pending) == 1 and held.text[:-1] == sequence.tokens[:-1]
        return sequence.max_depth if is_read else 0

    def receive(self, seat: int, states: FinalStates) -> None:
        """Keep the last of the target's states of rows that became final."""
        held, new = self._held[seat], states.hidden
        if self._is_checking and held.states is not None and held.text[:-1] == states.tokens[: states.first]:
            new = torch.cat([held.states, new[-MOST_CHECKED_ROWS - 1 :]])
        most = MOST_CHECKED_ROWS + 1 if self._is_checking else 1
        held.text, held.states = list(states.tokens), new[-most:].clone()

    def catch_up(self, cancel: threading.Event | None) -> None:
        """Do nothing: no states wait."""

    def begin(self, sequences: Sequence[TokenSequence], cancel: threading.Event | None) -> tuple[Tensor, int]:
        """Score the tokens after each sequence's last one; return the scores, and the number of rows.

        Raises:
            HeadDisagreesError: the choices are hardly better than chance.
        """
        for sequence in sequences:
            self._compare(sequence, cancel)
        self._roots = [(each.seat, len(each.tokens) - 1) for each in sequences]
        self._num_expanded = [0] * len(sequences)
        states = torch.stack([self._last_state(each.seat) for each in sequences])
        hidden = self._read([each.tokens[-1] for each in sequences], states, [1] * len(sequences), cancel)
        roots = self._model.outputs(hidden)
        self._outputs = [roots.new_empty(1 + self._max_rows, roots.shape[-1]) for _ in sequences]
        for kept, root in zip(self._outputs, roots, strict=True):
            kept[0] = root
        return self._model.scores(hidden), len(sequences)

    @property
    def num_free_rows(self) -> int:
        """Number of nodes that can still be expanded."""
        return self._max_rows - sum(self._num_expanded)

    def expand(self, paths: Paths, nodes: Tensor, cancel: threading.Event | None) -> Tensor:
        """Compute nodes, sorted by tree, and return the scores after them, [n, V]; their parents are computed."""
        counts, states = [0] * len(self._roots), list[Tensor]()
        places = list[tuple[int, slice, slice]]()
        for tree, of_tree in runs(paths.tree[nodes]):
            own, first = nodes[of_tree], self._num_expanded[tree]
            parents = paths.parent[own]
            above = torch.where(parents == ROOT, ROOT, paths.row[parents.clamp(min=0)])
            states.append(self._outputs[tree][(above + 1).to(self._model.device)])
            paths.row[own] = torch.arange(first, first + len(own))
            counts[tree] = len(own)
            self._num_expanded[tree] += len(own)
            places.append((tree, of_tree, slice(1 + first, 1 + first + len(own))))
        hidden = self._read(paths.token[nodes].tolist(), torch.cat(states), counts, cancel)
        outputs = self._model.outputs(hidden)
        for tree, of_tree, new in places:
            self._outputs[tree][new] = outputs[of_tree]
        return self._model.scores(hidden)

    def end(self) -> None:
        """Free the outputs."""
        self._outputs = []

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Return nothing: the assistant has no cache."""
        return ()

    def reset(self) -> None:
        """Forget all texts."""
        self._held = [_Seat() for _ in self._held]

    def close(self) -> None:
        """Close the assistant."""
        self._model.close()

    @property
    def _is_checking(self) -> bool:
        return self._check is not None and not self._check.is_done

    def _last_state(self, seat: int) -> Tensor:
        states = self._held[seat].states
        assert states is not None, "texts with states only"
        return states[-1]

    def _read(
        self, tokens: Sequence[int], states: Tensor, counts: Sequence[int], cancel: threading.Event | None
    ) -> Tensor:
        """Compute rows at the positions of their roots: as many of each tree as `counts` says."""
        parts = [
            (seat, _layout(root, torch.full((count,), root)))
            for (seat, root), count in zip(self._roots, counts, strict=True)
            if count
        ]
        return self._model.read(self._target, tokens, states, PassLayout(parts), cancel)

    def _compare(self, sequence: TokenSequence, cancel: threading.Event | None) -> None:
        """Compare the first choices after the rows whose states are held, once they are enough."""
        held = self._held[sequence.seat]
        if self._check is None or held.states is None or not self._is_checking:
            return
        if 2 * len(held.states) <= MOST_CHECKED_ROWS:
            return
        states, text = held.states, held.text
        held.states = states[-1:].clone()
        first = len(text) - len(states)  # the token after the first state
        positions = torch.arange(first, len(text) - 1)
        parts = [(sequence.seat, _layout(len(text) - 1, positions))]
        hidden = self._model.read(self._target, text[first:-1], states[:-1], PassLayout(parts), cancel)
        self._check.count(choices(self._model.scores, hidden), choices(self._target.logits, states[1:]))


def _layout(prefix: int, positions: Tensor) -> RowLayout:
    """Return the layout of rows at given positions that see a part of `prefix` committed rows, and nothing else."""
    return RowLayout(prefix, 0, torch.eye(len(positions), dtype=torch.bool), positions)
