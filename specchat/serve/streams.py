"""Answers on their way to a client: from the engine's thread to the event loop, and as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from threading import Event
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from specchat.chat.answer import Delta
from specchat.serve.objects import AnswerObjects
from specchat.serve.worker import Ended, Job

_DONE = "data: [DONE]\n\n"
# Between two events, proxies and clients wait about a minute. A comment keeps them waiting for a slow model.
_COMMENT, _COMMENT_AFTER_S = ": waiting\n\n", 15.0


class Mailbox:
    """The records of one answer: the engine's thread posts them, the event loop reads them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._records: asyncio.Queue[Delta | Ended] = asyncio.Queue()

    def post(self, record: Delta | Ended) -> None:
        """Add a record; called in any thread, also after the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._records.put_nowait, record)

    async def next(self, timeout_s: float | None = None) -> Delta | Ended | None:
        """Wait for the next record; return None if there is none in time."""
        try:
            return await asyncio.wait_for(self._records.get(), timeout_s)
        except TimeoutError:
            return None

    async def until_end(self) -> Ended:
        """Wait for the end of the answer."""
        while not isinstance(record := await self.next(), Ended):
            pass
        return record


@asynccontextmanager
async def ending_with_client(receive: Receive, cancel: Event) -> AsyncIterator[None]:
    """Set `cancel` as soon as the client disconnects, and at the end of the context."""
    watcher = asyncio.create_task(_set_on_disconnect(receive, cancel))
    try:
        yield
    finally:
        watcher.cancel()
        cancel.set()


async def _set_on_disconnect(receive: Receive, cancel: Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel.set()


class EventStream(StreamingResponse):
    """An answer as server-sent events, which ends the answer when the client leaves.

    Args:
        job: answer.
        mailbox: records of the answer.
        objects: makes the chunks.
        includes_usage: whether the token counts come at the end.
    """

    def __init__(self, job: Job, mailbox: Mailbox, objects: AnswerObjects, *, includes_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(job, mailbox, objects, includes_usage=includes_usage)
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._cancel = job.cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with ending_with_client(receive, self._cancel):
            await self.stream_response(send)


async def _events(job: Job, mailbox: Mailbox, objects: AnswerObjects, *, includes_usage: bool) -> AsyncIterator[str]:
    """Yield the events of an answer, or comments while there are none."""
    if (first := objects.first()) is not None:
        yield _event(first)
    while not isinstance(record := await mailbox.next(_COMMENT_AFTER_S), Ended):
        if record is None:
            yield _COMMENT
        elif (piece := objects.piece(record)) is not None:
            yield _event(piece)
    if record.error is not None:
        yield _event(record.error.as_object())
    elif job.answer.finish_reason is not None:  # else the client has left
        yield _event(objects.last(job))
        if includes_usage:
            yield _event(objects.counts(job))
    yield _DONE


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, separators=(',', ':'))}\n\n"
