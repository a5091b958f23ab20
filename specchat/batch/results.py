"""The results of a job: a file of JSON lines, one for each answered prompt, in order of completion.

Lines are written whole and at once. A job that was interrupted or killed is continued from its file: an incomplete last
line is removed, and prompts that have a line are not answered again. Each line names what its answer depends on, so
results of other prompts or settings are refused instead of mixed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from operator import index
from pathlib import Path
from typing import Any, BinaryIO

from specchat.batch.prompts import PromptLine
from specchat.closing import Closeable
from specchat.errors import SpecchatError, UsageError
from specchat.files import open_regular
from specchat.loading.sampling import SamplingChoices

_DIGITS = 16


@dataclass(frozen=True)
class JobSettings:
    """What the answers of all lines depend on, besides their prompts.

    Attributes:
        model, revision: the target.
        quant, dtype: precision of the target.
        sampling: sampling values of the user; a line may override them.
        seed: seed of the first line; later lines add their distance to the first one.
        max_tokens: most tokens of an answer, or None.
        stops: texts that end an answer.
        system: system prompt of lines without one, or None.
        thinking: value of the chat template's thinking switch, or None for its default.
        base: whether prompts are continued without a chat template.
    """

    model: str
    revision: str | None
    quant: str
    dtype: str
    sampling: SamplingChoices = field(default_factory=SamplingChoices)
    seed: int = 0
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    system: str | None = None
    thinking: bool | None = None
    base: bool = False

    @property
    def digest(self) -> str:
        """Short digest of all settings."""
        return _digest(asdict(self))


def line_digest(line: PromptLine) -> str:
    """Return a short digest of everything that a line asks for."""
    return _digest(asdict(line))


class Results(Closeable):
    """The file of results, open for more.

    Args:
        path: file, created if it is missing.
        settings: digest of the job's settings.
        lines: digest of each line of the job, by number.

    Attributes:
        finished: numbers of the lines that have a result.
        num_failed: number of results that are errors.

    Raises:
        UsageError: the file holds something else, or results of other prompts or settings, or is being written.
        SpecchatError: the file cannot be read or written.
    """

    def __init__(self, path: Path, settings: str, lines: Mapping[int, str]) -> None:
        self._path = path
        self._settings = settings
        self._lines = lines
        self.finished: set[int] = set()
        self.num_failed = 0
        try:
            self._file = _open_locked(path)
        except OSError as error:
            raise SpecchatError(f"-o cannot write {path}: {error.strerror}") from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file.

        Raises:
            SpecchatError: a result that could not be written before cannot be written now, either.
        """
        try:
            self._file.close()
        except OSError as error:
            raise self._not_written(error) from error

    def add(self, line: PromptLine, values: Mapping[str, Any]) -> None:
        """Write one line, visible to others at once.

        Raises:
            SpecchatError: the file cannot be written, for example on a full disk.
        """
        keys = {"settings": self._settings, "request": self._lines[line.number]}
        text = json.dumps({"id": line.id, "line": line.number, **values, **keys}, ensure_ascii=False)
        try:
            self._file.write(f"{text}\n".encode())
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from error
        self._count(line.number, values)

    def _not_written(self, error: OSError) -> SpecchatError:
        hint = "the same command goes on with the file, once it can be written"
        return SpecchatError(f"cannot write {self._path}: {error.strerror}", hint=hint)

    def _count(self, number: int, values: Mapping[str, Any]) -> None:
        self.finished.add(number)
        self.num_failed += "error" in values

    def _read(self) -> None:
        """Count the results in the file, and cut off an incomplete last line."""
        self._file.seek(0)
        end = 0
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n"):
                break  # written when the program was killed
            self._check(number, text)
            end += len(text)
        self._file.truncate(end)
        self._file.seek(end)

    def _check(self, number: int, text: bytes) -> None:
        try:
            values = json.loads(text)
            line, settings, request = index(values["line"]), values["settings"], values["request"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"line {number} of {self._path} is no result of specchat", hint="use another file for -o"
            ) from error
        if settings != self._settings:
            raise self._refused("settings", "use the same flags as before (--quant and --dtype name a precision)")
        if self._lines.get(line) != request:
            raise self._refused("prompts", "use the same prompts as before")
        if line in self.finished:
            raise UsageError(f"{self._path} has two results of line {line}", hint="use another file for -o")
        self._count(line, values)

    def _refused(self, what: str, remedy: str) -> UsageError:
        return UsageError(f"{self._path} has results of other {what}", hint=f"{remedy}, or another file for -o")


def first_settings(path: Path) -> str | None:
    """Return the digest of the settings of a file's first result; None without a file or a result."""
    try:
        with open_regular(path) as file:
            settings = json.loads(file.readline())["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # if the file is no file of results, `Results` says why
    return settings if isinstance(settings, str) else None


def _open_locked(path: Path) -> BinaryIO:
    """Open a file for reading and writing, and lock it against other processes.

    Raises:
        UsageError: another process writes the file.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a device may never end
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    file = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(f"another specchat writes {path}", hint="wait for it, or use another file for -o") from error
    return file


def left_of(lines: Collection[PromptLine], results: Results) -> list[PromptLine]:
    """Return the lines that have no result yet, in order."""
    return [line for line in lines if line.number not in results.finished]


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGITS]
