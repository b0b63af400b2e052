"""A request's way through the server: its tokens, its turn in the pool, its steps, and what is counted of it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import torch

from ..errors import KangarooError, TooLongError, is_out_of_memory
from ..kangaroo import Kangaroo
from ..request import Request
from ..results import Progress
from ..session import Writing
from .metrics import BUSY, CANCELLED, COMPLETED, ERROR, REFUSED, Metrics
from .parameters import Asked, parameter_in
from .pool import Pool
from .refused import RefusedError, closing

LOG = logging.getLogger(__name__)


class Desk:
    """Takes requests for one model.

    Args:
        kangaroo: the model.
        parallel: how many texts grow side by side.
        queue: how many requests may wait for one of them to end.
        context: the most tokens of a text, prompt included.

    Attributes:
        gpu_lost: whether the GPU has failed; then no text can be written before the server is started again.
    """

    def __init__(self, kangaroo: Kangaroo, parallel: int, queue: int, context: int) -> None:
        self.kangaroo, self.context = kangaroo, context
        self.pool = Pool(kangaroo, parallel, queue, context)
        self.gpu_lost = False
        self.metrics = Metrics(self.pool)

    def admit(self) -> None:
        """Refuse a request that would find the queue full, before its prompt is worked on.

        Raises:
            RefusedError: the queue is full, or the server shuts down.
        """
        try:
            self.pool.check_room()
        except RefusedError:
            self.metrics.requests.labels(BUSY).inc()
            raise

    def resolve(self, asked: Asked) -> Request:
        """What was asked for, against the model; it ends where the context does.

        Raises:
            RefusedError: a prompt, messages or a setting that the model cannot take.
        """
        try:
            request = self.kangaroo.resolve(asked.prompt, asked.settings, asked.messages)
        except TooLongError as error:
            raise RefusedError(str(error), param=asked.source, code="context_length_exceeded") from error
        except KangarooError as error:
            given = {name for name in ("logit_bias", "stop") if getattr(asked.settings, name)}
            setting = parameter_in(str(error), given)
            raise RefusedError(str(error), param=setting or asked.source) from error
        if len(request.tokens) >= self.context:
            raise RefusedError(
                f"the prompt has {len(request.tokens)} tokens; a text has at most {self.context} here, new ones "
                "included.",
                param=asked.source,
                code="context_length_exceeded",
            )
        if request.length > self.context:
            return replace(request, length=self.context, limited_by_context=True)
        return request

    async def write(self, request: Request) -> AsyncGenerator[Progress, None]:
        """The steps of a request, once it is its turn. A generator that is closed or cancelled ends the text.

        Raises:
            RefusedError: the queue is full, the server shuts down, or a step failed.
        """
        began = time.monotonic()
        outcome = CANCELLED
        try:
            async with self.pool.session(request.tokens) as session:
                self.metrics.queue_seconds.observe(time.monotonic() - began)
                text = session.write(request)
                try:
                    async for step in text:
                        if text.outcome.stats.verification_steps == 1:
                            self.metrics.first_token_seconds.observe(time.monotonic() - began)
                        yield step
                        if self.pool.ended and text.outcome.finish_reason is None:
                            raise closing()
                finally:
                    await self._end(text, request)
            outcome = COMPLETED
            self.metrics.request_seconds.observe(time.monotonic() - began)
        except RefusedError:
            outcome = BUSY
            raise
        except Exception as error:
            outcome = ERROR
            self.gpu_lost = await asyncio.to_thread(is_lost, self.kangaroo.target.device)
            LOG.exception("a text ended with an error")
            raise failed(error) from error
        finally:
            self.metrics.requests.labels(outcome).inc()

    def refused(self) -> None:
        """Count a request that never came to its text."""
        self.metrics.requests.labels(REFUSED).inc()

    def left(self) -> None:
        """Count a request whose client went away before it was sent."""
        self.metrics.requests.labels(CANCELLED).inc()

    async def _end(self, text: Writing, request: Request) -> None:
        """Leave the session free, and count what was written; a step under way is waited for."""
        if text.outcome.finish_reason is None:
            await asyncio.to_thread(text.close)
        self.metrics.count(len(request.tokens), text.outcome.stats)


def is_lost(device: torch.device) -> bool:
    """Whether a GPU answers no more: after a fault in a kernel, such as an illegal access, every call fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def failed(error: Exception) -> RefusedError:
    """What a client is told of an error that ended its text."""
    if isinstance(error, KangarooError):
        return RefusedError(str(error), status=500)
    if is_out_of_memory(error):
        return RefusedError("there is not enough memory for this text; ask for a shorter one.", status=500)
    return RefusedError("the text ended with an error that the server's log has.", status=500)
