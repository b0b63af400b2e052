"""The server itself: its address, its beginning and its end."""

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..errors import KangarooError
from .app import make_app
from .desk import Desk

GRACE = 30.0
"""Seconds that texts have to come to their end once the server is told to stop."""

FAREWELL = 2.0
"""Seconds that the sentences which end those texts have to be sent; then the server hangs up on all clients."""

TICK = 0.1
"""Seconds between two looks at what the signal handler has set, as in uvicorn's own loops."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one.

    Raises:
        KangarooError: the address is taken, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise KangarooError(f"the server cannot listen at {host}, port {port} ({error}); give another one.") from error


def reaches_out(listening: socket.socket) -> bool:
    """Whether other machines may reach the socket."""
    return not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """What a client on this machine calls."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}/v1" if address.version == 6 and host != "localhost" else f"http://{host}:{port}/v1"


class Server(uvicorn.Server):
    """Serves until it is told to stop (SIGINT, SIGTERM).

    Then no further text begins, those that wait are refused, and those under way have ``GRACE`` seconds, or until a
    second Ctrl-C; what is left ends with a sentence. ``FAREWELL`` seconds later the server hangs up on every client
    that has not sent its request or not taken its answer. Only steps under way are waited for.

    Args:
        desk: writes the texts.
        key: what clients must send; None serves everyone.
        started: called once clients are answered.
    """

    def __init__(self, desk: Desk, key: str | None, started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(make_app(desk, key), log_config=None, access_log=False, server_header=False, ws="none")
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._desk, self._tell, self._hurried = desk, started, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; the second time, without the grace.

        uvicorn's own method would have requests cancelled, each with a traceback in the log, and would raise the signal
        once more after a clean end.
        """
        self._hurried = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let texts come to their end, for a while."""
        self._desk.pool.close()
        ending = asyncio.create_task(self._end_what_is_left())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_what_is_left(self) -> None:
        over = time.monotonic() + GRACE
        while time.monotonic() < over and not self._hurried:
            await asyncio.sleep(TICK)
        self._desk.pool.ended = True
        await asyncio.sleep(FAREWELL)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # to the request it looks as if its client had gone, and so it ends
