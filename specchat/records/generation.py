"""What generation is asked for, and what it yields."""

from dataclasses import dataclass
from typing import Literal

# What an engine is at; "prefill" is a pass that reads more than one committed token.
Phase = Literal["idle", "drafting", "prefill", "verifying"]


FinishReason = Literal["stop", "length", "context", "interrupt"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the target's scores; the values transformers gives the same names.

    Attributes:
        temperature: 0 is greedy: the processors that only apply to sampling are then left out, as in transformers.
        top_k: 0 keeps every token.
        top_p: 1.0 keeps every token.
        min_p: 0.0 keeps every token.
        repetition_penalty: 1.0 is none.
        seed: keys the draws, together with token position and token id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken instead of a draw."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Guesses:
    """What one drafter put into a tree.

    Attributes:
        source: the drafter's name.
        offered: its nodes.
        accepted: those of them that the target took.
    """

    source: str
    offered: int
    accepted: int


@dataclass(frozen=True)
class DraftTree:
    """The guesses that a step verified.

    Attributes:
        tokens: one per node, likeliest first.
        parents: index of each node's parent, -1 for those that follow the committed text; always smaller than its own.
        accepted: the nodes that the target took, root to leaf.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """What the engine is at.

    Attributes:
        phase: the part of a step.
        layers_done: of the pass under way.
        num_layers: of the target.
    """

    phase: Phase
    layers_done: int
    num_layers: int


@dataclass(frozen=True)
class Step:
    """One target pass and what came of it: the engine's only output.

    Attributes:
        token_ids: tokens emitted by this pass, in order; empty only for an interrupted pass.
        finish_reason: None while the answer goes on.
        new_rows: committed tokens the pass had to compute (the prompt in the first step, then 1 or more).
        cached_rows: committed tokens it found in the cache.
        tree_nodes: draft nodes verified, root excluded.
        accepted: draft nodes among `token_ids`.
        depth: depth of the tree that was offered.
        pass_s: wall time of the whole step.
        draft_s: time spent drafting that the pass did not hide.
        verify_s: time of the target pass.
        sample_s: time of head, processors and walk.
        stream_wait_s: time within verify_s spent waiting for layers.
        streamed_bytes: bytes moved over the link.
        guesses: the tree's nodes by the drafter they came from; empty without a tree.
        tree: the guesses themselves; None if there were none, or the step was interrupted.
        draft_lost: reason why the draft was given up in this step, in one line; None in all other steps.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    new_rows: int
    cached_rows: int
    tree_nodes: int
    accepted: int
    depth: int
    pass_s: float
    draft_s: float
    verify_s: float
    sample_s: float
    stream_wait_s: float
    streamed_bytes: int
    guesses: tuple[Guesses, ...] = ()
    tree: DraftTree | None = None
    draft_lost: str | None = None
