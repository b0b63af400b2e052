"""The endpoints: OpenAI's models, completions and chat completions, and what watches a server asks for."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ..request import Request
from ..results import Generation
from .answers import Answer
from .desk import Desk
from .parameters import Asked, check_model, read_parameters
from .refused import RefusedError
from .transport import EventStream, GoneError, check_key, read_json, reply, while_connected

TOKENIZING_THREADS = 4
"""Beside a thread for each text's steps, so that texts go on while long prompts come in."""

CLIENT_GONE = 499
"""The status of a response that nobody reads; nginx's number."""


def make_app(desk: Desk, key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        desk: writes the texts.
        key: what clients must send; None serves everyone. ``/health`` and ``/metrics`` need none.
    """
    created, name = int(time.time()), desk.kangaroo.name
    model = {"id": name, "object": "model", "created": created, "owned_by": "kangaroo-kernels"}

    @asynccontextmanager
    async def threads(app: FastAPI) -> AsyncIterator[None]:
        """A step waits for its turn in a thread, so every session needs one. Tokenizing must not take it."""
        with ThreadPoolExecutor(desk.pool.parallel) as steps, ThreadPoolExecutor(TOKENIZING_THREADS) as tokenizing:
            asyncio.get_running_loop().set_default_executor(steps)
            app.state.tokenizing = tokenizing
            yield

    app = FastAPI(title="Kangaroo", lifespan=threads, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        if desk.gpu_lost:
            return reply({"status": "the GPU has failed; start the server again"}, 503)
        return reply({"status": "closing"}, 503) if desk.pool.closed else reply({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: HTTPRequest) -> Response:
        check_key(request, key)
        return reply({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def one_model(request: HTTPRequest, asked: str) -> Response:
        check_key(request, key)
        check_model(asked, name)
        return reply(model)

    @app.post("/v1/completions")
    async def completions(request: HTTPRequest) -> Response:
        check_key(request, key)
        return await answer(desk, request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HTTPRequest) -> Response:
        check_key(request, key)
        return await answer(desk, request, chat=True)

    refuse_in_openais_form(app, desk)
    return app


async def answer(desk: Desk, http: HTTPRequest, chat: bool) -> Response:
    """Answer a request for a text, whole or as a stream."""
    asked = read_parameters(await read_json(http), desk.kangaroo.name, chat, desk.context)
    desk.admit()
    request = await asyncio.get_running_loop().run_in_executor(http.app.state.tokenizing, desk.resolve, asked)
    form = Answer(chat, desk.kangaroo.name, request, desk.kangaroo.tokenizer)
    if asked.stream:
        return EventStream(events(desk, asked, request, form))
    return reply(form.whole(await while_connected(http.receive, whole(desk, request))))


async def whole(desk: Desk, request: Request) -> Generation:
    """The text, written to its end; there is always a step."""
    async with aclosing(desk.write(request)) as steps:
        async for step in steps:
            last = step
    return last.generation


async def events(desk: Desk, asked: Asked, request: Request, form: Answer) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream. An error behind the first of them is an event of its own, and the last."""
    last = None
    try:
        async with aclosing(desk.write(request)) as steps:
            async for step in steps:
                for chunk in form.chunks(step, first=last is None):
                    yield chunk
                last = step
    except RefusedError as refusal:
        if last is None:
            raise
        yield refusal.as_dict()
        return
    assert last is not None
    for chunk in form.last_chunks(last.generation, asked.include_usage):
        yield chunk


def refuse_in_openais_form(app: FastAPI, desk: Desk) -> None:
    """Whatever goes wrong is told as OpenAI's API would tell it."""

    @app.exception_handler(RefusedError)
    async def refused(request: HTTPRequest, refusal: RefusedError) -> Response:
        if refusal.status < 500:
            desk.refused()
        return reply(refusal.as_dict(), refusal.status, refusal.retry_after)

    @app.exception_handler(HTTPException)
    async def unknown(request: HTTPRequest, error: HTTPException) -> Response:
        desk.refused()
        sentence = f"{request.method} {request.url.path} is not served here ({error.detail})."
        return reply(RefusedError(sentence, error.status_code).as_dict(), error.status_code)

    @app.exception_handler(ClientDisconnect)
    async def left(request: HTTPRequest, error: ClientDisconnect) -> Response:
        desk.left()
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(GoneError)
    async def gone(request: HTTPRequest, error: GoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failed(request: HTTPRequest, error: Exception) -> Response:
        return reply(RefusedError("the server made a mistake; its log has it.", 500).as_dict(), 500)
