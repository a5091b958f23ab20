"""llama.cpp through the package llama-cpp-python, in a process of its own that gets token ids and returns token ids."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from threading import Event
from typing import Any

from specchat.bench.llama_process import POLL_S, START_S, LlamaModel, LlamaProcess
from specchat.errors import ModelError

PACKAGE = "llama-cpp-python"
_MODULE = "llama_cpp"
_WORKER = "specchat.bench.llama_worker"
_READ_BYTES = 1 << 16
_ENDING_S = 5.0


def has_package() -> bool:
    """Return whether llama-cpp-python is installed beside specchat."""
    return find_spec(_MODULE) is not None


class LlamaPython(LlamaProcess):
    """A running process with a model of llama-cpp-python, which has no speculation of llama.cpp's.

    Args:
        model: model, context, threads and limit; without a draft.
        cancel: stops waiting for the model once set; the process may not be ready then, and is asked nothing.

    Raises:
        NotAvailableError: a process that ended early, or memory that cannot be limited.
    """

    def __init__(self, model: LlamaModel, cancel: Event) -> None:
        assert model.draft is None
        settings = {
            "model_path": str(model.file),
            "n_ctx": model.ctx,
            "n_threads": model.threads,
            "n_threads_batch": model.threads,
            "n_gpu_layers": 0 if model.on_cpu else -1,
        }
        command = [sys.executable, "-m", _WORKER, json.dumps(settings)]
        super().__init__(PACKAGE, command, model.limit_bytes, with_pipes=True)
        self._received = b""
        try:
            if self._line(cancel, time.monotonic() + START_S) is None and not cancel.is_set():
                raise self.fail_to_start()
        except BaseException:
            self.close()
            raise

    def complete(self, body: Mapping[str, Any], cancel: Event) -> dict[str, Any] | None:
        """Return the answer to a request in the form of llama.cpp's server; None if `cancel` interrupted it.

        Raises:
            ModelError: the prompt was refused, or the process ended.
        """
        assert self._process.stdin is not None, "started with pipes"
        try:
            self._process.stdin.write(json.dumps(body).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(cancel)
        except OSError as error:
            raise ModelError(f"{PACKAGE} ended: {self.why() or error}") from error
        if cancel.is_set():
            return None
        if line is None:
            raise ModelError(f"{PACKAGE} ended: {self.why()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ModelError(f"{PACKAGE} refused a prompt: {str(found['error'])[:200]}")
        return found

    def _line(self, cancel: Event, deadline: float = float("inf")) -> bytes | None:
        """Return the next line from the process; None if it has ended, was too slow, or `cancel` was set."""
        assert self._process.stdout is not None, "started with pipes"
        while b"\n" not in self._received:
            if cancel.is_set() or time.monotonic() > deadline:
                return None
            if select.select([self._process.stdout], [], [], POLL_S)[0]:
                data = os.read(self._process.stdout.fileno(), _READ_BYTES)
                if not data:  # its log is complete when it has ended
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(_ENDING_S)
                    return None
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line
