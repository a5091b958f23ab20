"""An MTP head as a source of draft nodes: one layer that reads the target's states and guesses further tokens.

Row t of the head's cache reads the target's state behind token t and token t + 1. States are known for committed rows
only, so the cache covers the tokens that the target's cache covers. Nodes read their parent's output in place of a
state. Such rows are guesses: they are dropped when the target has verified the tree, and accepted tokens are computed
anew with the target's own states.

A head may come to a text late, as after steps with another drafter. The states before are gone then, and the head
reads the text from the first state that it is given. Positions count from there: heads encode them relatively.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specchat.engine.drafting.draft_model import runs
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.paths import Paths, TreeRows
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.engine.kv_cache import Kept
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps
from specchat.engine.tree import ROOT, common_prefix
from specchat.models.hf.mtp import MtpSkeleton
from specchat.records.limits import UNREAD_STATES


class MtpModel(TreeModel):
    """The modules of an MTP head, with a KV cache; its layer is resident."""

    skeleton: MtpSkeleton

    @torch.inference_mode()
    def read(
        self,
        target: TreeModel,
        token_ids: Sequence[int],
        states: Tensor,
        layout: PassLayout,
        cancel: threading.Event | None,
    ) -> Tensor:
        """Compute the outputs of new rows [rows, hidden], and append the rows to the cache.

        Args:
            target: model whose embeddings the head may share.
            token_ids: token after each row.
            states: the target's state of each row, or the parent's output in place of a state, [rows, hidden].
            layout: positions and visibility of the rows.
            cancel: event that cancels the pass.

        Raises:
            PassCancelledError: `cancel` was set; the cache is unchanged.
        """
        size = self.chunk_rows
        chunks = [
            self.skeleton.join(self.embedded(target, token_ids[begin : begin + size]), states[begin : begin + size])
            for begin in range(0, len(token_ids), size)
        ]
        self._rows = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        del chunks
        try:
            return self.forward(token_ids, layout, cancel)
        finally:
            del self._rows  # no ledger counts these rows after the pass

    def embedded(self, target: TreeModel, token_ids: Sequence[int]) -> Tensor:
        """Return the embeddings [n, hidden] of token ids, which are the target's."""
        return target.embed(token_ids)

    def scores(self, target: TreeModel, outputs: Tensor) -> Tensor:
        """Return the scores, float32 [n, V], of outputs [n, hidden], by the target's head."""
        return target.logits(outputs)

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.skeleton.hidden_of(self._rows, positions, self._hf_cache)


@dataclass
class _Seat:
    """What the head knows of the sequence in a seat.

    Attributes:
        start: number of leading tokens that the head never had states of; all else counts from there.
        text: committed tokens; all but the last one have had states.
        first: number of tokens before the first state that is held.
        states: states of the tokens from `first` on, but the last one, [rows, hidden]; None without states.
        read: tokens of the rows in the cache, and the token after them; row t was computed with token t + 1.
    """

    start: int = 0
    text: list[int] = field(default_factory=list)
    first: int = 0
    states: Tensor | None = None
    read: list[int] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        """Number of rows in the cache, without those of a tree."""
        return max(len(self.read) - 1, 0)

    def num_usable(self, text: Sequence[int]) -> int:
        """Return how many rows of the cache serve a text.

        The row before the first different token was computed with another next token. If its state is gone, the row
        serves as it is: one row of many hardly changes a guess.
        """
        shared = common_prefix(self.read, list(text))
        is_gone = self.states is not None and self.first == shared <= self.num_read
        return shared if is_gone else min(self.num_read, max(shared - 1, 0))

    @property
    def num_states(self) -> int:
        """Number of states that are held."""
        return 0 if self.states is None else len(self.states)

    def known(self, tokens: Sequence[int]) -> list[int]:
        """Return the part of a text that the head reads."""
        return list(tokens[self.start :])

    def follows(self, text: Sequence[int]) -> bool:
        """Return whether rows and states together reach up to the last token of a known text."""
        last = len(text) - 1
        if self.states is None or len(self.text) - 1 != last or self.text[:last] != list(text[:last]):
            return False
        return self.first <= self.num_usable(text)

    def receive(self, states: FinalStates) -> None:
        """Take states: after those that are held, in place of some, or as the first ones of a text."""
        if states.first < self.start:
            self._begin_at(states.first)
        first, end = states.first - self.start, self.first + self.num_states
        if self.states is not None and self.first <= first <= end:
            self.states = torch.cat([self.states[: first - self.first], states.hidden])
        else:
            # The states of a long text stay where the pass left them: a copy would take memory that no ledger counts.
            # Few states are copied, because they would keep those of the whole pass.
            few = len(states.hidden) <= UNREAD_STATES
            self.first, self.states = first, states.hidden.clone() if few else states.hidden
        self.text = self.known(states.tokens)
        if not self.follows(self.text):  # states before these are missing
            self._begin_at(states.first)
            self.text = self.known(states.tokens)

    def _begin_at(self, start: int) -> None:
        """Read the text from a state on."""
        self.start, self.first, self.text, self.read = start, 0, [], []


class MtpHead:
    """A source that scores nodes with the target's MTP layer, embeddings and head.

    Args:
        model: modules and cache of the head, with as many seats as the target.
        target: the target.
        max_rows: rows that growing trees may take in the cache, including nodes that later drop out.
        check: check of the head's guesses on the first rows; None for a head whose guesses may be bad.
    """

    name = "mtp"
    wants_states = True
    taps: LayerTaps | None = None
    knows_all_levels = False
    expands_chains = False
    temperatures = SMALL_DRAFT
    proposal_share = 1.0

    def __init__(self, model: MtpModel, target: TreeModel, *, max_rows: int, check: HeadCheck | None) -> None:
        self.models: Sequence[TreeModel] = (model,)
        self._model = model
        self._target = target
        self._max_rows = max_rows
        self._check = check
        self._held = [_Seat() for _ in range(model.cache.seats)]
        self._seats: list[int] = []
        self._rows: list[TreeRows] = []
        # For each tree, the outputs of the root and of the rows so far, [1 + max_rows, hidden].
        self._outputs: list[Tensor] = []

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree; 0 if a token before the last one has no state, as before a prompt."""
        held = self._held[sequence.seat]
        return sequence.max_depth if held.follows(held.known(sequence.tokens)) else 0

    def receive(self, seat: int, states: FinalStates) -> None:
        """Take the target's states of rows that became final."""
        self._held[seat].receive(states)

    def catch_up(self, cancel: threading.Event | None) -> None:
        """Read the states of seats that no tree was grown for, if they are many."""
        behind = [(each, held.text) for each, held in enumerate(self._held) if held.num_states > UNREAD_STATES]
        if behind:
            self._read(behind, cancel)

    def begin(self, sequences: Sequence[TokenSequence], cancel: threading.Event | None) -> tuple[Tensor, int]:
        """Compute the rows that are not cached; return the scores after each sequence's last token, and the rows."""
        texts = [(each.seat, self._held[each.seat].known(each.tokens)) for each in sequences]
        outputs = self._read(texts, cancel)
        self._seats = [seat for seat, _ in texts]
        self._rows = [TreeRows(self._max_rows, len(text) - 1) for _, text in texts]
        last = self._last_outputs(outputs)
        self._outputs = [each.new_empty(1 + self._max_rows, *each.shape) for each in last]
        for kept, each in zip(self._outputs, last, strict=True):
            kept[0] = each
        scores = self._model.scores(self._target, torch.stack([each[-1] for each in outputs]))
        return scores, sum(map(len, outputs))

    @property
    def num_free_rows(self) -> int:
        """Number of nodes that can still be expanded."""
        return self._max_rows - sum(each.num_rows for each in self._rows)

    def expand(self, paths: Paths, nodes: Tensor, cancel: threading.Event | None) -> Tensor:
        """Compute nodes, sorted by tree, and return the scores after them, [n, V]; their parents are computed."""
        parts, states = list[tuple[int, RowLayout]](), list[Tensor]()
        places = list[tuple[int, slice, Tensor]]()
        for tree, of_tree in runs(paths.tree[nodes]):
            own, rows = nodes[of_tree], self._rows[tree]
            paths.row[own] = new = rows.next(len(own))
            parents = paths.parent[own]
            above = torch.where(parents == ROOT, ROOT, paths.row[parents.clamp(min=0)])
            rows.add(above, paths.depth[own])
            parts.append((self._seats[tree], rows.layout(len(own))))
            states.append(self._outputs[tree][(above + 1).to(self._model.device)])
            places.append((tree, of_tree, (new + 1).to(self._model.device)))
        tokens, depths = paths.token[nodes].tolist(), paths.depth[nodes]
        outputs, guessing = self._read_nodes(tokens, torch.cat(states), depths, PassLayout(parts), cancel)
        for tree, of_tree, new in places:
            self._outputs[tree][new] = outputs[of_tree]
        return self._model.scores(self._target, guessing)

    def end(self) -> None:
        """Do nothing: the rows are in the head's own cache."""

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Drop the rows of the tree: they were computed from guessed states."""
        self._model.cache.truncate(seat, self._held[seat].num_read)
        return ()

    def reset(self) -> None:
        """Empty the cache, and drop all states."""
        for seat in range(len(self._held)):
            self._model.cache.truncate(seat, 0)
            self._held[seat] = _Seat()

    def close(self) -> None:
        """Close the head."""
        self._model.close()

    def _read(self, texts: Sequence[tuple[int, list[int]]], cancel: threading.Event | None) -> list[Tensor]:
        """Compute the rows of texts from the states that are held, at least the last row; check them.

        Args:
            texts: seats with their known texts.
            cancel: event that cancels the pass.

        Returns:
            Outputs of the new rows of each text, [rows, hidden].

        Raises:
            HeadDisagreesError: the head's choices are hardly better than chance.
        """
        tokens, states, parts = list[int](), list[Tensor](), list[tuple[int, RowLayout]]()
        for seat, text in texts:
            held = self._held[seat]
            assert held.states is not None, "texts with states only"
            begin = min(held.num_usable(text), len(text) - 2)
            self._model.cache.truncate(seat, begin)
            held.read = text[: begin + 1]
            tokens += text[begin + 1 :]
            states.append(held.states[begin - held.first :])
            parts.append((seat, linear_layout(begin, len(text) - 1 - begin, self._model.device)))
        read = self._read_rows(tokens, torch.cat(states), PassLayout(parts), cancel)
        outputs = list(read.split([len(each) for each in states]))
        for (seat, text), each, own in zip(texts, states, outputs, strict=True):
            held = self._held[seat]
            self._compare(seat, held.start + len(text) - 1 - len(own), own, each)
            held.text = held.read = text
            # A text that goes on differently needs the last state again.
            held.first, held.states = len(text) - 2, each[-1:].clone()
        return outputs

    def _read_rows(
        self, tokens: Sequence[int], states: Tensor, layout: PassLayout, cancel: threading.Event | None
    ) -> Tensor:
        """Compute the outputs [rows, hidden] of committed rows that guess the next token; see `MtpModel.read`."""
        return self._model.read(self._target, tokens, states, layout, cancel)

    def _last_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what children of each text's last row read in place of states, from the outputs of `_read`."""
        return [each[-1] for each in outputs]

    def _read_nodes(
        self,
        tokens: Sequence[int],
        parents: Tensor,
        depths: Tensor,
        layout: PassLayout,
        cancel: threading.Event | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute nodes; return what their children read, and the outputs [n, hidden] that guess the children."""
        outputs = self._model.read(self._target, tokens, parents, layout, cancel)
        return outputs, outputs

    def _compare(self, seat: int, first: int, outputs: Tensor, states: Tensor) -> None:
        """Compare outputs [rows, hidden] of new rows and the states that the head read, while the check lasts."""
        if self._check is not None:
            self._check.compare(self._target, [outputs], [states])
