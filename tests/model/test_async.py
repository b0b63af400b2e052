"""``async for`` over streams and steps: the same texts, a loop that goes on, and texts that end when cancelled."""

import asyncio
import threading
import time
from typing import Any

import pytest

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.loop import host as host_module


@pytest.fixture
def kangaroo(pair: Any) -> Kangaroo:
    return pair.load(device="cpu")


@pytest.mark.parametrize("of_a_session", [False, True])
def test_many_at_once(kangaroo, of_a_session):
    prompts = [[number, number + 1] for number in range(12)]
    wanted = [kangaroo.generate(prompt, max_new_tokens=12) for prompt in prompts]

    async def read(prompt: list[int]) -> tuple[str, list[int]]:
        first, second = ((kangaroo.session() if of_a_session else kangaroo) for _ in range(2))
        text = "".join([piece async for piece in first.stream(prompt, max_new_tokens=12)])
        tokens = [token async for step in second.progress(prompt, max_new_tokens=12) for token in step.commit.tokens]
        return text, tokens

    async def everybody() -> list[tuple[str, list[int]]]:
        return await asyncio.gather(*map(read, prompts))

    assert asyncio.run(everybody()) == [(written.text, written.tokens) for written in wanted]


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every step takes a tenth of a second; the event is set when the first one begins."""
    inside, verify = threading.Event(), host_module.verify

    def slow(*args: Any) -> Any:
        inside.set()
        time.sleep(0.1)
        return verify(*args)

    monkeypatch.setattr(host_module, "verify", slow)
    return inside


def test_the_event_loop_goes_on(kangaroo, monkeypatch):
    """While one task waits for a step, another one runs."""
    inside, seen = slow_steps(monkeypatch), []

    async def beside() -> None:
        while not inside.is_set():
            await asyncio.sleep(0)
        seen.append(text.outcome.tokens == [])  # the step is under way

    async def read() -> None:
        async for _ in text:
            break

    async def both() -> None:
        await asyncio.gather(read(), beside())

    text = kangaroo.progress([1, 2], max_new_tokens=4)
    asyncio.run(both())
    assert seen == [True]


@pytest.mark.parametrize("way", ["progress", "stream"])
def test_a_cancelled_task_closes_its_text(kangaroo, monkeypatch, way):
    inside = slow_steps(monkeypatch)
    text = getattr(kangaroo, way)([1, 2], max_new_tokens=400)

    async def read() -> None:
        async for _ in text:
            pass

    async def cancel() -> None:
        reading = asyncio.create_task(read())
        while not inside.is_set():
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert len(kangaroo._idle) == 1  # the memory is free, though the text is still held

    asyncio.run(cancel())
    assert list(text) == []


def test_errors_come_through(kangaroo):
    session = kangaroo.session()

    async def read() -> None:
        text = session.stream([1, 2], max_new_tokens=9)
        await anext(text)
        session.generate([3], max_new_tokens=1)
        await anext(text)

    with pytest.raises(KangarooError, match="another text was begun"):
        asyncio.run(read())


def test_a_stream_can_be_closed(kangaroo):
    text = kangaroo.stream([1, 2], max_new_tokens=30)
    assert next(text)
    text.close()
    assert list(text) == []
    assert len(kangaroo._idle) == 1
