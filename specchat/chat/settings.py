"""Settings of an answer: their names, what values they take, and which of several sources holds."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.errors import UsageError

MAX_SEED = 2**63 - 1

Value = float | int


def whole(name: str, text: str | None, minimum: int, maximum: int | None = None) -> int | None:
    """A whole number within limits.

    Raises:
        UsageError: it is none, or outside them.
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
    """A number within limits; infinities and NaN never are.

    Raises:
        UsageError: it is none, or outside them.
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
    """One setting of answers.

    Attributes:
        key: its name in `Sampling`, in config.toml and for /set.
        parse: (name for complaints, text) -> its value; raises UsageError.
    """

    key: str
    parse: Callable[[str, str], Value | None]


# Everything /set can change.
KINDS: dict[str, Kind] = {
    kind.key: kind
    for kind in (
        Kind("temperature", lambda name, text: number(name, text, lambda t: t >= 0, "from 0 (greedy) up")),
        Kind("top_p", lambda name, text: number(name, text, lambda p: 0 < p <= 1, "above 0 and at most 1")),
        Kind("top_k", lambda name, text: whole(name, text, 0)),
        Kind("min_p", lambda name, text: number(name, text, lambda p: 0 <= p <= 1, "from 0 to 1")),
        Kind("repetition_penalty", lambda name, text: number(name, text, lambda r: r > 0, "above 0")),
        Kind("seed", lambda name, text: whole(name, text, 0, MAX_SEED)),
        Kind("max_tokens", lambda name, text: whole(name, text, 1)),
    )
}


def parse_value(key: str, text: str) -> tuple[str, Value | None]:
    """The setting that `key` names (dashes may stand for underscores), and its value; none for no limit.

    Raises:
        UsageError: there is no such setting, or it does not take that value.
    """
    name = key.strip().lower().replace("-", "_")
    if name not in KINDS:
        raise UsageError(f"there is no setting '{key}'", hint=suggestion(name, KINDS))
    if name == "max_tokens" and text.strip().lower() == "none":
        return name, None
    return name, KINDS[name].parse(name, text.strip())


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint for a name that does not exist: the nearest one that does, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
