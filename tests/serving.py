"""A server over a real port, in a thread of the test's process, and clients for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.serving.desk import Desk
from kangaroo_kernels.model.serving.server import Server, bind, url_of


class Served:
    """A server under way.

    Attributes:
        url: of the API, ``/v1`` included.
        address: host and port, for a socket.
        desk: what writes its texts.
    """

    def __init__(self, desk: Desk, key: str | None) -> None:
        self.desk, self.key = desk, key
        listening = bind("127.0.0.1", 0)
        self.url, self.address = url_of(listening), listening.getsockname()
        self._started = threading.Event()
        self.server = Server(desk, key, self._started.set)
        self._thread = threading.Thread(target=self.server.run, args=([listening],))
        self._thread.start()
        assert self._started.wait(30)

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client, which never tries twice."""
        return openai.OpenAI(base_url=self.url, api_key=self.key or "none", max_retries=0, timeout=60, **settings)

    def metrics(self) -> dict[str, float]:
        """Prometheus' page by name and labels."""
        page = self.desk.metrics.page().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in page if line[0] != "#")}

    def stop(self) -> None:
        """End it as a signal does, and wait."""
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def served(
    kangaroo: Kangaroo, parallel: int = 2, queue: int = 8, context: int = 512, key: str | None = None
) -> Iterator[Served]:
    """Serve a model for a while."""
    server = Served(Desk(kangaroo, parallel, queue, context), key)
    try:
        yield server
    finally:
        server.stop()
