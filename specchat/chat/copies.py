"""Chats to load into another one: a session by its ID, a copy as JSON lines, or a copy as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specchat.chat import transcript
from specchat.chat.state import ChatRecord, Exchange, Loaded
from specchat.errors import SessionError, UsageError
from specchat.files import read_regular
from specchat.paths import user_path
from specchat.records.chat import Message

_HEADING = re.compile(r"\*\*(?P<who>.+)\*\*")
_SYSTEM, _USER = "System", "You"


@dataclass(frozen=True)
class Copy:
    """A chat that was read.

    Attributes:
        source: place it was read from.
        records: records of the chat.
        repair: warning about an incomplete last line, or None.
    """

    source: str
    records: Sequence[ChatRecord]
    repair: str | None = None


def read_copy(name: str) -> Copy:
    """Read a chat from a file, or the saved session of this name.

    Raises:
        UsageError: there is neither a file nor a session of this name.
        SessionError: the file is not a chat, or is damaged.
    """
    path = user_path(name)
    if not path.exists() and "/" not in name:
        path = _session(name)
    if path.suffix.lower() in transcript.MARKDOWN_SUFFIXES:
        return Copy(str(path), (read_markdown(path),))
    saved = transcript.read(path)
    return Copy(str(path), saved.records, saved.repair)


def _session(name: str) -> Path:
    """Return the file of a saved session.

    Raises:
        UsageError: there is no such session.
    """
    try:
        path = transcript.path_of(name)
    except UsageError:
        path = None
    if path is None or not transcript.has_begun(path):
        raise UsageError(f"no file and no saved chat is named '{name}'", hint="/sessions lists the saved chats")
    return path


def read_markdown(path: Path) -> Loaded:
    """Read a chat that was written as Markdown; it has no thinking.

    Raises:
        SessionError: the file cannot be read, or does not have the form of such a chat.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SessionError(f"cannot read {path}: {reason}") from error
    sections = list(_sections(text))
    system = None
    if sections and sections[0][0] == _SYSTEM:
        system = sections.pop(0)[1]
    questions, answers = sections[::2], sections[1::2]
    if not sections or len(questions) != len(answers) or any(who != _USER for who, _ in questions):
        raise SessionError(
            f"{path} is not a chat that specchat wrote", hint="/load reads the files that /save FILE writes"
        )
    exchanges = zip((text for _, text in questions), (text for _, text in answers), strict=True)
    return Loaded(tuple(Exchange(q, Message("assistant", a)) for q, a in exchanges), system, str(path))


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a chat as (who, text).

    A line such as `**Note**` within an answer is text: only the name of the next speaker begins a part. The first
    answer's heading tells the model's name.
    """
    who: str | None = None
    model: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        match = _HEADING.fullmatch(line)
        name = match["who"] if match else None
        if name is not None and _may_follow(who, name, model):
            if who is not None:
                yield who, "\n".join(lines).strip()
            model = name if who == _USER else model
            who, lines = name, []
        else:
            lines.append(line)
    if who is not None:
        yield who, "\n".join(lines).strip()


def _may_follow(who: str | None, name: str, model: str | None) -> bool:
    """Return whether a heading begins the next part: the user first, then the model, in turn; anything else is text.

    Args:
        who: name in the heading of the part before; None at the beginning.
        name: name in the heading.
        model: name of the model, from its first answer; None before.
    """
    if who is None:
        return name in (_SYSTEM, _USER)
    if who == _USER:
        return name not in (_SYSTEM, _USER) and model in (None, name)
    return name == _USER
