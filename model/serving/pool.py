"""Sessions of one loaded model, each lent to one text at a time, and the queue of those that wait for one."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

from ..kangaroo import Kangaroo
from ..session import Session
from .refused import RefusedError, closing

NEWEST = 0.1
"""The newest text's share in the mean duration of a text."""

KINDS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9})
"""Greedy, sampled, filtered: on a GPU each has kernels and graphs of its own."""


class Pool:
    """Lends sessions. All of its methods are called from the event loop's thread.

    Args:
        kangaroo: the model.
        parallel: how many sessions there are, and so how many texts grow side by side.
        queue: how many texts may wait for a session; further ones are refused.
        context: the most tokens of a text. Every session has room for so many from the beginning on.

    Attributes:
        free: sessions without a text; the one that has been free longest comes first.
        closed: whether no text begins any more.
        ended: whether texts that are being written shall end where they are.
    """

    def __init__(self, kangaroo: Kangaroo, parallel: int, queue: int, context: int) -> None:
        self.parallel, self.queue = parallel, queue
        self.free = [roomy_session(kangaroo, context) for _ in range(parallel)]
        self.closed = self.ended = False
        self._waiting: deque[asyncio.Future[Session]] = deque()
        self._seconds = 1.0  # a text's mean duration, which says when another attempt makes sense

    @property
    def waiting(self) -> int:
        """How many texts wait for a session."""
        return sum(not each.done() for each in self._waiting)

    @property
    def running(self) -> int:
        """How many texts are being written."""
        return self.parallel - len(self.free)

    @asynccontextmanager
    async def session(self, tokens: Sequence[int]) -> AsyncIterator[Session]:
        """A session for a text that begins with ``tokens``; first come, first served.

        Raises:
            RefusedError: the queue is full, or the server shuts down.
        """
        session = await self._take(tokens)
        began = time.monotonic()
        try:
            yield session
        finally:
            self._seconds += NEWEST * (time.monotonic() - began - self._seconds)
            self._give_back(session)

    def close(self) -> None:
        """Let no further text begin; those that wait are refused."""
        self.closed = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(closing())

    def check_room(self) -> None:
        """Raise unless a text that comes now is written or may wait.

        Raises:
            RefusedError: the queue is full, or the server shuts down.
        """
        if self.closed:
            raise closing()
        if not self.free and self.waiting >= self.queue:
            seconds = max(1, math.ceil(self._seconds * (self.waiting + 1) / self.parallel))
            raise RefusedError(
                f"the server is busy: {self.parallel} texts are being written and {self.waiting} wait; try again in "
                f"{seconds} seconds.",
                status=503,
                code="queue_full",
                retry_after=seconds,
            )

    async def _take(self, tokens: Sequence[int]) -> Session:
        self.check_room()
        if self.free:
            session = choose(self.free, tokens)
            self.free.remove(session)
            return session
        turn: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back(turn.result())  # it came at the moment in which its client left
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _give_back(self, session: Session) -> None:
        """Lend it to the one that has waited longest, or keep it."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(session)
                return
        self.free.append(session)


def roomy_session(kangaroo: Kangaroo, context: int) -> Session:
    """A session that has begun a text of the longest length: its memory does not grow any more.

    What is measured once, and what a GPU compiles and captures for the kinds of texts that clients ask for most, is so
    before the first client comes.
    """
    session = kangaroo.session()
    last = kangaroo.target.config.vocab_size - 1
    kinds, steps = (KINDS, 2) if kangaroo.target.device.type == "cuda" else (KINDS[:1], 1)
    for kind in kinds:
        text = session.progress([last], max_new_tokens=context - 1, ignore_eos=True, **kind)
        for _ in islice(text, steps):  # a graph is captured in the second
            pass
        text.close()
    return session


def choose(free: Sequence[Session], tokens: Sequence[int]) -> Session:
    """The session whose text the new one goes on from, else the one that has been free longest.

    A text goes on from another one if it begins with at least half of it. Were the longest common beginning enough, a
    system prompt that all conversations share would draw each of them to the session of another one, whose keys and
    values would be lost.
    """
    best, most = free[0], 0
    for session in free:
        held = session.held
        shared = held.shared(tokens)
        if shared > most and 2 * shared >= len(held.tokens):
            best, most = session, shared
    return best
