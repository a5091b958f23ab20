"""What chats are made of."""

from dataclasses import dataclass, field
from typing import Literal

# The parts of what a model writes: the answer, and the thinking before it.
Part = Literal["answer", "reasoning"]


# What becomes of a chat that fills its context: refuse the next message, or leave out the oldest turns.
Overflow = Literal["stop", "drop-oldest"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat, in the words of chat templates; `reasoning` is the thinking before an answer."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str | None = field(default=None)


@dataclass(frozen=True)
class Setting:
    """A setting that holds, as it is shown, and where it came from: a flag, a file, the model, a default."""

    name: str
    value: str
    source: str
