"""The settings of an answer: their names and their allowed values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.errors import UsageError

MAX_SEED = 2**63 - 1

Value = float | int


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
    parse: Callable[[str, str], Value | None]


# The settings that /set can change.
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


def parse_value(key: str, text: str) -> tuple[str, Value | None]:
    """Return the setting that `key` names, and its value; "none" removes the limit of max_tokens.

    Args:
        key: name of the setting; dashes are read as underscores.
        text: value as typed.

    Raises:
        UsageError: the setting is unknown, or the value is not allowed.
    """
    name = key.strip().lower().replace("-", "_")
    if name not in KINDS:
        raise UsageError(f"unknown setting '{key}'", hint=suggestion(name, KINDS))
    if name == "max_tokens" and text.strip().lower() == "none":
        return name, None
    return name, KINDS[name].parse(name, text.strip())


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
