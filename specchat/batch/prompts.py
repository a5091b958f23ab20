"""The prompts of a job: a file with one JSON object per line.

A line that cannot be used is kept with its error, so that the other lines are answered.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from specchat.chat.settings import KINDS, Number
from specchat.errors import UsageError
from specchat.files import read_given
from specchat.records.chat import Message

_FORM = 'write one object per line, such as {"id": "a1", "prompt": "...", "max_tokens": 64, "seed": 7}'
_CONTENTS = ("prompt", "messages", "turns")
_KNOWN = ("id", *_CONTENTS, *KINDS)
_ROLES: tuple[Literal["system", "user", "assistant"], ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptLine:
    """One line of the file.

    Attributes:
        number: number of the line in the file, from 1.
        id: name of the prompt; the line's number if the line has none.
        messages: chat to answer; empty after an error.
        values: sampling values, seed and max_tokens of this line, which override those of all lines.
        error: reason why the line cannot be answered, or None.
    """

    number: int
    id: str | int
    messages: tuple[Message, ...] = ()
    values: Mapping[str, Number] = field(default_factory=dict)
    error: str | None = None


def read_prompts(path: Path) -> tuple[PromptLine, ...]:
    """Read the prompts of a file; blank lines are skipped.

    Raises:
        UsageError: the file cannot be read, or has no lines.
    """
    try:
        lines = read_given(path).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--prompts cannot read {path}: {reason}") from error
    first_line: dict[str | int, int] = {}
    found = []
    for number, text in enumerate(lines, 1):
        if text.strip():
            line = _read_line(number, text)
            first = first_line.setdefault(line.id, number)
            twice = f"the id {line.id!r} is also that of line {first}"
            found.append(line if first == number else PromptLine(number, number, error=twice))
    if not found:
        raise UsageError(f"{path} has no prompts", hint=_FORM)
    return tuple(found)


def _read_line(number: int, text: str) -> PromptLine:
    try:
        values = json.loads(text)
    except RecursionError:
        return PromptLine(number, number, error="nested too deeply")
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return PromptLine(number, number, error=f"not JSON: {reason}")
    if not isinstance(values, dict):
        return PromptLine(number, number, error="not an object")
    name = values.get("id", number)
    if not _is_id(name):
        return PromptLine(number, number, error="the id must be a string or a whole number")
    try:
        _check_keys(values)
        return PromptLine(number, name, _messages(values), _settings(values))
    except UsageError as error:
        return PromptLine(number, name, error=error.message)


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (isinstance(value, int) and not isinstance(value, bool))


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuse a misspelt key; other unknown keys are ignored, because files of questions have keys of their own.

    Raises:
        UsageError: a key is close to a known one.
    """
    for key in values:
        close = [] if key in _KNOWN else difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.8)
        if close:
            raise UsageError(f"unknown key {key!r}; did you mean {close[0]}?")


def _messages(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the chat of a line: a prompt, the messages, or the first of several turns.

    Raises:
        UsageError: the line has none of them, or more than one, or the text is empty.
    """
    given = [key for key in _CONTENTS if key in values]
    if len(given) != 1:
        raise UsageError(f"{' and '.join(given)} exclude each other" if given else "no prompt, messages or turns")
    value = values[given[0]]
    if given[0] == "messages":
        if not isinstance(value, list) or not value:
            raise UsageError("messages must be a list of messages")
        return tuple(_message(each) for each in value)
    text = value[0] if given[0] == "turns" and isinstance(value, list) and value else value
    return (Message("user", _text(given[0], text)),)


def _message(value: Any) -> Message:
    if isinstance(value, dict):
        for role in _ROLES:
            if value.get("role") == role:
                return Message(role, _text("the content of a message", value.get("content")))
    raise UsageError('a message must have a "role" (system, user or assistant) and a "content"')


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name} must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can name halves of characters
        raise UsageError(f"{name} is not valid text") from error
    return value


def _settings(values: Mapping[str, Any]) -> dict[str, Number]:
    """Return the settings of a line; null leaves a setting to the command line.

    Raises:
        UsageError: a value is not allowed.
    """
    found: dict[str, Number] = {}
    for key, kind in KINDS.items():
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{key} must be a number, not {json.dumps(value)}")
        parsed = kind.parse(key, repr(value))
        assert parsed is not None, "a text was given"
        found[key] = parsed
    return found
