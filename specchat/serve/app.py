"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from specchat.chat.answer import Answer
from specchat.records import generation
from specchat.serve.access import Access
from specchat.serve.asked import Asked, read_chat, read_completion, read_object
from specchat.serve.errors import ApiError, internal
from specchat.serve.fields import Fields
from specchat.serve.objects import ChatObjects, ServedModel, TextObjects
from specchat.serve.preparing import Preparer
from specchat.serve.streams import EventStream, Mailbox, ending_with_client
from specchat.serve.worker import AnswerWorker, Job

MOST_BODY_BYTES = 8 << 20
_CLIENT_LEFT = 499  # never sent: the client is gone
_RETRY_AFTER_S = "1"


class Api:
    """The endpoints of one model.

    Args:
        model: model of the server.
        preparer: maker of requests for the engine.
        worker: thread that answers the requests.
        access: rules of access.
        warn: receives one line about an internal error.
    """

    def __init__(
        self,
        model: ServedModel,
        preparer: Preparer,
        worker: AnswerWorker,
        access: Access,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._model = model
        self._preparer = preparer
        self._worker = worker
        self._access = access
        self._warn = warn
        # A long prompt takes a while to tokenize; one thread, because tokenizers are not made for several.
        self._preparing = ThreadPoolExecutor(1, "prepare")

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self._endpoint(self._health, needs_key=False)),
            Route("/v1/models", self._endpoint(self._models)),
            Route("/v1/models/{name:path}", self._endpoint(self._model_named)),
            Route("/v1/chat/completions", self._endpoint(self._chat), methods=["POST"]),
            Route("/v1/completions", self._endpoint(self._completion), methods=["POST"]),
        ]
        origins = self._access.origins
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        handlers: dict[Any, Any] = {HTTPException: self._no_such_endpoint}
        return Starlette(routes=routes, middleware=[cors] if origins else [], exception_handlers=handlers)

    # --- endpoints -----------------------------------------------------------------------------------------------

    async def _health(self, _request: Request) -> Response:
        worker = self._worker
        return JSONResponse({"status": "ok", "answering": worker.num_answering, "waiting": worker.num_waiting})

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model.as_object()]})

    async def _model_named(self, request: Request) -> Response:
        if not (name := request.path_params["name"]):
            return await self._models(request)
        self._check_model(name)
        return JSONResponse(self._model.as_object())

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    # --- answers -------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, read: Callable[[Fields], Asked]) -> Response:
        body = await _body(request)
        asked, engine_request, answer = await asyncio.get_running_loop().run_in_executor(
            self._preparing, self._prepared, body, read
        )
        mailbox = Mailbox()
        job = Job(engine_request, answer, mailbox.post)
        self._worker.submit(job)
        kind = ChatObjects if asked.is_chat else TextObjects
        objects = kind(self._model.id, includes_usage=asked.streams and asked.includes_usage)
        if asked.streams:
            return EventStream(job, mailbox, objects, includes_usage=asked.includes_usage)
        async with ending_with_client(request.receive, job.cancel):
            ended = await mailbox.until_end()
        if ended.error is not None:
            raise ended.error
        if answer.finish_reason is None:
            raise ClientDisconnect
        return JSONResponse(objects.whole(job))

    def _prepared(self, body: bytes, read: Callable[[Fields], Asked]) -> tuple[Asked, generation.Request, Answer]:
        asked = read(read_object(body))
        self._check_model(asked.model)
        return asked, *self._preparer.prepare(asked)

    def _check_model(self, name: str | None) -> None:
        """Refuse a name of another model."""
        if name and name not in self._model.names:
            message = f"the model {name!r} does not exist; this server has {self._model.id!r}"
            raise ApiError(404, message, "model_not_found", "model")

    # --- errors --------------------------------------------------------------------------------------------------

    def _endpoint(
        self, handle: Callable[[Request], Awaitable[Response]], *, needs_key: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that checks access and turns every error into OpenAI's error object."""

        async def endpoint(request: Request) -> Response:
            try:
                self._access.check_origin(request)
                if needs_key:
                    self._access.check_key(request)
                return await handle(request)
            except ApiError as error:
                return _error_response(error)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)
            except Exception as error:  # noqa: BLE001  a client gets no traceback, and the server goes on
                self._warn(f"a request failed: {type(error).__name__}: {error}")
                return _error_response(internal())

        return endpoint

    async def _no_such_endpoint(self, request: Request, error: HTTPException) -> Response:
        """Answer a path or a method that does not exist."""
        where = f"{request.method} {request.url.path}"
        text = f"there is no {where}; the API is below /v1, as in POST /v1/chat/completions"
        response = _error_response(ApiError(error.status_code, text, "not_found"))
        response.headers.update(error.headers or {})
        return response


async def _body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        ApiError: the body is too large.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BODY_BYTES >> 20} MiB", "body_too_large")
    return bytes(body)


def _error_response(error: ApiError) -> Response:
    headers = {"Retry-After": _RETRY_AFTER_S} if error.status == 429 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.as_object(), error.status, headers)
