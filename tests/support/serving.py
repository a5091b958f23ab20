"""A server in this process, on a free port of the loopback address, and raw requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.plan import Plan
from specchat.serve.access import Access
from specchat.serve.app import Api
from specchat.serve.errors import ApiError
from specchat.serve.http import HttpServer, address_of, bound_socket, start_listening, url_of
from specchat.serve.objects import ServedModel
from specchat.serve.preparing import Preparer, ServerDefaults
from specchat.serve.worker import AnswerWorker, Job


@dataclass
class Served:
    """A running server.

    Attributes:
        url: base URL, as clients name it.
        port: its port.
        server: the HTTP server.
        worker: the thread of the engine.
        submitted: every job that came.
        ended: every job that ended, with its error.
        warnings: all warnings.
    """

    url: str
    port: int
    server: HttpServer
    worker: AnswerWorker
    submitted: list[Job] = field(default_factory=list)
    ended: list[tuple[Job, ApiError | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """Send a body, which is encoded as JSON unless it is bytes."""
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def chat(self, text: str, **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for another thread, so long that only a broken server fails."""
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("the server does not get there")


@dataclass(frozen=True)
class Reply:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which has exactly OpenAI's fields."""
        (error,) = self.json.values()
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
        return error

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = self.body.decode("ascii").split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        lines = [each for each in events if not each.startswith(":")]
        assert all(each.startswith("data: {") and "\n" not in each for each in lines)
        return [json.loads(each.removeprefix("data: ")) for each in lines]


def text_of(events: list[dict[str, Any]]) -> str:
    """The text of a stream."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(each["text"] if "text" in each else each["delta"].get("content", "") for each in choices)


@contextmanager
def serving(
    engine: Any,
    tokenizer: Any,
    plan: Plan,
    *,
    vocab_size: int,
    model_defaults: GenerationDefaults,
    access: Access = Access(),  # noqa: B008
    most_waiting: int = 64,
    defaults: ServerDefaults = ServerDefaults(),  # noqa: B008
) -> Iterator[Served]:
    """Serve an engine until the end of the context."""
    stop_ids = model_defaults.stop_ids | {tokenizer.eos_token_id}
    preparer = Preparer(tokenizer, model_defaults, stop_ids, plan, vocab_size, defaults)
    model = ServedModel("org/tiny", frozenset({"org/tiny", "tiny"}), plan.work.ctx, 1)
    submitted: list[Job] = []
    ended: list[tuple[Job, ApiError | None]] = []
    warnings: list[str] = []
    note: Callable[[Job, ApiError | None], None] = lambda job, error: ended.append((job, error))  # noqa: E731
    worker = AnswerWorker(engine, most_waiting=most_waiting, observe=note, warn=warnings.append)
    submit = worker.submit

    def noted(job: Job) -> None:
        submit(job)
        submitted.append(job)

    worker.submit = noted  # type: ignore[method-assign]
    with worker, bound_socket("127.0.0.1", 0) as bound:
        worker.start()
        server = HttpServer(Api(model, preparer, worker, access, warnings.append).app(), worker.stop)
        start_listening(bound)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Served(url_of(bound), address_of(bound)[1], server, worker, submitted, ended, warnings)
        finally:
            server.should_exit = True
            thread.join()


class Gate:
    """Holds an engine before each of its passes, and counts them.

    A test lets single passes through, so that it knows what happens between two of them.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._is_open, self._is_held, self._num_allowed = True, False, 0
        self.num_passes = 0

    def __call__(self) -> None:
        """Wait before a pass; called in the engine's thread."""
        with self._change:
            if not self._is_open:
                self._is_held = True
                self._change.notify_all()
                self._change.wait_for(lambda: self._is_open or self._num_allowed > 0)
                self._is_held, self._num_allowed = False, 0
                self._change.notify_all()
            self.num_passes += 1

    def close(self) -> None:
        """Hold all later passes."""
        self._is_open = False

    def wait(self) -> None:
        """Wait until a pass is held."""
        with self._change:
            self._change.wait_for(lambda: self._is_held)

    def let_through(self) -> None:
        """Let the held pass run."""
        with self._change:
            self._num_allowed = 1
            self._change.notify_all()
            self._change.wait_for(lambda: not self._is_held)

    def open(self) -> None:
        """Let the held pass and all later ones run."""
        with self._change:
            self._is_open = True
            self._change.notify_all()
