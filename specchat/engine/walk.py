"""The walk: draw the target's tokens from the root of every tree down, until a token is not in the tree.

The head and the processors only run on visited nodes. All walks of a pass go down together: one call of the head scores
each walk's node with its likeliest descendants, so a pass over many sequences takes about as many calls as over one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from specchat.engine.model import TreeModel
from specchat.engine.sampling import ScoresNotFiniteError
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import ROOT, TokenTree, last_tokens
from specchat.records.limits import head_block_rows

# Tokens up to a scored node that a drafter is told.
_TAIL = 3


class Walk:
    """The walk of one sequence.

    Args:
        sequence: committed tokens, and limits of the answer.
        tree: draft tree of N nodes.
        root_row: row of the root among the pass's hidden states; the rows of the nodes follow.

    Attributes:
        path: accepted nodes, root to leaf.
        is_open: whether the walk goes on.
        is_broken: whether the target's scores are NaN or infinite, so that no token can be drawn.
    """

    def __init__(self, sequence: TokenSequence, tree: TokenTree, root_row: int) -> None:
        self.path: list[int] = []
        self.is_open, self.is_broken = True, False
        self._sequence = sequence
        self._tree = tree
        self._root_row = root_row
        self._text = list(sequence.tokens)
        self._num_before = len(sequence.tokens)
        self._node = ROOT

    @property
    def tokens(self) -> tuple[int, ...]:
        """The drawn tokens: those of the path, and one more."""
        return tuple(self._text[self._num_before :])

    def next_block(self, num_rows: int) -> list[int]:
        """Return the current node and its likeliest descendants."""
        return [self._node, *self._tree.likely_descendants(self._node, num_rows - 1)]

    def row_of(self, node: int) -> int:
        """Return the row of a node, or of ROOT, among the pass's hidden states."""
        return self._root_row + 1 + node

    def final_states(self, hidden: Tensor, count: int) -> Tensor:
        """Return the states [count, hidden] of the rows that became final: committed tokens, then the accepted path.

        Args:
            hidden: hidden states of the pass, [rows, hidden]; a view of them without an accepted path, because a copy
                of a long prompt's states would take memory that no ledger counts.
            count: number of these rows.
        """
        end = self._root_row + 1
        linear = hidden[end - count + len(self.path) : end]
        if not self.path:
            return linear
        nodes = torch.tensor([self.row_of(node) for node in self.path], device=hidden.device)
        return torch.cat([linear, hidden[nodes]])

    def tail_of(self, node: int) -> list[int]:
        """Return the last tokens up to a node, as many as a drafter learns from."""
        return last_tokens(self._sequence.tokens, self._tree.tokens, self._tree.parents, node, _TAIL)

    def advance(self, scores: Mapping[int, Tensor]) -> None:
        """Draw tokens as long as the scores of the current node, float32 [V], are given."""
        sequence = self._sequence
        while self.is_open and self._node in scores:
            try:
                token = sequence.sampler.draw(scores[self._node], self._text)
            except ScoresNotFiniteError:
                self.is_open, self.is_broken = False, True
                return
            self._text.append(token)
            child = self._tree.children.get((self._node, token))
            if child is None or sequence.ends_with(self._text):
                self.is_open = False
                return
            self.path.append(child)
            self._node = child


# Function that takes the last tokens up to each scored row, and the scores of the rows, float32 [n, V].
Observe = Callable[[Sequence[Sequence[int]], Tensor], None]


def walk_down(target: TreeModel, walks: Sequence[Walk], hidden: Tensor, block_rows: int, observe: Observe) -> None:
    """Finish all walks.

    Args:
        target: model whose head scores the nodes.
        walks: walks of a pass.
        hidden: hidden states of the pass, [rows, hidden].
        block_rows: nodes that a single walk scores at a time.
        observe: receives all scores, also of nodes that no walk visits.
    """
    while waiting := [walk for walk in walks if walk.is_open]:
        _advance(target, waiting, hidden, head_block_rows(block_rows, len(waiting)), observe)


def _advance(target: TreeModel, walks: Sequence[Walk], hidden: Tensor, num_rows: int, observe: Observe) -> None:
    """Score one block of every walk, and draw as far as the blocks reach; the scores are freed at the end."""
    blocks = [walk.next_block(num_rows) for walk in walks]
    tails = [walk.tail_of(node) for walk, block in zip(walks, blocks, strict=True) for node in block]
    rows = [walk.row_of(node) for walk, block in zip(walks, blocks, strict=True) for node in block]
    scores = target.logits(hidden[torch.tensor(rows, device=hidden.device)])
    observe(tails, scores)
    for walk, block, each in zip(walks, blocks, scores.split([len(block) for block in blocks]), strict=True):
        walk.advance(dict(zip(block, each, strict=True)))
