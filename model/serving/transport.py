"""HTTP below the endpoints: bodies that are bounded, events, keys, and clients that go away."""

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .refused import RefusedError

Result = TypeVar("Result")

MOST_BYTES = 8 << 20
"""Of a body: more than any prompt has that a context of a million tokens holds."""

STALLED = 60.0
"""Seconds after which a client is given up that takes nothing of its stream, or whose body is not complete."""


class GoneError(Exception):
    """The client closed its connection before the answer was there."""


async def read_json(request: Request) -> Any:
    """A request's body.

    Raises:
        RefusedError: it is too large, too late, or no JSON.
        ClientDisconnect: its client went away before it was there.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a page in a browser may send other types to any address without asking
        raise RefusedError("the body must be JSON; add the header 'Content-Type: application/json'.", status=415)
    try:
        return json.loads(await asyncio.wait_for(_body(request), STALLED))
    except asyncio.TimeoutError as error:
        raise RefusedError(f"the body was not complete after {STALLED:g} seconds; send it at once.", 408) from error
    except (ValueError, RecursionError) as error:
        raise RefusedError("the body is no valid JSON.", code="invalid_json") from error


async def _body(request: Request) -> bytearray:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise RefusedError(f"the body has more than {MOST_BYTES} bytes; send a shorter prompt.", status=413)
    return body


def check_key(request: Request, key: str | None) -> None:
    """Raise unless the request has the server's key; how long this takes does not tell where a wrong key differs."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        raise RefusedError(
            "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'.", 401, code="invalid_api_key"
        )


def reply(body: dict[str, Any], status: int = 200, retry_after: int | None = None) -> Response:
    """A JSON response; what a client sent may come back in it, whatever characters that has."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 408:
        headers["Connection"] = "close"  # nobody reads the rest of the body
    return Response(json.dumps(body), status, headers, media_type="application/json")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work; it is cancelled, and waited for, when the client goes away or the caller is cancelled.

    Raises:
        GoneError: the client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        gone.cancel()
        if task.cancel():
            await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, each JSON. The response begins with the first event, so errors before it have a status.

    Args:
        events: closed when the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events to an ASGI server; nobody is told that the client has gone."""
        with suppress(GoneError):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        begun = False
        async with aclosing(self.events) as events:
            async for event in events:
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    begun = True
                await self._put(send, json.dumps(event))
        await self._put(send, "[DONE]", more=False)

    async def _put(self, send: Send, data: str, more: bool = True) -> None:
        body = f"data: {data}\n\n".encode()
        sending = asyncio.ensure_future(send({"type": "http.response.body", "body": body, "more_body": more}))
        try:  # wait_for could swallow a cancellation that comes at the moment in which the event is taken
            await asyncio.wait({sending}, timeout=STALLED)
            if not sending.done():
                raise GoneError
            sending.result()
        finally:
            sending.cancel()
