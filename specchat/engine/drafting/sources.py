"""Sources of draft nodes: what a drafter asks for the children of nodes, and what it records of their work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specchat.engine.drafting.paths import Paths
from specchat.engine.kv_cache import Kept
from specchat.engine.model import TreeModel
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.taps import LayerTaps

# Most tokens before a node that a proposing source is shown: longer repeats are no more certain.
TAIL = 16


@dataclass(frozen=True)
class Proposal:
    """A token that may follow a node, without a probability.

    Attributes:
        token: token id.
        kind: number of the kind of proposal; the share of proposals that come true is learned by kind.
    """

    token: int
    kind: int


@dataclass(frozen=True)
class Temperatures:
    """Temperatures of the softmax that turns a source's scores into path weights.

    The source's own softmax estimates how likely a token is in general. A path weight must estimate how likely the
    target accepts the token. The target's choice is more certain than the softmax, so lower temperatures rank paths
    better; the closer the source is to the target, the lower.

    Attributes:
        greedy: temperature for greedy answers.
        noise: temperature for sampled answers, whose noise is added to the scores.
    """

    greedy: float
    noise: float


# Small draft models and heads. Tokens per step by temperature, measured on the demo pair (budget 64, 90 held-out chats
# that no test uses):
# greedy: 4.24 at 1.0, 5.1 at 0.6, 5.67 at 0.5, 5.40 at 0.35;
# sampling at t=0.7: 4.72 at 1.0, 5.07 at 0.85, 5.11 at 0.7, 5.0 at 0.55.
SMALL_DRAFT = Temperatures(greedy=0.5, noise=0.7)


class ScoringSource(Protocol):
    """A source that scores all tokens after a node, and computes rows to do so.

    Attributes:
        name: name of the source.
        models: models that the source holds in memory.
        wants_states: whether the source reads the target's states, which `receive` hands over.
        taps: reader of the states between the target's layers; None if the source reads none.
        knows_all_levels: whether `begin` computes the scores of all levels, so that expanding nodes takes no pass.
        expands_chains: whether a pass can compute a node together with its descendants.
        temperatures: temperatures of path weights.
        proposal_share: share of a proposal's first weight that counts beside this source. The closer the source is to
            the target, the less a proposal tells.
    """

    name: str
    models: Sequence[TreeModel]
    wants_states: bool
    taps: LayerTaps | None
    knows_all_levels: bool
    expands_chains: bool
    temperatures: Temperatures
    proposal_share: float

    def max_depth(self, sequence: TokenSequence) -> int:
        """Return the most levels of a tree below the sequence's last token; 0 if the source cannot score the tree."""

    def begin(self, sequences: Sequence[TokenSequence], cancel: threading.Event | None) -> tuple[Tensor, int]:
        """Begin a tree for each sequence.

        Returns:
            Scores after the last token of each sequence [n, V], and the number of rows that were computed.
        """

    @property
    def num_free_rows(self) -> int:
        """Number of nodes that can still be expanded."""

    def expand(self, paths: Paths, nodes: Tensor, cancel: threading.Event | None) -> Tensor:
        """Compute nodes, sorted by tree, and return the scores after them, [n, V]; fill in their rows in `paths`."""

    def end(self) -> None:
        """End the growth of the trees, also after an error: drop the rows that the target's pass must not find."""

    def commit(self, seat: int, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        """Commit the accepted nodes of a seat's last tree that were expanded.

        Args:
            seat: seat of the sequence.
            rows: rows of the nodes.
            tokens: tokens of the nodes.

        Returns:
            Rows that stay in the source's caches, which the caller keeps.
        """

    def receive(self, seat: int, states: FinalStates) -> None:
        """Take the target's states of rows that became final, after `commit`; see `Drafter.receive`."""

    def catch_up(self, cancel: threading.Event | None) -> None:
        """Read states that wait, unless they are few: the target's next pass has no memory for them."""

    def reset(self) -> None:
        """Drop all cached context of all seats."""

    def close(self) -> None:
        """Release memory and threads."""


class ProposingSource(Protocol):
    """A source that proposes tokens after a node in no time, without scores.

    Attributes:
        name: name of the source.
        priors: log odds of each kind of proposal before any is tried.
    """

    name: str
    priors: Priors

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Read the sequences' new tokens."""

    def propose(self, seat: int, tail: Sequence[int], luck: Tensor | None) -> Sequence[Proposal]:
        """Return proposals for what follows the tail, at most one for a token.

        Args:
            seat: seat of the sequence.
            tail: last `TAIL` tokens up to a node; all tokens of a shorter text.
            luck: the sampler's noise of the next token [V], which says what is worth a guess without other knowledge;
                None if the answer is greedy, or if another source scores the tree.
        """

    def observe(self, tails: Sequence[Sequence[int]], scores: Tensor) -> None:
        """Take scores that the target computed; see `Drafter.observe`."""

    def reset(self) -> None:
        """Forget all texts."""


@dataclass(frozen=True)
class Priors:
    """Log odds of proposals before any is tried, by kind.

    Attributes:
        alone: log odds of a token that no draft model scores.
        beside: addition to the score of a draft model, which knows of most repeats by itself; None for proposals that
            say nothing beside a draft model.
        beside_sampled: additions for sampled answers.
    """

    alone: tuple[float, ...]
    beside: tuple[float | None, ...]
    beside_sampled: tuple[float | None, ...]
