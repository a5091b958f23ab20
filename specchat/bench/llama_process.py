"""A process of llama.cpp: started in a memory control group if memory is limited, with a log that says why it ended."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from specchat.closing import Closeable
from specchat.errors import NotAvailableError
from specchat.hardware.memory_group import MemoryGroup

START_S = 600.0  # until a model must have been loaded
POLL_S = 0.1
_LOG_LINES = 3
_END_S = 10.0


@dataclass(frozen=True)
class LlamaModel:
    """What llama.cpp runs.

    Attributes:
        file: GGUF file, the first of a split set.
        ctx: context in tokens.
        threads: number of threads that compute.
        on_cpu: whether no layer may be computed by a GPU.
        draft: GGUF file of a draft model, or None.
        limit_bytes: limit of memory and page cache, or None.
    """

    file: Path
    ctx: int
    threads: int
    on_cpu: bool = True
    draft: Path | None = None
    limit_bytes: int | None = None


class LlamaProcess(Closeable):
    """A process that has loaded or is loading a model.

    It ends when the thread that started it ends, however that happens, if the system has util-linux's setpriv.

    Args:
        name: name for messages.
        command: program with its arguments.
        limit_bytes: limit of memory and page cache, or None.
        with_pipes: whether the process is spoken to through its input and output.
    """

    def __init__(self, name: str, command: Sequence[str], limit_bytes: int | None, *, with_pipes: bool = False) -> None:
        self.name = name
        self._is_limited = limit_bytes is not None
        with ExitStack() as undo:
            self._log = undo.enter_context(tempfile.TemporaryFile())
            if limit_bytes is not None:
                command = undo.enter_context(MemoryGroup(limit_bytes)).command(command)
            setpriv = shutil.which("setpriv")
            if setpriv is not None:
                command = [setpriv, "--pdeathsig", "KILL", *command]
            stream = subprocess.PIPE if with_pipes else subprocess.DEVNULL
            self._process = subprocess.Popen(
                command,
                stdin=stream,
                stdout=stream,
                stderr=self._log,
                process_group=0,  # a terminal sends Ctrl-C to the whole group of the foreground
            )
            undo.callback(self._stop)
            self._undo = undo.pop_all()

    @abstractmethod
    def complete(self, body: Mapping[str, Any], cancel: Event) -> dict[str, Any] | None:
        """Return the answer to a request in the form of llama.cpp's server; None if `cancel` interrupted it."""

    def close(self) -> None:
        """End the process."""
        self._undo.close()

    def has_ended(self) -> bool:
        """Return whether the process has ended by itself."""
        return self._process.poll() is not None

    def why(self) -> str:
        """Return the last lines of the log that are errors, or of all."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return "; ".join((errors or lines)[-_LOG_LINES:])

    def fail_to_start(self) -> NotAvailableError:
        """Return the error for a process that has loaded no model."""
        if self._is_limited and self._process.poll() in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return NotAvailableError(
                f"{self.name} needs more memory than the limit to load this file", hint="use a larger --limit-memory"
            )
        return NotAvailableError(
            f"{self.name} did not start: {self.why() or 'it took too long'}",
            hint="leave the baseline out, or update llama.cpp",
        )

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a request that was not taken
                    pipe.close()
