"""The llama.cpp baseline: its own server, or llama-cpp-python, on the same GGUF file, asked for tokens by token ids.

llama.cpp is a process of its own: it maps the file, and gets the same context and number of threads, and if memory is
limited a control group of the same size. Its activations are 8-bit numbers for most types of blocks, so greedy texts
may differ at near-ties.
"""

from __future__ import annotations

import http.client
import json
import select
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

from specchat.bench.llama_process import POLL_S, START_S, LlamaModel, LlamaProcess
from specchat.bench.llama_python import PACKAGE, LlamaPython, has_package
from specchat.bench.records import AnswerRecord, Request
from specchat.errors import ModelError, NotAvailableError

PROGRAM = "llama-server"
PLAIN, WITH_DRAFT = "llama.cpp", "llama.cpp-draft"
# Baselines by name, with the options of the server that make it speculate.
LLAMA_CPP: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "llama.cpp-ngram": ("--spec-type", "ngram-cache"),
    WITH_DRAFT: ("--spec-type", "draft-simple"),
}


def find_llama(names: Sequence[str]) -> str:
    """Return what runs the baselines of llama.cpp: its server on PATH, else llama-cpp-python.

    `llama-cli` takes no token ids and is not used.

    Args:
        names: names of the baselines, at least one.

    Raises:
        NotAvailableError: neither one installed, or llama-cpp-python alone, which has no speculation of llama.cpp's.
    """
    if shutil.which(PROGRAM) is not None:
        return PROGRAM
    speculating = [name for name in names if name != PLAIN]
    if has_package() and not speculating:
        return PACKAGE
    raise NotAvailableError(
        f"the baseline '{(speculating or [PLAIN])[0]}' needs {PROGRAM}, which is not on PATH"
        + ("" if speculating else f", or {PACKAGE}, which is not installed"),
        hint="build or install llama.cpp, and add the folder of its programs to PATH"
        + ("" if speculating else f"; or 'pip install {PACKAGE}'"),
    )


def start_llama(name: str, model: LlamaModel, cancel: Event) -> LlamaProcess:
    """Load a model for a baseline.

    Args:
        name: name of the baseline.
        model: model, context, threads and limit.
        cancel: stops waiting for the model once set.

    Raises:
        NotAvailableError: a missing program, one that ended early, or memory that cannot be limited.
    """
    if find_llama([name]) == PACKAGE:
        return LlamaPython(model, cancel)
    return LlamaServer(model, LLAMA_CPP[name], cancel)


class LlamaServer(LlamaProcess):
    """A running server of llama.cpp.

    Args:
        model: model, context, threads and limit.
        options: options that make the server speculate; empty for plain decoding.
        cancel: stops waiting for the server once set; the server may not be ready then, and is asked nothing.

    Raises:
        NotAvailableError: a program that ended early, or memory that cannot be limited.
    """

    def __init__(self, model: LlamaModel, options: Sequence[str], cancel: Event) -> None:
        self._port = _free_port()
        super().__init__(PROGRAM, [PROGRAM, *_arguments(model, self._port), *options], model.limit_bytes)
        try:
            self._wait_until_ready(cancel)
        except BaseException:
            self.close()
            raise

    def complete(self, body: Mapping[str, Any], cancel: Event) -> dict[str, Any] | None:
        """Return the server's answer to a request for a completion; None if `cancel` interrupted it.

        Raises:
            ModelError: the server refused the request or ended.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            while not select.select([connection.sock], [], [], POLL_S)[0]:
                if cancel.is_set():  # the server stops when the connection closes
                    return None
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ModelError(f"{PROGRAM} ended: {self.why() or error}") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ModelError(f"{PROGRAM} refused a prompt: {text.decode(errors='replace')[:200]}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _wait_until_ready(self, cancel: Event) -> None:
        deadline = time.monotonic() + START_S
        while not cancel.is_set() and not self._is_ready():
            if self.has_ended() or time.monotonic() > deadline:
                raise self.fail_to_start()
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class LlamaSystem:
    """The system of llama.cpp.

    Args:
        name: name in the report.
        server: running llama.cpp.
        before_answer: function called before every answer; its time is not counted.
        clock: clock in seconds.
    """

    is_keyed = False

    def __init__(
        self,
        name: str,
        server: LlamaProcess,
        before_answer: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self._server = server
        self._before_answer = before_answer
        self._clock = clock
        self._keeps = False

    def begin(self) -> None:
        """Begin a new conversation: the first prompt is computed from its beginning."""
        self._keeps = False

    def answer(self, request: Request, cancel: Event) -> AnswerRecord | None:
        """Return the answer of llama.cpp."""
        self._before_answer()
        begin = self._clock()
        found = self._server.complete(_body(request, keeps=self._keeps), cancel)
        spent_s = self._clock() - begin
        self._keeps = True
        return None if found is None else _record(found, request, spent_s)


def _arguments(model: LlamaModel, port: int) -> list[str]:
    """Return the server's options: one conversation, no cache beside its context, nothing that changes the context."""
    given = {
        "--model": str(model.file),
        "--ctx-size": str(model.ctx),
        "--threads": str(model.threads),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--parallel": "1",
        "--cache-ram": "0",
        "--fit": "off",
    }
    if model.on_cpu:
        given["--n-gpu-layers"] = "0"
    if model.draft is not None:
        given["--model-draft"] = str(model.draft)
    words = [word for pair in given.items() for word in pair]
    # Repacked weights are a copy in memory, which a limit below the file's size has no room for.
    return [*words, "--no-repack"] if model.limit_bytes is not None else words


def _body(request: Request, *, keeps: bool) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "prompt": list(request.prompt_ids),
        "n_predict": request.max_tokens,
        "return_tokens": True,
        "cache_prompt": keeps,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
    }


def _record(found: Mapping[str, Any], request: Request, spent_s: float) -> AnswerRecord:
    """Return the record of an answer, cut after its first stop token.

    The server reports the seconds between its first and its last token. Each pass of the model emits one token and the
    draft's accepted ones.

    Raises:
        ModelError: the answer has no tokens.
    """
    tokens, timings = [int(token) for token in found.get("tokens") or ()], found.get("timings") or {}
    if not tokens:
        raise ModelError("llama.cpp returned no tokens", hint="update llama.cpp: it must support return_tokens")
    decode_s = min(float(timings.get("predicted_ms", 0.0)) / 1e3, spent_s)
    num_passes = max(len(tokens) - int(timings.get("draft_n_accepted") or 0), 1)
    end = next((i + 1 for i, token in enumerate(tokens) if token in request.stop_ids), None)
    return AnswerRecord(
        token_ids=tuple(tokens[:end]),
        finish_reason="length" if end is None else "stop",
        ttft_s=spent_s - decode_s,
        decode_s=decode_s,
        num_passes=num_passes,
        first_tokens=1,
        cached_tokens=int(timings.get("cache_n") or 0),
    )


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port
