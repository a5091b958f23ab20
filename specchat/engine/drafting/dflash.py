"""A DFlash head as a source of draft nodes: one pass over a block of masks guesses all levels of a tree.

The head's cache holds keys and values of the text's joined states, one row for each token that the target has read.
They depend on nothing else, so they are stored as soon as the states are known, and a rejected tree costs nothing. A
block's rows are dropped after its pass. The guesses of a level do not depend on the nodes above it: a tree is the best
product of them, found by the same best-first loop as for other sources (DDTree, arXiv 2604.12989). A DFlash2 head adds
scores of pairs, so its guesses depend on the parent's token; they still need no further pass.

A head may come to a text late; then the text begins with the first state that it is given. Positions count from there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specchat.engine.attention import MaskFunction, PassMask
from specchat.engine.drafting.draft_model import runs
from specchat.engine.drafting.head_check import HeadCheck, choices
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.engine.kv_cache import Kept
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps
from specchat.engine.tree import common_prefix
from specchat.models.hf.dflash import DFlashSkeleton
from specchat.records.limits import MOST_BLOCK_ROWS

# Levels that the check compares: the guesses of deeper ones are weaker, because they do not know the tokens between.
_CHECKED_LEVELS = 3


class DFlashModel(TreeModel):
    """The modules of a DFlash head, with a KV cache; its layers are resident."""

    skeleton: DFlashSkeleton

    @torch.inference_mode()
    def store(self, seat: int, states: Tensor) -> None:
        """Append the keys and values of joined states [rows, hidden] to a seat; on an error, append nothing."""
        held = self.cache.lengths[seat]
        try:
            for rows in states.split(self.chunk_rows):
                begin = self.cache.lengths[seat]
                layout = PassLayout.single(linear_layout(begin, len(rows), self.device), seat)
                layout.select(0, len(rows))
                found = self.skeleton.keys_and_values(rows, layout.positions)
                for layer, (keys, values) in zip(self.cache.layers, found, strict=True):
                    layer.append(layout, keys, values)
        except BaseException:
            self.cache.truncate(seat, held)
            raise

    @torch.inference_mode()
    def read(
        self, target: TreeModel, token_ids: Sequence[int], layout: PassLayout, cancel: threading.Event | None
    ) -> Tensor:
        """Compute the states [rows, hidden] of blocks, and append their rows to the cache.

        Args:
            target: model whose embeddings the head shares.
            token_ids: tokens of the rows, one block after another.
            layout: positions of the rows; those of a block see each other.
            cancel: event that cancels the pass.
        """
        self._rows = self.skeleton.embedded(target.embed(token_ids, plain=self.skeleton.settings.plain_embeddings))
        try:
            return self.forward(token_ids, layout, cancel)
        finally:
            del self._rows

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.skeleton.hidden_of(self._rows, positions, self._hf_cache)

    def _mask_of(self, layout: PassLayout, rule: MaskFunction) -> PassMask:
        return PassMask(layout, self.cache.capacity, self.skeleton.rule_of(rule))


@dataclass
class _Seat:
    """What the head knows of the sequence in a seat.

    Attributes:
        start: number of leading tokens that the head never had states of.
        tokens: tokens of the rows in the cache, from `start` on.
        guesses: the head's choices of the last block for the tokens after a text; empty when they were checked.
        text: the text before these guesses.
    """

    start: int = 0
    tokens: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)


class DFlashHead:
    """A source that scores the nodes of each level with a DFlash head.

    Args:
        model: modules and cache of the head, with as many seats as the target.
        target: the target.
        max_rows: rows that a block may take in the cache.
        check: check of the head's guesses in the first steps; None for a head whose guesses may be bad.
    """

    name = "dflash"
    wants_states = True
    knows_all_levels = True
    expands_chains = False
    temperatures = SMALL_DRAFT
    proposal_share = 1.0

    def __init__(self, model: DFlashModel, target: TreeModel, *, max_rows: int, check: HeadCheck | None) -> None:
        self.models: Sequence[TreeModel] = (model,)
        settings, width = model.skeleton.settings, model.skeleton.config.hidden_size
        # What leaves a layer enters the next one.
        entered = [layer + 1 for layer in settings.layers]
        self.taps: LayerTaps | None = LayerTaps(entered, width, model.skeleton.project, model.chunk_rows)
        self._model = model
        self._target = target
        self._masks = [settings.mask_token] * (min(settings.block_size, max_rows, MOST_BLOCK_ROWS) - 1)
        model.skeleton.use_blocks(1 + len(self._masks))
        self._max_rows = max_rows
        self._check = check
        self._held = [_Seat() for _ in range(model.cache.seats)]
        # For each tree, the target's scores of each level, float32 [levels, V], the states behind them [levels, D], and
        # the number of nodes that were expanded.
        self._levels: list[Tensor] = []
        self._states: list[Tensor] = []
        self._num_expanded: list[int] = []
        self._compared: tuple[list[int], list[int]] = [], []

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree; 0 if a token before the last one has no state, as before a prompt."""
        held = self._held[sequence.seat]
        is_read = held.tokens == sequence.tokens[held.start : -1] and len(held.tokens) > 0
        return min(sequence.max_depth, len(self._masks)) if is_read else 0

    def receive(self, seat: int, states: FinalStates) -> None:
        """Store the joined states of rows that became final."""
        assert states.tapped is not None, "a pass with the head's taps"
        held, text = self._held[seat], states.tokens
        self._note(held, states)
        shared = held.start + common_prefix(held.tokens, text[held.start :])
        if not held.start <= states.first <= shared:
            held.start, held.tokens = states.first, []  # states before these are missing, or are other ones
        self._model.cache.truncate(seat, states.first - held.start)
        del held.tokens[states.first - held.start :]
        self._model.store(seat, states.tapped)
        held.tokens += text[states.first : -1]

    def catch_up(self, cancel: threading.Event | None) -> None:
        """Do nothing: no states wait."""

    def begin(self, sequences: Sequence[TokenSequence], cancel: threading.Event | None) -> tuple[Tensor, int]:
        """Guess all levels of all trees in one pass; return the scores of the first levels, and the rows.

        Raises:
            HeadDisagreesError: the head's choices in earlier steps are hardly better than chance.
        """
        self._judge()
        size = 1 + len(self._masks)
        ids, parts = list[int](), list[tuple[int, RowLayout]]()
        for sequence in sequences:
            held = self._held[sequence.seat]
            begin = len(held.tokens)
            positions = torch.arange(begin, begin + size)
            parts.append((sequence.seat, RowLayout(begin, 0, torch.ones(size, size, dtype=torch.bool), positions)))
            ids += [sequence.tokens[-1], *self._masks]
        hidden = self._model.read(self._target, ids, PassLayout(parts), cancel)
        for seat, layout in parts:
            self._model.cache.truncate(seat, layout.prefix)
        self._states = [block[1:] for block in hidden.split(size)]
        self._levels = [self._target.logits(states) for states in self._states]
        self._num_expanded = [0] * len(sequences)
        if self._check is not None and not self._check.is_done:
            for tree, sequence in enumerate(sequences):
                held = self._held[sequence.seat]
                held.guesses, held.text = self._best_chain(tree, sequence.tokens[-1]), list(sequence.tokens)
        first = [self._scores(tree, torch.tensor([0]), [each.tokens[-1]]) for tree, each in enumerate(sequences)]
        return torch.cat(first), len(ids)

    def _scores(self, tree: int, levels: Tensor, parents: Sequence[int]) -> Tensor:
        """Return the scores, float32 [n, V], of levels of a tree [n] below nodes with given tokens."""
        levels = levels.to(self._model.device)
        above = torch.tensor(parents, device=self._model.device)
        return self._model.skeleton.scores(self._levels[tree][levels], self._states[tree][levels], above)

    def _best_chain(self, tree: int, last: int) -> list[int]:
        """Return the head's first choices of the levels that the check compares."""
        chain = [last]
        for level in range(min(_CHECKED_LEVELS, len(self._masks))):
            chain.append(int(self._scores(tree, torch.tensor([level]), chain[-1:]).argmax()))
        return chain[1:]

    @property
    def num_free_rows(self) -> int:
        """Number of nodes that can still be expanded."""
        return self._max_rows - sum(self._num_expanded)

    def expand(self, paths: Paths, nodes: Tensor, cancel: threading.Event | None) -> Tensor:
        """Return the scores [n, V] of the level below each node; nodes are sorted by tree."""
        scores = []
        for tree, of_tree in runs(paths.tree[nodes]):
            own, first = nodes[of_tree], self._num_expanded[tree]
            paths.row[own] = torch.arange(first, first + len(own))
            self._num_expanded[tree] += len(own)
            scores.append(self._scores(tree, paths.depth[own], paths.token[own].tolist()))
        return torch.cat(scores)

    def end(self) -> None:
        """Free the scores."""
        self._levels, self._states = [], []

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Return nothing: the block's rows were dropped, and `receive` stores the accepted tokens' states."""
        return ()

    def reset(self) -> None:
        """Empty the cache, and forget all texts."""
        for seat in range(len(self._held)):
            self._model.cache.truncate(seat, 0)
            self._held[seat] = _Seat()

    def close(self) -> None:
        """Close the head."""
        self._model.close()

    def _note(self, held: _Seat, states: FinalStates) -> None:
        """Keep the head's guesses and the target's choices for the same tokens, until the check is done."""
        length = len(held.text)
        first = length - 1 - states.first  # row of the token before the first guess
        is_same = states.tokens[:length] == held.text and 0 <= first < len(states.hidden)
        if self._check is not None and held.guesses and is_same:
            theirs = choices(self._target.logits, states.hidden[first : first + len(held.guesses)])
            self._compared[0].extend(held.guesses[: len(theirs)])
            self._compared[1].extend(theirs)
        held.guesses, held.text = [], []

    def _judge(self) -> None:
        ours, theirs = self._compared
        self._compared = [], []
        if self._check is not None and not self._check.is_done and ours:
            self._check.count(ours, theirs)
