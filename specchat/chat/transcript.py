"""Chats on disk: a file of JSON lines that only ever grows, one line for each thing that happened to the chat.

The first line says what the chat runs on; every later one is written and synced before the next prompt appears. What a
crash tears off is at most the line that was being written. The state of a chat is what its records add up to (`state`),
so reading a file back gives the chat that was left, and its seeds and settings draw the same tokens again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from specchat.chat.state import (
    Answered,
    ChatRecord,
    ChatState,
    Cleared,
    Dropped,
    Exchange,
    Loaded,
    Opened,
    SystemSet,
    ThinkingSet,
    Undone,
    ValueSet,
    state_of,
)
from specchat.errors import SessionError, UsageError
from specchat.paths import state_folder
from specchat.records.chat import Message
from specchat.records.generation import Sampling

VERSION = 1
SUFFIX = ".jsonl"

_TYPES: dict[str, type[ChatRecord]] = {
    "open": Opened,
    "answer": Answered,
    "undo": Undone,
    "drop": Dropped,
    "clear": Cleared,
    "system": SystemSet,
    "set": ValueSet,
    "think": ThinkingSet,
    "load": Loaded,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_ID = re.compile(r"[\w][\w.-]{0,99}", re.ASCII)


# --- places ------------------------------------------------------------------------------------------------------


def sessions_folder() -> Path:
    """Where sessions are."""
    return state_folder() / "sessions"


def history_file() -> Path:
    """Where the lines typed at the prompt are."""
    return state_folder() / "history"


def new_id() -> str:
    """An ID for a session that was given none: the time, and something to tell two of the same second apart."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def path_of(session_id: str) -> Path:
    """The file of a session, whether it exists or not.

    Raises:
        UsageError: no session could be called that.
    """
    if not _ID.fullmatch(session_id):
        raise UsageError(
            f"'{session_id}' cannot be a session's ID", hint="letters, digits, dots, dashes and underscores can"
        )
    return sessions_folder() / f"{session_id}{SUFFIX}"


def last_session() -> Path | None:
    """The session that was written to last, or None."""
    return next(filter(has_begun, all_sessions()), None)


def all_sessions() -> list[Path]:
    """The files of all sessions, the one that was written to last first."""
    return sorted(sessions_folder().glob(f"*{SUFFIX}"), key=_written_at, reverse=True)


def has_begun(path: Path) -> bool:
    """Whether there is a session in a file: one killed at its first answer may have left an empty one."""
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except OSError:
        return False


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A session as it was read.

    Attributes:
        path: its file.
        records: all of it.
        good_bytes: length of the file up to the end of its last whole line.
        repair: what is to be said of a line that a crash tore, or None.
    """

    path: Path
    records: tuple[ChatRecord, ...]
    good_bytes: int
    repair: str | None = None

    @property
    def session_id(self) -> str:
        """The name of the session."""
        return self.path.stem

    @property
    def opened(self) -> Opened:
        """What the session ran on last."""
        return next(record for record in reversed(self.records) if isinstance(record, Opened))

    @property
    def state(self) -> ChatState:
        """The chat."""
        return state_of(self.records)


def read(path: Path) -> Saved:
    """The session in a file. A last line that a crash tore is left out, and `repair` says so.

    Raises:
        UsageError: there is no such file.
        SessionError: it is not a session, is damaged elsewhere, or was written by a later version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no session in {path}") from None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from error
    whole, torn = _whole_lines(data)
    records = [_read_line(path, number, line) for number, line in enumerate(whole, 1)]
    if not records or not isinstance(records[0], Opened):
        raise SessionError(f"{path} is not a session of specchat")
    repair = f"the last line of {path} was torn ({torn} bytes) and is left out" if torn else None
    return Saved(path, tuple(records), len(data) - torn, repair)


def _whole_lines(data: bytes) -> tuple[list[bytes], int]:
    """The lines, and the bytes at the end that are none: what has no line end, or is no JSON in the last line."""
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    if lines and not _is_json(lines[-1]):  # the file grew, its contents did not arrive
        end -= len(lines.pop()) + 1
    return lines, len(data) - end


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_line(path: Path, number: int, line: bytes) -> ChatRecord:
    try:
        values = json.loads(line)
        version = values.pop("version", VERSION)
        if version > VERSION:
            raise SessionError(
                f"{path} was written by a later version of specchat", hint="update specchat to continue this chat"
            )
        return _from_json(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SessionError(
            f"line {number} of {path} is damaged", hint="the chat before it can be copied out"
        ) from error


def _from_json(values: dict[str, Any]) -> ChatRecord:
    kind = _TYPES[values.pop("type")]
    values.pop("at", None)
    if kind is Opened:
        values["sampling"] = Sampling(**values["sampling"])
    elif kind is Answered:
        values["exchange"] = _exchange(values["exchange"])
        values["token_ids"] = tuple(values["token_ids"])
    elif kind is Dropped:
        values["questions"] = tuple(values["questions"])
    elif kind is Loaded:
        values["exchanges"] = tuple(_exchange(each) for each in values["exchanges"])
    return kind(**values)


def _exchange(values: dict[str, Any]) -> Exchange:
    return Exchange(values["question"], Message(**values["answer"]), values["attempt"])


# --- writing -----------------------------------------------------------------------------------------------------


class Transcript:
    """A session that is being written: pass it to `ChatSession` as its journal.

    The file appears with the first answer, readable by nobody else. A line that could not be written is tried again
    with the next one.

    Args:
        path: the file; None keeps the records without writing them.
        saved: what is in the file already, when the session is resumed.
    """

    def __init__(self, path: Path | None, saved: Saved | None = None) -> None:
        self.path = path
        self._records: list[ChatRecord] = list(saved.records if saved else ())
        self._unwritten: list[bytes] = []
        self._good_bytes = saved.good_bytes if saved else 0
        self._file: BinaryIO | None = self._open() if saved and path else None
        self._is_new = saved is None

    @property
    def session_id(self) -> str | None:
        """The session's name; None if it is not saved."""
        return self.path.stem if self.path else None

    @property
    def records(self) -> Sequence[ChatRecord]:
        """Everything so far."""
        return self._records

    def __call__(self, record: ChatRecord) -> None:
        """Adds a record and waits until it is on the disk.

        Raises:
            SessionError: it cannot be written; the chat itself goes on.
        """
        self._records.append(record)
        now = datetime.now().astimezone()
        self._unwritten.append(_line(record, is_first=len(self._records) == 1, at=now))
        if self.path is None or (self._file is None and not isinstance(record, Answered)):
            return
        try:
            self._write()
        except OSError as error:
            raise SessionError(
                f"the chat cannot be saved to {self.path}: {error.strerror}; the next turn tries again",
                hint="/save FILE writes a copy elsewhere",
            ) from error

    def close(self) -> None:
        """Lets go of the file, and of the right to write to it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        file = self._file = self._file or self._open()
        file.seek(self._good_bytes)
        file.truncate()
        data = b"".join(self._unwritten)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if self._is_new:
            assert self.path is not None
            _sync_folder(self.path.parent)
            self._is_new = False
        self._good_bytes += len(data)
        self._unwritten.clear()

    def _open(self) -> BinaryIO:
        """The file, ours alone until it is closed.

        Raises:
            SessionError: another specchat has it open.
        """
        assert self.path is not None
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SessionError(
                f"the session {self.session_id} is open in another specchat", hint="--session ID names another one"
            ) from error
        return file


def _line(record: ChatRecord, *, is_first: bool, at: datetime | None = None) -> bytes:
    head = {"type": _NAMES[type(record)], **({"version": VERSION} if is_first else {})}
    when = {} if at is None else {"at": at.isoformat(timespec="seconds")}
    values = head | when | asdict(record)
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """A new file survives a power cut only when its folder is on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- copies ------------------------------------------------------------------------------------------------------


def export(records: Sequence[ChatRecord], path: Path) -> None:
    """Writes a chat to a file of the user's choice: Markdown if it ends in .md, else JSON lines.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    is_markdown = path.suffix.lower() in (".md", ".markdown")
    text = as_markdown(records) if is_markdown else as_json_lines(records)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode())
    except FileExistsError as error:
        raise UsageError(f"{path} exists already", hint="choose another name") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def as_json_lines(records: Iterable[ChatRecord]) -> str:
    """The session's file, without the times."""
    return b"".join(_line(record, is_first=i == 0) for i, record in enumerate(records)).decode()


def as_markdown(records: Iterable[ChatRecord]) -> str:
    """The chat as it stands, to be read; thinking is left out."""
    records = list(records)
    state = state_of(records)
    model = next((r.setup.get("model") for r in reversed(records) if isinstance(r, Opened)), None) or "the model"
    sections = [] if state.system is None else [("System", state.system)]
    for message in state.messages:
        sections.append(("You" if message.role == "user" else str(model), message.content))
    return "\n\n".join(f"**{who}**\n\n{text.strip()}" for who, text in sections) + "\n"
