"""The check of a head on the first rows that it reads: its guesses must agree with the target far above chance.

Published faults of heads (a norm left out, states before a norm, tensors of another revision) left the text right and
cost most of the speed, so nothing but agreement shows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specchat.engine.model import TreeModel
from specchat.records.limits import HEAD_BLOCK_ROWS, MOST_CHECKED_ROWS

# Rows to compare: few enough to cost nothing, enough to tell a head from chance. Published heads agree on half of the
# rows and more; a head of shifted rows agrees on 2% (tenstorrent/vllm, pull request 442).
_LEAST_ROWS = 48
# Least share of the rows on which chance would not agree.
_LEAST_SKILL = 0.1


class HeadDisagreesError(Exception):
    """A head agrees with the target hardly more often than by chance; internal to the engine.

    Args:
        num_agreed: rows on which both choose the same token.
        num_rows: rows that were compared.
    """

    def __init__(self, num_agreed: int, num_rows: int) -> None:
        super().__init__(f"agrees with the target on {num_agreed} of {num_rows} tokens, hardly more than by chance")


class HeadCheck:
    """Compares the first choices of a head and the target until enough rows are known.

    Attributes:
        is_done: whether enough rows are known, so that nothing more is compared.
    """

    def __init__(self) -> None:
        self._ours: list[int] = []
        self._theirs: list[int] = []
        self.is_done = False

    def compare(self, target: TreeModel, outputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Compare more rows.

        Args:
            target: model whose head scores outputs and states.
            outputs: the head's outputs for rows in sequence, [rows, hidden] for each text.
            states: the target's states of the same rows. The output of a row and the state of the next one guess the
                same token.

        Raises:
            HeadDisagreesError: the head's choices are hardly better than chance.
        """
        if self.is_done:
            return
        for one, other in zip(outputs, states, strict=True):
            rows = slice(-MOST_CHECKED_ROWS, None)
            self._ours += choices(target.logits, one[:-1][rows])
            self._theirs += choices(target.logits, other[1:][rows])
        self._judge()

    def count(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Compare the choices of head and target, row by row; see `compare`."""
        self._ours += ours
        self._theirs += theirs
        self._judge()

    def _judge(self) -> None:
        num_rows = len(self._ours)
        if num_rows < _LEAST_ROWS:
            return
        self.is_done = True
        num_agreed = sum(one == other for one, other in zip(self._ours, self._theirs, strict=True))
        their_counts = Counter(self._theirs)
        by_chance = sum(their_counts[token] for token in self._ours) / num_rows
        if num_agreed - by_chance < _LEAST_SKILL * (num_rows - by_chance):
            raise HeadDisagreesError(num_agreed, num_rows)


def choices(score: Callable[[Tensor], Tensor], hidden: Tensor) -> list[int]:
    """Return the likeliest token after each row of `hidden`, scored in blocks by `score`."""
    blocks = [score(block).argmax(-1) for block in hidden.split(HEAD_BLOCK_ROWS)] if len(hidden) else []
    return torch.cat(blocks).tolist() if blocks else []
