"""The settings of an answer: their names and their allowed values."""

from __future__ import annotations

import difflib
import math
import secrets
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from specchat.chat.state import ChatState, Value
from specchat.errors import UsageError
from specchat.records.chat import Overflow

Number = float | int

MAX_SEED = 2**63 - 1
OVERFLOWS: tuple[Overflow, ...] = ("stop", "drop-oldest")

_QUOTES = ('"""', '"', "'")
_THINKING: dict[str, bool | None] = {
    "on": True,
    "true": True,
    "off": False,
    "false": False,
    "default": None,
    "none": None,
}


def whole(name: str, text: str | None, minimum: int, maximum: int | None = None) -> int | None:
    """Parse a whole number within limits; return None if `text` is None.

    Raises:
        UsageError: the text is no whole number, or the number is outside the limits.
    """
    if text is None:
        return None
    limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"{name} must be a whole number, {limits}, not '{text}'") from None
    if value < minimum or (maximum is not None and value > maximum):
        raise UsageError(f"{name} must be {limits}, not {value}")
    return value


def number(name: str, text: str | None, is_allowed: Callable[[float], bool], limits: str) -> float | None:
    """Parse a finite number within limits; return None if `text` is None.

    Raises:
        UsageError: the text is no finite number, or the number is outside the limits.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
        raise UsageError(f"{name} must be a number {limits}, not '{text}'")
    return value


@dataclass(frozen=True)
class Kind:
    """One setting of an answer.

    Attributes:
        key: name in `Sampling`, in config.toml and for /set.
        parse: function (name for messages, text) -> value; raises UsageError.
    """

    key: str
    parse: Callable[[str, str], Number | None]


# The settings that are numbers.
KINDS: dict[str, Kind] = {
    kind.key: kind
    for kind in (
        Kind("temperature", lambda name, text: number(name, text, lambda t: t >= 0, "of at least 0 (0 is greedy)")),
        Kind("top_p", lambda name, text: number(name, text, lambda p: 0 < p <= 1, "above 0 and at most 1")),
        Kind("top_k", lambda name, text: whole(name, text, 0)),
        Kind("min_p", lambda name, text: number(name, text, lambda p: 0 <= p <= 1, "from 0 to 1")),
        Kind("repetition_penalty", lambda name, text: number(name, text, lambda r: r > 0, "above 0")),
        Kind("seed", lambda name, text: whole(name, text, 0, MAX_SEED)),
        Kind("max_tokens", lambda name, text: whole(name, text, 1)),
    )
}


# All settings that /set lists and changes.
SETTABLE = (*KINDS, "stop", "system", "think", "overflow")


def random_seed() -> int:
    """Return a random seed of 32 bits, short enough to type again."""
    return secrets.randbits(32)


def parse_value(key: str, text: str) -> tuple[str, Value | None]:  # noqa: PLR0911  one line for each kind of value
    """Return the setting that `key` names, and its value.

    "none" removes the limit of max_tokens, the stop strings and the system prompt; "random" draws a new seed.

    Args:
        key: name of the setting; dashes are read as underscores.
        text: value as typed, possibly in quotes.

    Raises:
        UsageError: the setting is unknown, or the value is not allowed.
    """
    name = key.strip().lower().replace("-", "_")
    text = text.strip()
    if name not in SETTABLE:
        raise UsageError(f"unknown setting '{key}'", hint=suggestion(name, SETTABLE))
    word = unquoted(text).lower()
    match name, word:
        case "max_tokens" | "system", "none":
            return name, None
        case "seed", "random":
            return name, random_seed()
        case "stop", _:
            return name, () if word == "none" else _texts(text)
        case "system", _:
            return name, unquoted(text)
        case "think", _:
            return name, _thinking(word)
        case "overflow", _:
            return name, overflow(name, word)
    return name, KINDS[name].parse(name, unquoted(text))


def overflow(name: str, text: str) -> Overflow:
    """Check what to do when the context is full."""
    for known in OVERFLOWS:
        if text == known:
            return known
    raise UsageError(f"{name} must be {' or '.join(OVERFLOWS)}, not '{text}'")


def unquoted(text: str) -> str:
    """Return `text` without the quotes around it."""
    for mark in _QUOTES:
        if len(text) >= 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            return text[len(mark) : -len(mark)]
    return text


def _texts(text: str) -> tuple[str, ...]:
    """Return one or more strings in quotes, or the whole text as one string."""
    if not text.startswith(("'", '"')):
        return (text,)
    try:
        texts = tuple(shlex.split(text))
    except ValueError:
        raise UsageError("stop must be one text, or texts in quotes") from None
    if not all(texts):
        raise UsageError("stop must not be empty", hint="/set stop=none removes all stop strings")
    return texts


def _thinking(word: str) -> bool | None:
    if word not in _THINKING:
        raise UsageError(f"think must be on, off or default, not '{word}'")
    return _THINKING[word]


def shown_values(state: ChatState) -> dict[str, str]:
    """Return the settings of a chat's next answer as text, by name."""
    values = {**asdict(state.sampling), "max_tokens": state.max_tokens}
    return {
        **{key: _shown(value) for key, value in values.items()},
        "stop": " ".join(map(repr, state.stops)) or "none",
        "system": state.system or "none",
        "think": {True: "on", False: "off", None: "model default"}[state.thinking],
        "overflow": state.overflow,
    }


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
