"""The state of a chat, and the records that change the state.

A chat is the sum of its records. The live session and a session file apply the same records to the same initial state,
so a resumed chat equals the chat that was left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

from specchat.records.chat import Message, Overflow
from specchat.records.generation import FinishReason, Sampling

How = Literal["ask", "retry", "edit", "continue"]
# The value of a setting: a number, a word, or strings.
Value = float | int | str | tuple[str, ...]
DropCause = Literal["asked", "overflow"]

_SEED_BITS = 63


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: message of the user.
        answer: message of the model, possibly partial.
        attempt: number of earlier answers to the question; keys the sampling together with the chat's seed.
    """

    question: str
    answer: Message
    attempt: int = 0


@dataclass(frozen=True)
class ChatState:
    """Everything that the next answer depends on, except the model.

    Attributes:
        exchanges: questions and answers, oldest first.
        system: system prompt, or None.
        sampling: sampling settings; the seed is the one of first attempts.
        max_tokens: maximum tokens of an answer; None for as many as the context allows.
        thinking: the template's switch for thinking; None keeps the template's default.
        stops: strings that end an answer and are removed from it.
        overflow: policy for a full context; "stop" refuses the message, "drop-oldest" drops old turns.
    """

    exchanges: tuple[Exchange, ...] = ()
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    thinking: bool | None = None
    stops: tuple[str, ...] = ()
    overflow: Overflow = "stop"

    @property
    def messages(self) -> list[Message]:
        """Messages of the chat without the system prompt."""
        return [message for e in self.exchanges for message in (Message("user", e.question), e.answer)]

    def sampling_of(self, attempt: int) -> Sampling:
        """Return the sampling settings of an attempt."""
        return replace(self.sampling, seed=derived_seed(self.sampling.seed, attempt))


def derived_seed(seed: int, attempt: int) -> int:
    """Return the seed of an attempt; the first attempt uses the chat's seed."""
    if attempt == 0:
        return seed
    digest = blake2b(f"{seed}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


# --- records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The record of a chat that begins, or resumes in another process.

    Attributes:
        setup: facts that the answers depend on besides the chat, such as model, revision, quant and dtype.
        system: system prompt, as in `ChatState`.
        sampling: sampling settings, as in `ChatState`.
        max_tokens: maximum tokens of an answer, as in `ChatState`.
        thinking: the template's switch for thinking, as in `ChatState`.
    """

    setup: dict[str, Any]
    system: str | None
    sampling: Sampling
    max_tokens: int | None
    thinking: bool | None


@dataclass(frozen=True)
class Answered:
    """The record of an answer that ended, for any reason, with at least one token.

    Attributes:
        how: way in which the answer joins the chat, as a new exchange, a replacement or a continuation.
        exchange: question and answer; with "continue", the whole answer.
        seed: seed of the sampling.
        token_ids: emitted tokens; with "continue", only the added ones.
        finish_reason: reason why the answer ended.
        facts: usage, timings and figures of speculative decoding.
    """

    how: How
    exchange: Exchange
    seed: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Undone:
    """The record that removes the last question and its answer."""


@dataclass(frozen=True)
class Rewritten:
    """The record of new words that the user put in the place of the last answer."""

    content: str


@dataclass(frozen=True)
class Dropped:
    """The record that drops the oldest exchanges.

    Attributes:
        num_exchanges: number of exchanges dropped.
        cause: reason for the drop; the user asked for it, or the context was full.
        questions: questions of the dropped exchanges, for the announcement.
    """

    num_exchanges: int
    cause: DropCause = "asked"
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cleared:
    """The record that drops all exchanges; the system prompt stays."""


@dataclass(frozen=True)
class SystemSet:
    """The record of a new system prompt; None removes the prompt."""

    system: str | None


@dataclass(frozen=True)
class ValueSet:
    """The record of a new value for a setting: a field of `Sampling`, max_tokens, stop or overflow."""

    key: str
    value: Value | None


@dataclass(frozen=True)
class ThinkingSet:
    """The record of a new position of the template's switch for thinking."""

    thinking: bool | None


@dataclass(frozen=True)
class Loaded:
    """The record that replaces this chat's exchanges and system prompt with another chat's."""

    exchanges: tuple[Exchange, ...]
    system: str | None
    source: str


ChatRecord = Opened | Answered | Undone | Rewritten | Dropped | Cleared | SystemSet | ValueSet | ThinkingSet | Loaded


def apply(state: ChatState, record: ChatRecord) -> ChatState:  # noqa: PLR0911  one line for each kind of record
    """Return the state of the chat after `record`."""
    match record:
        case Opened():
            return replace(
                state,
                system=record.system,
                sampling=record.sampling,
                max_tokens=record.max_tokens,
                thinking=record.thinking,
                stops=tuple(record.setup.get("stop", ())),
                overflow=record.setup.get("overflow", "stop"),
            )
        case Answered():
            kept = state.exchanges if record.how == "ask" else state.exchanges[:-1]
            return replace(state, exchanges=(*kept, record.exchange))
        case Undone():
            return replace(state, exchanges=state.exchanges[:-1])
        case Rewritten():
            last = [replace(each, answer=Message("assistant", record.content)) for each in state.exchanges[-1:]]
            return replace(state, exchanges=(*state.exchanges[:-1], *last))
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
    """Return the state of the chat after all `records`."""
    state = ChatState()
    for record in records:
        state = apply(state, record)
    return state


def _with_value(state: ChatState, key: str, value: Value | None) -> ChatState:
    changes: dict[str, Any] = {"stops" if key == "stop" else key: value}
    if key in ("max_tokens", "stop", "overflow"):
        return replace(state, **changes)
    return replace(state, sampling=replace(state.sampling, **changes))
