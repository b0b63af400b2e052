"""Many texts on one loaded model: side by side, in threads, abandoned and closed; always the right tokens."""

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model import kangaroo as kangaroo_module
from kangaroo_kernels.model.loop import host as host_module

LOOPS = ("host", "resident")


def load(pair: Any, loop: str) -> Kangaroo:
    return on_the_device(pair.load(device="cpu")) if loop == "resident" else pair.load(device="cpu")


def requests(count: int, seed: int, longest: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and settings of mixed lengths and kinds."""
    dice, made = random.Random(seed), []
    for number in range(count):
        prompt = [dice.randrange(67) for _ in range(dice.choice((2, 5, 20, 60)))]
        kind = dice.choice(({}, {"plain": True}, {"temperature": 0.8, "seed": number}, {"num_speculative_tokens": 3}))
        made.append((prompt, {"max_new_tokens": dice.randint(1, longest), **kind}))
    return made


def stress(kangaroo: Kangaroo, asked: list[tuple[list[int], dict[str, Any]]]) -> None:
    """Every request alone, then all of them from many threads: the same tokens."""
    wanted = [kangaroo.generate(prompt, **settings).tokens for prompt, settings in asked]
    dice = random.Random(1)
    turns = [dice.randrange(3) for _ in asked]

    def work(number: int) -> list[int]:
        prompt, settings = asked[number]
        if turns[number] == 0:  # a text that is begun and left, here and there in the middle
            left = kangaroo.progress([1, 2, 3], max_new_tokens=30)
            next(left)
            if number % 2:
                left.close()
        if turns[number] == 1:  # step by step, so that others come between
            return [token for step in kangaroo.progress(prompt, **settings) for token in step.commit.tokens]
        return kangaroo.generate(prompt, **settings).tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(len(asked)))) == wanted


@pytest.mark.parametrize("loop", LOOPS)
def test_200_requests_from_8_threads(pair, loop):
    stress(load(pair, loop), requests(200, 3, 24))


def test_200_requests_from_8_threads_on_the_kernels(tmp_path_factory, device):
    """The resident loop as it is, in the interpreter: short texts, since a launch takes milliseconds there."""
    folder = tmp_path_factory.mktemp("kernels")
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "layers": 2, "heads": 2, "kv_heads": 1}
    target = make_target(folder / "target", quiet_from=1, quiet=0.2, **sizes)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1)
    kangaroo = Kangaroo.from_pretrained(target, adapter, device=device, dtype="float32", kernels="triton")
    assert kangaroo.target.backend.resident
    kinds = ({"plain": True}, {"temperature": 0.8}, {"num_speculative_tokens": 1, "draft_confidence_threshold": 0.0})
    asked = [
        ([token] * length, {"max_new_tokens": 1 + length % 3, "seed": length, **kind})
        for token, length, kind in product((1, 7), (1, 2, 40), kinds)
    ]
    wanted = [kangaroo.generate(prompt, **settings).tokens for prompt, settings in asked]
    order = [number % len(asked) for number in range(200)]
    random.Random(2).shuffle(order)

    def work(number: int) -> list[int]:
        prompt, settings = asked[number]
        return [token for step in kangaroo.progress(prompt, **settings) for token in step.commit.tokens]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, order)) == [wanted[number] for number in order]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_text_begun_while_another_is_prefilled(pair, monkeypatch, loop):
    """The second thread comes in the middle of the first one's prefill; it waits, and both are right."""
    kangaroo = load(pair, loop)
    long, short = [index % 67 for index in range(200)], [5, 6, 7]
    wanted = [kangaroo.generate(prompt, max_new_tokens=8).tokens for prompt in (long, short)]
    embed, inside = kangaroo.target.embed, threading.Event()

    def slow(tokens: Any) -> torch.Tensor:
        if len(tokens) > 100:
            inside.set()
            time.sleep(0.2)  # the other thread is there by then
        return embed(tokens)

    monkeypatch.setattr(kangaroo.target, "embed", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kangaroo.generate, long, max_new_tokens=8)
        assert inside.wait(10)
        second = pool.submit(kangaroo.generate, short, max_new_tokens=8)
        assert [first.result().tokens, second.result().tokens] == wanted


@pytest.mark.parametrize("loop", LOOPS)
def test_steps_are_exclusive(pair, monkeypatch, loop):
    """No two threads are inside the model at once."""
    kangaroo = load(pair, loop)
    run, inside, most = kangaroo.target.run, [], []

    def watched(*args: Any, **named: Any) -> torch.Tensor:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0)  # another thread may come now
        result = run(*args, **named)
        inside.pop()
        return result

    monkeypatch.setattr(kangaroo.target, "run", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: kangaroo.generate([number, 1], max_new_tokens=10), range(12)))
    assert set(most) == {1}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_text_inside_anothers_loop(pair, loop, plain):
    kangaroo = load(pair, loop)
    settings = {"max_new_tokens": 20, "plain": plain}
    wanted = {number: kangaroo.generate([number, 3], **settings).tokens for number in range(4)}
    outer = []
    for step in kangaroo.progress([0, 3], **settings):
        outer += step.commit.tokens
        inner = kangaroo.progress([2, 3], **settings)
        assert kangaroo.generate([1, 3], **settings).tokens == wanted[1]
        assert [token for each in inner for token in each.commit.tokens] == wanted[2]
    assert outer == wanted[0]


@pytest.mark.parametrize("loop", LOOPS)
def test_sessions_are_independent(pair, loop):
    """Texts of several sessions that grow in turns, step by step."""
    kangaroo = load(pair, loop)
    prompts = [[number] * (2 + 9 * number) for number in range(5)]
    wanted = [kangaroo.generate(prompt, max_new_tokens=15).tokens for prompt in prompts]
    texts = [kangaroo.session().progress(prompt, max_new_tokens=15) for prompt in prompts]
    found: list[list[int]] = [[] for _ in texts]
    while any(len(tokens) < 15 for tokens in found):
        for number, text in enumerate(texts):
            step = next(text, None)
            found[number] += [] if step is None else step.commit.tokens
    assert found == wanted


def test_a_session_says_what_it_takes(pair):
    kangaroo = pair.load(device="cpu")
    session, empty = kangaroo.session(length=100), kangaroo.session()
    config = kangaroo.target.config
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert session.nbytes >= 100 * per_position
    assert empty.nbytes < per_position * 64
    before, place = session.nbytes, session.memory.cache.keys[0].data_ptr()
    session.generate([1] * 60, max_new_tokens=40)
    assert session.memory.cache.keys[0].data_ptr() == place  # there was room for all of it
    session.generate([1] * 250, max_new_tokens=50)
    assert session.nbytes >= before + 100 * per_position


@pytest.mark.parametrize("length", [5, 47, 48, 112, 123, 240, 496])
def test_plain_and_drafted_texts_find_the_same_memory(pair, length):
    """Whatever the number of drafts: a cache that grew would drop every graph."""
    session = load(pair, "resident").session(length=length)
    place = session.memory.cache.keys[0].data_ptr()
    for settings in ({"plain": True}, {"num_speculative_tokens": 1}, {"num_speculative_tokens": 15}):
        session.generate([5] * (length - 3), max_new_tokens=3, **settings)
        assert session.memory.cache.keys[0].data_ptr() == place


@pytest.mark.parametrize("loop", LOOPS)
def test_close_in_the_middle(pair, loop):
    kangaroo = load(pair, loop)
    wanted = kangaroo.generate([4, 5], max_new_tokens=12).tokens
    text = kangaroo.progress([1, 2], max_new_tokens=30)
    next(text)
    written = list(text.outcome.tokens)
    assert text.outcome.finish_reason is None
    text.close()
    assert next(text, None) is None
    assert text.outcome.tokens == written
    assert text.outcome.finish_reason == "abort"
    text.close()  # once more does no harm
    assert kangaroo.generate([4, 5], max_new_tokens=12).tokens == wanted


def test_close_waits_for_the_step_of_another_thread(pair, monkeypatch):
    kangaroo = pair.load(device="cpu")
    inside, verify, finished = threading.Event(), host_module.verify, []

    def slow(*args: Any) -> torch.Tensor:
        inside.set()
        time.sleep(0.1)
        result = verify(*args)
        finished.append(None)
        return result

    monkeypatch.setattr(host_module, "verify", slow)
    text = kangaroo.progress([1, 2], max_new_tokens=100)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(next, text)
        assert inside.wait(10)
        text.close()
        assert len(finished) == 1
        assert reading.result().commit.tokens


def test_one_text_read_from_two_threads(pair):
    """Each step goes to one of them, and none is lost."""
    kangaroo = pair.load(device="cpu")
    wanted = kangaroo.generate([1, 2], max_new_tokens=60, plain=True).tokens
    text = kangaroo.progress([1, 2], max_new_tokens=60, plain=True)
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(lambda: [step.commit.tokens for step in text]) for _ in range(2)]
        found = [token for part in parts for tokens in part.result() for token in tokens]
    assert sorted(found) == sorted(wanted)
    assert text.outcome.tokens == wanted


def test_an_asyncio_server(pair):
    """Texts streamed by turns on one event loop, some of them in threads of its executor."""
    kangaroo = pair.load(device="cpu")
    prompts = [[number, number + 1] for number in range(6)]
    wanted = [kangaroo.generate(prompt, max_new_tokens=12).tokens for prompt in prompts]

    async def serve(prompt: list[int]) -> list[int]:
        if prompt[0] % 2:
            return (await asyncio.to_thread(kangaroo.generate, prompt, max_new_tokens=12)).tokens
        tokens = []
        for step in kangaroo.progress(prompt, max_new_tokens=12):
            tokens += step.commit.tokens
            await asyncio.sleep(0)
        return tokens

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*map(serve, prompts))

    assert asyncio.run(everybody()) == wanted


def test_memory_is_kept_for_the_next_text(pair, monkeypatch):
    """One text after another is written in the same memory; of many at once, a few are kept."""
    kangaroo, made = pair.load(device="cpu"), []
    new = kangaroo_module.Memory
    monkeypatch.setattr(kangaroo_module, "Memory", lambda *args: made.append(None) or new(*args))
    for number in range(5):
        kangaroo.generate([number], max_new_tokens=3)
        abandoned = kangaroo.progress([number], max_new_tokens=30)
        next(abandoned)
        del abandoned
    assert len(made) == 1
    texts = [kangaroo.progress([number], max_new_tokens=30) for number in range(12)]
    for text in texts:
        next(text)
    for text in texts:
        text.close()
    assert len(made) == 12
    assert kangaroo.forget_idle() == kangaroo_module.MOST_IDLE


def test_idle_memory_makes_room(pair, monkeypatch):
    """A text that finds no memory takes that of the texts before; with nothing left to give, the error stays."""
    kangaroo = pair.load(device="cpu")
    wanted = kangaroo.generate([1, 2], max_new_tokens=5).tokens
    empty, idle, refusals = torch.empty, [], [1]

    def short_of_memory(*args: Any, **named: Any) -> torch.Tensor:
        if len(args) == 5:  # a cache
            idle.append(len(kangaroo._idle))
            if len(idle) <= refusals[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*args, **named)

    session = kangaroo.session()
    monkeypatch.setattr(torch, "empty", short_of_memory)
    assert session.generate([1, 2], max_new_tokens=5).tokens == wanted
    assert idle[:2] == [1, 0]
    refusals[0] = 100
    with pytest.raises(torch.OutOfMemoryError):
        session.generate([1, 2], max_new_tokens=300)
    refusals[0] = 0
    assert session.generate([1, 2], max_new_tokens=5).tokens == wanted  # the session is as good as new


def test_settings_are_one_object(pair):
    kangaroo = pair.load(device="cpu")
    settings = Settings(max_new_tokens=9, temperature=0.7, seed=3, stop=[1])
    keywords = {"max_new_tokens": 9, "temperature": 0.7, "seed": 3, "stop": [1]}
    wanted = kangaroo.generate([5], **keywords).tokens
    for written in (kangaroo.generate([5], settings), kangaroo.session().generate([5], settings)):
        assert written.tokens == wanted
    with pytest.raises(TypeError, match="both"):
        kangaroo.generate([5], settings, seed=4)
    with pytest.raises(AttributeError):
        settings.seed = 4  # type: ignore[misc]
    with pytest.raises(KangarooError, match="top_p"):
        Settings(max_new_tokens=9, top_p=0)
