"""The saved chats: what each is about, in which of them a text occurs, and how to remove one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from specchat.chat import transcript
from specchat.chat.state import Answered
from specchat.chat.transcript import Saved
from specchat.errors import SessionError, UsageError
from specchat.files import local_time

_TITLE_CHARS = 60
_UNREADABLE = "(cannot be read)"


@dataclass(frozen=True)
class SavedChat:
    """One saved chat.

    Attributes:
        session_id: ID of the session.
        path: file of the session.
        title: first words of the first question.
        model: model of the last turn; None if the file cannot be read.
        turns: number of questions with an answer.
        changed: time of the last change.
        nbytes: size of the file.
    """

    session_id: str
    path: Path
    title: str
    model: str | None
    turns: int
    changed: datetime
    nbytes: int


def find_chats(text: str = "") -> list[SavedChat]:
    """Return the saved chats that contain a text, the last one first.

    Args:
        text: text to look for in titles, questions and answers, in any case; empty for all chats.
    """
    return list(_found(text.casefold()))


def _found(text: str) -> Iterator[SavedChat]:
    for path in filter(transcript.has_begun, transcript.all_sessions()):
        try:
            saved = transcript.read(path)
        except (SessionError, UsageError):
            if not text:
                yield _entry(path, _UNREADABLE, None, 0)
            continue
        if not text or any(text in each.casefold() for each in _texts(saved)):
            yield _entry(path, _title(saved), str(saved.opened.setup.get("model")), len(saved.state.exchanges))


def _entry(path: Path, title: str, model: str | None, turns: int) -> SavedChat:
    facts = path.stat()
    changed = local_time(facts.st_mtime)
    return SavedChat(path.stem, path, title, model, turns, changed, facts.st_size)


def _texts(saved: Saved) -> Iterator[str]:
    yield saved.session_id
    for message in saved.state.messages:
        yield message.content


def _title(saved: Saved) -> str:
    """Return the first words of the chat, even if its first turns were dropped or cleared."""
    asked = (record.exchange.question for record in saved.records if isinstance(record, Answered))
    exchanges = saved.state.exchanges
    words = " ".join(next(asked, exchanges[0].question if exchanges else "(empty)").split())
    return words if len(words) <= _TITLE_CHARS else f"{words[: _TITLE_CHARS - 1].rstrip()}…"


def chat_named(session_id: str) -> Path:
    """Return the file of a saved chat.

    Raises:
        UsageError: there is no such chat.
    """
    path = transcript.path_of(session_id)
    if not transcript.has_begun(path):
        raise UsageError(f"there is no saved chat '{session_id}'", hint="specchat sessions lists the saved chats")
    return path
