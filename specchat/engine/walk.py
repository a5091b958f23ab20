"""The walk: draw the target's tokens from the root of every tree down, until a token is not in the tree.

The head and the processors only run on visited nodes. All walks of a pass go down together: one call of the head scores
each walk's node with its likeliest descendants, so a pass over many sequences takes about as many calls as over one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from specchat.engine.model import TreeModel
from specchat.engine.sampling import Sampler, ScoresNotFiniteError, checked_token
from specchat.engine.sequence import FinalStates, TokenSequence
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

    def final_states(self, first: int, hidden: Tensor, tapped: Tensor | None) -> FinalStates:
        """Return the states of the rows that became final, after the sequence has taken the drawn tokens.

        Args:
            first: number of tokens before the first of these rows.
            hidden: hidden states of the pass, [rows, hidden].
            tapped: collected states of the rows of the pass, [rows, width]; None without taps.
        """
        sequence = self._sequence
        count = sequence.num_cached - first
        kept = None if tapped is None else self._final_rows(tapped, count)
        return FinalStates(list(sequence.tokens), first, self._final_rows(hidden, count), kept)

    def _final_rows(self, rows: Tensor, count: int) -> Tensor:
        """Return the `count` rows that became final: committed tokens, then the accepted path.

        Without an accepted path, the result is a view: a copy of a long prompt's states would take memory that no
        ledger counts.
        """
        end = self._root_row + 1
        linear = rows[end - count + len(self.path) : end]
        if not self.path:
            return linear
        nodes = torch.tensor([self.row_of(node) for node in self.path], device=rows.device)
        return torch.cat([linear, rows[nodes]])

    def tail_of(self, node: int) -> list[int]:
        """Return the last tokens up to a node, as many as a drafter learns from."""
        return last_tokens(self._sequence.tokens, self._tree.tokens, self._tree.parents, node, _TAIL)

    @property
    def text(self) -> Sequence[int]:
        """Tokens up to the current node."""
        return self._text

    @property
    def sampler(self) -> Sampler:
        """Sampler of the sequence."""
        return self._sequence.sampler

    def tokens_to(self, node: int) -> list[int]:
        """Return the tokens from below the current node down to one of its descendants."""
        below = list[int]()
        while node != self._node:
            below.append(self._tree.tokens[node])
            node = self._tree.parents[node]
        return below[::-1]

    def advance(self, draw: Draw, known: Container[int]) -> None:
        """Draw tokens as long as the current node is among the known ones.

        Args:
            draw: function that draws the token after a node.
            known: nodes whose scores are known.
        """
        sequence = self._sequence
        while self.is_open and self._node in known:
            try:
                token = draw(self._node)
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


# Function that draws the token after a node; it may raise ScoresNotFiniteError.
Draw = Callable[[int], int]
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
    """Score one block of every walk, and draw as far as the blocks reach; the scores are freed at the end.

    A CPU draws after visited nodes only. On a GPU, a wait of the host takes longer than a draw. So all nodes of the
    blocks are drawn after, with one copy to the device before and one wait at the end.
    """
    blocks = [walk.next_block(num_rows) for walk in walks]
    tails = [walk.tail_of(node) for walk, block in zip(walks, blocks, strict=True) for node in block]
    rows = [walk.row_of(node) for walk, block in zip(walks, blocks, strict=True) for node in block]
    on_cpu = target.device.type == "cpu"
    contexts = [] if on_cpu else [_Contexts.of(walk, block) for walk, block in zip(walks, blocks, strict=True)]
    known = list(chain.from_iterable(chain.from_iterable(each.known for each in contexts)))
    runs = [(walk.row_of(block[0]), len(block)) for walk, block in zip(walks, blocks, strict=True)]
    if rows == [first + place for first, count in runs for place in range(count)]:  # the first blocks are runs of rows
        found = [hidden.narrow(0, *run) for run in runs]
        states, ids = found[0] if len(found) == 1 else torch.cat(found), _index(known, hidden.device)
    else:
        ids = _index([*rows, *known], hidden.device)
        states, ids = hidden[ids[: len(rows)]], ids[len(rows) :]
    scores = target.logits(states)
    observe(tails, scores)
    parts = scores.split([len(block) for block in blocks])
    if on_cpu:
        draws = [_draw_one_by_one(walk, block, each) for walk, block, each in zip(walks, blocks, parts, strict=True)]
    else:
        draws = _draw_at_once(walks, blocks, parts, contexts, ids)
    for walk, block, draw in zip(walks, blocks, draws, strict=True):
        walk.advance(draw, block)


def _draw_one_by_one(walk: Walk, block: Sequence[int], scores: Tensor) -> Draw:
    """Return a function that draws after a node of a block when it is asked to."""
    of_node = dict(zip(block, scores, strict=True))
    return lambda node: walk.sampler.draw(of_node[node], walk.text)


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    """Return integers on a device, int64 [n]; none of them cross no link."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class _Contexts:
    """What comes before the nodes of a block.

    Attributes:
        known: tokens that processors read up to the current node, then those from there down to each node.
        positions: absolute position of the token after each node.
    """

    known: list[Sequence[int]]
    positions: list[int]

    @classmethod
    def of(cls, walk: Walk, block: Sequence[int]) -> _Contexts:
        """Return the contexts of a block's nodes."""
        known_of, paths = walk.sampler.known_of, [walk.tokens_to(node) for node in block]
        positions = [len(walk.text) + len(path) for path in paths]
        return cls([known_of(walk.text), *map(known_of, paths)], positions)


def _draw_at_once(
    walks: Sequence[Walk],
    blocks: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
    contexts: Sequence[_Contexts],
    ids: Tensor,
) -> list[Draw]:
    """Draw after all nodes of all blocks, and return functions that tell the results; the host waits once.

    Args:
        walks: walks of a pass.
        blocks: nodes of each walk.
        scores: scores of each block, float32 [n, V].
        contexts: contexts of the nodes, by walk.
        ids: all tokens of the contexts on the device, int64.
    """
    pieces = iter(ids.split([len(tokens) for of_walk in contexts for tokens in of_walk.known]))
    best = list[Tensor]()
    for walk, of_walk, each in zip(walks, contexts, scores, strict=True):
        text, *paths = (next(pieces) for _ in of_walk.known)
        known = [torch.cat([text, path]) if len(path) else text for path in paths]
        best.append(walk.sampler.best_tokens(each, known, of_walk.positions))
    drawn = iter(torch.cat(best).tolist())
    found = [{node: next(drawn) for node in block} for block in blocks]
    return [partial(_told, of_walk) for of_walk in found]


def _told(best: Mapping[int, tuple[float, float]], node: int) -> int:
    return checked_token(*best[node])
