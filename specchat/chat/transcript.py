"""Saved chats: one append-only file of JSON lines per session, one line per record of the chat.

The first line names the model and the settings. Every later line is written and synced before the next prompt appears,
so a crash loses at most the line that was being written. The state of a chat is the sum of its records (`state`):
reading a file restores the chat, and its seeds and settings reproduce the same tokens.
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

from specchat.chat.saved_types import check_types
from specchat.chat.state import (
    Answered,
    ChatRecord,
    ChatState,
    Cleared,
    Dropped,
    Exchange,
    Loaded,
    Opened,
    Rewritten,
    SystemSet,
    ThinkingSet,
    Undone,
    ValueSet,
    state_of,
)
from specchat.errors import SessionError, UsageError
from specchat.files import open_regular, read_regular
from specchat.paths import state_folder
from specchat.records.chat import Message
from specchat.records.generation import Sampling

VERSION = 1
SUFFIX = ".jsonl"
MARKDOWN_SUFFIXES = (".md", ".markdown")

_TYPES: dict[str, type[ChatRecord]] = {
    "open": Opened,
    "answer": Answered,
    "undo": Undone,
    "rewrite": Rewritten,
    "drop": Dropped,
    "clear": Cleared,
    "system": SystemSet,
    "set": ValueSet,
    "think": ThinkingSet,
    "load": Loaded,
}
_FIRST_BYTES = b'{"type": "open"'
_NAMES = {kind: name for name, kind in _TYPES.items()}
_ID = re.compile(r"[\w][\w.-]{0,99}", re.ASCII)


# --- paths -------------------------------------------------------------------------------------------------------


def sessions_folder() -> Path:
    """Return the folder of the saved sessions."""
    return state_folder() / "sessions"


def history_file() -> Path:
    """Return the file of the prompt history."""
    return state_folder() / "history"


def new_id() -> str:
    """Return an ID for a new session: the time, and random digits for sessions of the same second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def path_of(session_id: str) -> Path:
    """Return the path of a session's file, whether the file exists or not.

    Raises:
        UsageError: the ID is not valid.
    """
    if not _ID.fullmatch(session_id):
        raise UsageError(
            f"'{session_id}' is not a valid session ID", hint="use letters, digits, dots, dashes and underscores"
        )
    return sessions_folder() / f"{session_id}{SUFFIX}"


def last_session() -> Path | None:
    """Return the file of the most recent session, or None."""
    return next(filter(has_begun, all_sessions()), None)


def all_sessions() -> list[Path]:
    """Return the files of all sessions, most recently written first."""
    return sorted(filter(Path.exists, sessions_folder().glob(f"*{SUFFIX}")), key=_written_at, reverse=True)


def has_begun(path: Path) -> bool:
    """Return whether a file holds a session; a crash during the first answer may leave an empty file."""
    try:
        with open_regular(path) as file:
            return file.readline().endswith(b"\n")
    except OSError:
        return False


def check_unused(path: Path) -> None:
    """Check that a new session may be written to a path; the start of a torn first line is no loss.

    Raises:
        SessionError: the path holds something else than a session, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(_FIRST_BYTES))
    except FileNotFoundError:
        if path.is_symlink():
            raise SessionError(f"{path} is a link to nowhere", hint="choose another name with --session ID") from None
        return
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror}") from error
    if not _FIRST_BYTES.startswith(start):
        raise SessionError(f"{path} is not a specchat session", hint="choose another name with --session ID")


def _written_at(path: Path) -> int:
    """Return when a file was written; 0 for a file that has just been deleted."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A session that was read from its file.

    Attributes:
        path: path of the file.
        records: all records.
        good_bytes: length of the file up to the end of its last complete line.
        num_bytes: length of the whole file when it was read.
        repair: warning about an incomplete last line, or None.
    """

    path: Path
    records: tuple[ChatRecord, ...]
    good_bytes: int
    num_bytes: int
    repair: str | None = None

    @property
    def session_id(self) -> str:
        """ID of the session."""
        return self.path.stem

    @property
    def opened(self) -> Opened:
        """Most recent `Opened` record."""
        return next(record for record in reversed(self.records) if isinstance(record, Opened))

    @property
    def state(self) -> ChatState:
        """State of the chat after all records."""
        return state_of(self.records)


def read(path: Path) -> Saved:
    """Read a session from a file; skip an incomplete last line and set `repair`.

    Raises:
        UsageError: the file does not exist.
        SessionError: the file is not a session, is damaged before its last line, or is from a newer version.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise UsageError(f"no session file at {path}") from None
    except OSError as error:
        raise SessionError(f"cannot read {path}: {error.strerror}") from error
    whole, torn = _whole_lines(data)
    records = [_read_line(path, number, line) for number, line in enumerate(whole, 1)]
    if not records or not isinstance(records[0], Opened):
        raise SessionError(f"{path} is not a specchat session")
    repair = f"skipped the incomplete last line of {path} ({torn} bytes)" if torn else None
    return Saved(path, tuple(records), len(data) - torn, len(data), repair)


def _whole_lines(data: bytes) -> tuple[list[bytes], int]:
    """Return the complete lines, and the number of bytes after them.

    The last line counts as incomplete if it has no line end or is not JSON.
    """
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    if lines and not _is_json(lines[-1]):  # after a crash the file may have its new length but not the new content
        end -= len(lines.pop()) + 1
    return lines, len(data) - end


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_line(path: Path, number: int, line: bytes) -> ChatRecord:
    try:
        values = json.loads(line)
        version = values.pop("version", VERSION)
        if version > VERSION:
            raise SessionError(
                f"{path} was written by a newer version of specchat", hint="update specchat to continue this chat"
            )
        record = _from_json(values)
        check_types(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SessionError(
            f"line {number} of {path} is damaged", hint="copy the lines before it to another file to rescue the chat"
        ) from error
    return record


def _from_json(values: dict[str, Any]) -> ChatRecord:
    kind = _TYPES[values.pop("type")]
    values.pop("at", None)
    if kind is Opened:
        values["sampling"] = Sampling(**values["sampling"])
    elif kind is Answered:
        values["exchange"] = _exchange(values["exchange"])
        values["token_ids"] = tuple(values["token_ids"])
    elif kind is ValueSet and isinstance(values["value"], list):
        values["value"] = tuple(values["value"])
    elif kind is Dropped:
        values["questions"] = tuple(values["questions"])
    elif kind is Loaded:
        values["exchanges"] = tuple(_exchange(each) for each in values["exchanges"])
    return kind(**values)


def _exchange(values: dict[str, Any]) -> Exchange:
    return Exchange(values["question"], Message(**values["answer"]), values["attempt"])


# --- writing -----------------------------------------------------------------------------------------------------


class Transcript:
    """A session that is being written; pass it to `ChatSession` as its journal.

    The file is created with the first answer, readable by its owner only. A line that could not be written is retried
    with the next one.

    Args:
        path: path of the file; None keeps the records in memory only.
        saved: content of the file, for a resumed session.
    """

    def __init__(self, path: Path | None, saved: Saved | None = None) -> None:
        self.path = path
        self._records: list[ChatRecord] = list(saved.records if saved else ())
        self._unwritten: list[bytes] = []
        self._good_bytes = saved.good_bytes if saved else 0
        self._is_new = saved is None
        self._file: BinaryIO | None = None
        if saved and path:
            self._file = self._open()
            if os.fstat(self._file.fileno()).st_size != saved.num_bytes:
                self.close()
                raise SessionError(f"session {path.stem} was just changed by another specchat", hint="try again")

    @property
    def session_id(self) -> str | None:
        """ID of the session; None if the session is not saved."""
        return self.path.stem if self.path else None

    @property
    def is_on_disk(self) -> bool:
        """Whether anything of the session was written."""
        return self._good_bytes > 0

    @property
    def records(self) -> Sequence[ChatRecord]:
        """All records so far."""
        return self._records

    def __call__(self, record: ChatRecord) -> None:
        """Add a record and wait until it is synced to the disk.

        Raises:
            SessionError: the record cannot be written; the chat can continue.
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
                f"cannot save the chat to {self.path}: {error.strerror}; the next turn will try again",
                hint="write a copy elsewhere with /save FILE",
            ) from error

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self) -> None:
        file = self._file = self._file or self._open()
        file.seek(self._good_bytes)
        file.truncate()
        data = b"".join(self._unwritten)
        left = memoryview(data)
        while left:  # a full disk may take a part, and reports its error on the next call only
            left = left[file.write(left) :]
        os.fsync(file.fileno())
        if self._is_new:
            assert self.path is not None
            _sync_folder(self.path.parent)
            self._is_new = False
        self._good_bytes += len(data)
        self._unwritten.clear()

    def _open(self) -> BinaryIO:
        """Open and lock the file.

        Raises:
            SessionError: another specchat process has the file open.
        """
        assert self.path is not None
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SessionError(
                f"session {self.session_id} is open in another specchat", hint="choose another one with --session ID"
            ) from error
        if self._is_new and has_begun(self.path):  # since it was looked for
            file.close()
            raise SessionError(
                f"cannot save the chat to {self.path}: another specchat has begun this session meanwhile",
                hint="write a copy with /save FILE, or choose another name with --session ID",
            )
        return file


def _line(record: ChatRecord, *, is_first: bool, at: datetime | None = None) -> bytes:
    head = {"type": _NAMES[type(record)], **({"version": VERSION} if is_first else {})}
    when = {} if at is None else {"at": at.isoformat(timespec="seconds")}
    values = head | when | asdict(record)
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk; without this a new file in it may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- copies ------------------------------------------------------------------------------------------------------


def export(records: Sequence[ChatRecord], path: Path) -> None:
    """Write a chat to a new file: Markdown if the name ends in .md or .markdown, else JSON lines.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    is_markdown = path.suffix.lower() in MARKDOWN_SUFFIXES
    text = as_markdown(records) if is_markdown else as_json_lines(records)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode())
    except FileExistsError as error:
        raise UsageError(f"{path} already exists", hint="choose another name") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def as_json_lines(records: Iterable[ChatRecord]) -> str:
    """Return the content of the session's file, without the times."""
    return b"".join(_line(record, is_first=i == 0) for i, record in enumerate(records)).decode()


def as_markdown(records: Iterable[ChatRecord]) -> str:
    """Return the chat as Markdown, without the thinking."""
    records = list(records)
    state = state_of(records)
    model = next((r.setup.get("model") for r in reversed(records) if isinstance(r, Opened)), None) or "the model"
    sections = [] if state.system is None else [("System", state.system)]
    for message in state.messages:
        sections.append(("You" if message.role == "user" else str(model), message.content))
    return "\n\n".join(f"**{who}**\n\n{text.strip()}" for who, text in sections) + "\n"
