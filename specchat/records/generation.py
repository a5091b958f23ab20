"""Records of generation: requests with sampling parameters, and the steps that an engine yields."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from threading import Event
from typing import Literal

from specchat.errors import SpecchatError

# Current activity of an engine; "prefill" is a pass over more than one committed token.
Phase = Literal["idle", "drafting", "prefill", "verifying"]


# "error" ends one answer of several; the others go on.
FinishReason = Literal["stop", "length", "context", "interrupt", "error"]


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token from the target's scores; each value means the same as in transformers.

    Attributes:
        temperature: divisor of the scores; 0 is greedy and skips the sampling-only processors, as in transformers.
        top_k: number of likeliest tokens to keep; 0 keeps every token.
        top_p: probability mass to keep; 1.0 keeps every token.
        min_p: least probability relative to the likeliest token; 0.0 keeps every token.
        repetition_penalty: penalty on tokens of the context; 1.0 has no effect.
        seed: key of the draws, together with token position and token id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the token with the highest score is taken, without a random draw."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        prompt_ids: all tokens so far, at least one.
        sampling: parameters of the draws, with the seed of this answer.
        stop_ids: token ids that end the answer; the stop token is the answer's last token.
        max_tokens: most tokens of the answer; None for no limit but the context.
        cancel: event that ends this answer alone, before its next pass; None if nobody sets one.
        restore_at: lengths of the prompt at which a later prompt may differ, besides its end.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    max_tokens: int | None = None
    cancel: Event | None = field(default=None, compare=False)
    restore_at: tuple[int, ...] = ()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self.cancel is not None and self.cancel.is_set()


@dataclass(frozen=True)
class SourceWork:
    """The work of one source of draft nodes on the trees of a pass.

    Attributes:
        source: the source's name.
        draft_s: seconds that the source took.
        draft_passes: number of passes of a draft model; a fraction if several answers share them.
    """

    source: str
    draft_s: float = 0.0
    draft_passes: float = 0.0


@dataclass(frozen=True)
class Guesses:
    """Draft nodes of one source, and what they cost.

    Attributes:
        source: the source's name: "model", "retrieval" or "recycling".
        offered: number of nodes that the source added.
        accepted: number of the offered nodes that the target accepted.
        offered_by_depth: offered nodes at depth 1, 2, ... of the tree.
        accepted_by_depth: accepted nodes at depth 1, 2, ...
        draft_s: seconds that the source took, for all answers of the pass.
        draft_passes: number of passes of a draft model.
    """

    source: str
    offered: int
    accepted: int
    offered_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()
    draft_s: float = 0.0
    draft_passes: float = 0.0

    def plus(self, other: "Guesses", num_sharing: int = 1) -> "Guesses":
        """Return the sum with guesses of the same source, whose cost is divided by the answers that share it."""
        return Guesses(
            self.source,
            self.offered + other.offered,
            self.accepted + other.accepted,
            _sums(self.offered_by_depth, other.offered_by_depth),
            _sums(self.accepted_by_depth, other.accepted_by_depth),
            self.draft_s + other.draft_s / num_sharing,
            self.draft_passes + other.draft_passes / num_sharing,
        )


def _sums(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip_longest(first, second, fillvalue=0))


@dataclass(frozen=True)
class DraftTree:
    """The draft nodes that a step verified.

    Attributes:
        tokens: token id of each node, likeliest first.
        parents: index of each node's parent, smaller than the node's own index; -1 for children of the root.
        accepted: indices of the nodes that the target accepted, root to leaf.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """Current activity of the engine.

    Attributes:
        phase: current phase of the step.
        layers_done: number of layers that the current pass has computed.
        num_layers: number of the target's layers.
    """

    phase: Phase
    layers_done: int
    num_layers: int


@dataclass(frozen=True)
class Step:
    """One target pass and its result for one answer: the engine's only output.

    A pass may serve several answers. Then each of them gets a step of its own: the tokens, rows and nodes are the
    answer's, and the times and streamed bytes are those of the whole pass. Divide by `num_sharing` to sum over steps.

    Attributes:
        token_ids: tokens emitted by this pass, in order; empty only for an interrupted pass and after an error.
        finish_reason: reason for the end of the answer; None while the answer continues.
        new_rows: committed tokens that the pass computed (the prompt in the first step, then 1 or more).
        cached_rows: committed tokens that were in the KV cache.
        tree_nodes: draft nodes verified, root excluded.
        accepted: draft nodes among `token_ids`.
        depth: depth of the verified tree.
        pass_s: wall time of the whole step in seconds.
        draft_s: seconds of drafting.
        verify_s: seconds of the target pass.
        sample_s: seconds of head, processors and tree walk.
        stream_wait_s: seconds within verify_s spent waiting for streamed layers.
        streamed_bytes: bytes moved over the link.
        guesses: number of draft nodes by drafter; empty without a tree.
        tree: the verified draft tree; None without draft nodes or after an interruption.
        warning: news for the user in one line, such as a draft that was given up, or None.
        num_sharing: number of answers that the pass served.
        error: reason of the finish_reason "error", else None.
        expert_hits: experts that were in their slots when a layer of the pass used them.
        expert_misses: experts that the pass had to read, among them useful guesses.
        useful_guesses: experts that were read before their router named them.
        useless_guesses: experts that were read, but that no router named.
        draft_hidden_s: seconds within draft_s in which layers were read that the pass waited for; without drafting, the
            pass would have waited this much longer.
        experts_used: one bit for each layer with experts and each expert, set if the pass used the expert, packed as by
            numpy; empty for passes over prompts, and if no experts are read one by one.
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
    warning: str | None = None
    num_sharing: int = 1
    error: SpecchatError | None = None
    expert_hits: int = 0
    expert_misses: int = 0
    useful_guesses: int = 0
    useless_guesses: int = 0
    experts_used: bytes = b""
    draft_hidden_s: float = 0.0

    @property
    def exposed_draft_s(self) -> float:
        """Seconds by which drafting made the step longer."""
        return self.draft_s - self.draft_hidden_s

    @classmethod
    def without_pass(cls, reason: FinishReason, error: SpecchatError | None = None) -> "Step":
        """Return the step that ends an answer although no pass served the answer."""
        return cls((), reason, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, error=error)


def guesses_of(steps: Iterable[Step]) -> tuple[Guesses, ...]:
    """Return the sums over steps for each source, sorted by name."""
    totals: dict[str, Guesses] = {}
    for step in steps:
        for each in step.guesses:
            total = totals.get(each.source, Guesses(each.source, 0, 0))
            totals[each.source] = total.plus(each, step.num_sharing)
    return tuple(totals[source] for source in sorted(totals))
