"""A small model as a source of draft nodes, with a KV cache of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from specchat.engine.device import copied_together
from specchat.engine.drafting.pass_graphs import PassGraphs
from specchat.engine.drafting.paths import Paths, TreeRows
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.engine.kv_cache import Kept
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps
from specchat.engine.tree import ROOT, common_prefix

# Rows that a prompt has at least. Within a text, a step hands fewer rows to the draft, and recurrent layers can return
# to the state before them. So restore points are saved before prompts only.
_PROMPT_ROWS = 16


class DraftModel:
    """A source that scores nodes with a small model.

    Args:
        model: draft model, with as many seats as the target.
        max_rows: rows that growing trees may take in the draft's cache, including nodes that later drop out.
        max_context: longest context that the draft's positions support; no trees are drafted beyond it.

    Attributes:
        max_rows: rows that growing trees may take in the draft's cache.
    """

    name = "model"
    wants_states = False
    taps: LayerTaps | None = None
    knows_all_levels = False
    expands_chains = True
    temperatures = SMALL_DRAFT
    proposal_share = 1.0

    def __init__(self, model: TreeModel, *, max_rows: int, max_context: int) -> None:
        self.models: Sequence[TreeModel] = (model,)
        self._model = model
        self.max_rows = max_rows
        self._max_context = max_context
        self._graphs = PassGraphs(model) if PassGraphs.serves(model) else None
        # For each seat, the tokens whose rows are in the draft's cache.
        self._held: list[list[int]] = [[] for _ in range(model.cache.seats)]
        self._seats: list[int] = []
        self._rows: list[TreeRows] = []

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the levels that the draft's positions have room for."""
        return min(sequence.max_depth, self._max_context - len(sequence.tokens))

    def begin(self, sequences: Sequence[TokenSequence], cancel: threading.Event | None) -> tuple[Tensor, int]:
        """Compute the tokens that are not cached; return the scores after each sequence's last token, and the rows."""
        tokens, parts, last = self._new_rows(sequences)
        return self._begin(sequences, tokens, parts, last, cancel), len(tokens)

    def begin_beside(
        self, sequence: TokenSequence, values: Tensor, cancel: threading.Event | None
    ) -> tuple[Tensor, int, Tensor]:
        """Begin the tree of one sequence on the device, where values of 8 bytes are copied to along with the tokens.

        Returns:
            Scores after the sequence's last token [1, V], the number of rows that were computed, and the values.
        """
        tokens, parts, last = self._new_rows([sequence])
        ids, values = copied_together([torch.tensor(tokens), values], self._model.device)
        return self._begin([sequence], ids, parts, last, cancel), len(tokens), values

    def _new_rows(self, sequences: Sequence[TokenSequence]) -> tuple[list[int], list[tuple[int, RowLayout]], list[int]]:
        """Return the tokens that are not cached, their rows by seat, and the place of each sequence's last token."""
        tokens, parts, last = list[int](), list[tuple[int, RowLayout]](), list[int]()
        for sequence in sequences:
            held = self._held[sequence.seat]
            shared = min(common_prefix(held, sequence.tokens), len(sequence.tokens) - 1)
            if shared == len(held) and len(sequence.tokens) - shared > _PROMPT_ROWS:
                self._model.cache.save(sequence.seat)
            shared = self._model.cache.truncate(sequence.seat, shared)
            del held[shared:]
            new = sequence.tokens[shared:]
            parts.append((sequence.seat, linear_layout(shared, len(new), self._model.device)))
            tokens += self._known(new)
            last.append(len(tokens) - 1)
        return tokens, parts, last

    def _begin(
        self,
        sequences: Sequence[TokenSequence],
        tokens: Sequence[int] | Tensor,
        parts: Sequence[tuple[int, RowLayout]],
        last: Sequence[int],
        cancel: threading.Event | None,
    ) -> Tensor:
        """Compute the rows of `_new_rows`, and return the scores after the last ones."""
        hidden = self._model.forward(tokens, PassLayout(parts), cancel)
        for sequence in sequences:
            self._held[sequence.seat] = list(sequence.tokens)
        self._seats = [sequence.seat for sequence in sequences]
        self._rows = [TreeRows(self.max_rows, len(each.tokens)) for each in sequences]
        # An index would cross the link to a GPU; the only sequence's last row is the last one.
        return self._model.logits(hidden[-1:] if len(last) == 1 else hidden[list(last)])

    @property
    def num_free_rows(self) -> int:
        """Number of nodes that can still be expanded."""
        return self.max_rows - sum(each.num_rows for each in self._rows)

    def expand(self, paths: Paths, nodes: Tensor, cancel: threading.Event | None) -> Tensor:
        """Compute nodes, sorted by tree, and return the scores after them, [n, V]."""
        parts = []
        for tree, of_tree in runs(paths.tree[nodes]):
            own, rows = nodes[of_tree], self._rows[tree]
            paths.row[own] = rows.next(len(own))
            parents = paths.parent[own]
            rows.add(torch.where(parents == ROOT, ROOT, paths.row[parents.clamp(min=0)]), paths.depth[own])
            parts.append((self._seats[tree], rows.layout(len(own))))
        hidden = self._model.forward(self._known(paths.token[nodes].tolist()), PassLayout(parts), cancel)
        return self._model.logits(hidden)

    @property
    def grows_on_device(self) -> bool:
        """Whether a tree can grow without the host: on a GPU, where states and embeddings are, too."""
        model = self._model
        return model.device.type == "cuda" and model.cache.recurrent is None and model.host_embeddings is None

    @property
    def num_recorded(self) -> int:
        """Number of passes that were recorded as graphs, which takes longer than a pass."""
        return 0 if self._graphs is None else self._graphs.num_recorded

    def compute(self, tokens: Tensor, layout: RowLayout, cancel: threading.Event | None) -> Tensor:
        """Compute nodes of the only tree, whose tokens and layout are on the device; return the scores, [n, V].

        The next call may overwrite the scores.
        """
        known = tokens.clamp(max=self._model.vocab_size - 1)
        if self._graphs is not None and layout.num_rows <= self._model.chunk_rows:
            if cancel is not None and cancel.is_set():
                raise PassCancelledError
            return self._graphs.compute(self._seats[0], known, layout)
        return self._model.logits(self._model.forward(known, PassLayout([(self._seats[0], layout)]), cancel))

    def end(self) -> None:
        """Do nothing: the rows are in the draft's own cache."""

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Return the rows of accepted nodes, which stay; other accepted nodes are computed by the next `begin`."""
        prefix = len(self._held[seat])
        self._held[seat] += tokens
        return [Kept(self._model.cache, seat, prefix, [prefix + row for row in rows])]

    def receive(self, seat: int, states: FinalStates) -> None:
        """Do nothing: the draft reads tokens alone."""

    def catch_up(self, cancel: threading.Event | None) -> None:
        """Do nothing: no states wait."""

    def reset(self) -> None:
        """Empty the draft's cache."""
        for seat, held in enumerate(self._held):
            self._model.cache.truncate(seat, 0)
            held.clear()

    def close(self) -> None:
        """Close the draft model."""
        self._model.close()

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Clamp token ids to the draft's vocabulary; the target may have further ids without meaning to the draft."""
        return [min(token_id, self._model.vocab_size - 1) for token_id in token_ids]


def runs(trees: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each tree of a sorted list, and where its entries are."""
    first = 0
    for tree, entries in groupby(trees.tolist()):
        count = len(list(entries))
        yield tree, slice(first, first + count)
        first += count
