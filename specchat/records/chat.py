"""Records of a chat: messages, settings, and what to do when the context is full."""

from dataclasses import dataclass, field
from typing import Literal

# Parts of a model's output: the answer, and the reasoning before the answer.
Part = Literal["answer", "reasoning"]


# Behaviour of a chat whose context is full: refuse the next message, or drop the oldest turns.
Overflow = Literal["stop", "drop-oldest"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat, with the field names of chat templates; `reasoning` is the thinking before an answer."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str | None = field(default=None)


@dataclass(frozen=True)
class Setting:
    """A setting in effect, formatted for display, with its source: a flag, a file, the model or a default."""

    name: str
    value: str
    source: str
