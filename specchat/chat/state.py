"""What a chat consists of, and what can happen to it.

A chat is the sum of its records: the live session and a session file read back apply the same records to the same
state, so that a chat that is resumed is the chat that was left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

from specchat.records.chat import Message
from specchat.records.generation import FinishReason, Sampling

How = Literal["ask", "retry", "edit", "continue"]
DropCause = Literal["asked", "overflow"]

_SEED_BITS = 63


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: the user's message.
        answer: the model's, as far as it came.
        attempt: how often the question had been answered before; with the chat's seed it keys the draws.
    """

    question: str
    answer: Message
    attempt: int = 0


@dataclass(frozen=True)
class ChatState:
    """Everything that the next answer depends on, besides the model.

    Attributes:
        exchanges: oldest first.
        system: the system prompt, or None.
        sampling: how tokens are drawn; its seed is that of first attempts.
        max_tokens: longest answer, or None for as long as the context allows.
        thinking: the template's switch for thinking; None leaves it to the template.
    """

    exchanges: tuple[Exchange, ...] = ()
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    thinking: bool | None = None

    @property
    def messages(self) -> list[Message]:
        """The chat without its system prompt."""
        return [message for e in self.exchanges for message in (Message("user", e.question), e.answer)]

    def sampling_of(self, attempt: int) -> Sampling:
        """How the tokens of an attempt are drawn."""
        return replace(self.sampling, seed=derived_seed(self.sampling.seed, attempt))


def derived_seed(seed: int, attempt: int) -> int:
    """The seed of an attempt; the first one's is the chat's own."""
    if attempt == 0:
        return seed
    digest = blake2b(f"{seed}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


# --- what can happen ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The chat begins, or goes on in another process.

    Attributes:
        setup: what the answers depend on besides the chat: model, revision, quant, dtype and the like.
        system, sampling, max_tokens, thinking: as in `ChatState`.
    """

    setup: dict[str, Any]
    system: str | None
    sampling: Sampling
    max_tokens: int | None
    thinking: bool | None


@dataclass(frozen=True)
class Answered:
    """An answer ended, in whatever way, with at least one token.

    Attributes:
        how: asked anew, or in the place of the last answer, or added to it.
        exchange: as it stands now; with "continue", the answer as a whole.
        seed: what keyed its draws.
        token_ids: tokens emitted; with "continue", those that were added.
        facts: usage, timings and what drafting brought.
    """

    how: How
    exchange: Exchange
    seed: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Undone:
    """The last question and its answer are taken back."""


@dataclass(frozen=True)
class Dropped:
    """The oldest exchanges are left out from now on.

    Attributes:
        num_exchanges: how many.
        cause: the user asked for it, or the context had no room.
        questions: those of the exchanges, so that they can be announced.
    """

    num_exchanges: int
    cause: DropCause = "asked"
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cleared:
    """All exchanges are forgotten; the system prompt stays."""


@dataclass(frozen=True)
class SystemSet:
    """The system prompt is another one, or None."""

    system: str | None


@dataclass(frozen=True)
class ValueSet:
    """A setting of the answers: a field of `Sampling`, or max_tokens."""

    key: str
    value: float | int | None


@dataclass(frozen=True)
class ThinkingSet:
    """The template's switch for thinking."""

    thinking: bool | None


@dataclass(frozen=True)
class Loaded:
    """Another chat's exchanges and system prompt take the place of this one's."""

    exchanges: tuple[Exchange, ...]
    system: str | None
    source: str


ChatRecord = Opened | Answered | Undone | Dropped | Cleared | SystemSet | ValueSet | ThinkingSet | Loaded


def apply(state: ChatState, record: ChatRecord) -> ChatState:  # noqa: PLR0911  one line for each kind of record
    """The chat after `record`."""
    match record:
        case Opened():
            return replace(
                state,
                system=record.system,
                sampling=record.sampling,
                max_tokens=record.max_tokens,
                thinking=record.thinking,
            )
        case Answered():
            kept = state.exchanges if record.how == "ask" else state.exchanges[:-1]
            return replace(state, exchanges=(*kept, record.exchange))
        case Undone():
            return replace(state, exchanges=state.exchanges[:-1])
        case Dropped():
            return replace(state, exchanges=state.exchanges[record.num_exchanges :])
        case Cleared():
            return replace(state, exchanges=())
        case SystemSet():
            return replace(state, system=record.system)
        case ValueSet():
            return _with_value(state, record.key, record.value)
        case ThinkingSet():
            return replace(state, thinking=record.thinking)
        case Loaded():
            return replace(state, exchanges=record.exchanges, system=record.system)


def state_of(records: Iterable[ChatRecord]) -> ChatState:
    """The chat that `records` add up to."""
    state = ChatState()
    for record in records:
        state = apply(state, record)
    return state


def _with_value(state: ChatState, key: str, value: float | int | None) -> ChatState:
    if key == "max_tokens":
        assert value is None or isinstance(value, int)
        return replace(state, max_tokens=value)
    changes: dict[str, Any] = {key: value}
    return replace(state, sampling=replace(state.sampling, **changes))
