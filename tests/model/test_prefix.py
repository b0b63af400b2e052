"""A session runs only what is new: the tokens of a fresh one, and fewer prefilled positions."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from drafters import Scripted, on_the_device, oracle, with_backend, with_drafter
from pairs import make_adapter, make_target

from kangaroo_kernels import Draft, Drafter, Generation, Kangaroo, Session
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.loop.state import MOST_UNSEEN, Written
from kangaroo_kernels.reference.attention import attention

KINDS = (
    {},
    {"plain": True},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "acceptance": "rejection"},
)
QUESTIONS = ([5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15] * 90, [16, 17])
"""What comes new in each turn: a token alone, too, and as many as PyTorch's fused attention takes."""


@pytest.fixture(params=["host", "resident"])
def kangaroo(request: pytest.FixtureRequest, pair: Any) -> Kangaroo:
    loaded = pair.load(device="cpu")
    loaded._threads = 1  # measuring would run a token on its own
    return on_the_device(loaded) if request.param == "resident" else loaded


@contextmanager
def counted(kangaroo: Kangaroo) -> Iterator[dict[str, list[int]]]:
    """Rows of every pass that begins in the target's first layer, and of every one that the adapter takes in."""
    rows: dict[str, list[int]] = {"target": [], "adapter": []}
    target, layer = kangaroo.target, kangaroo.drafter.adapter.layer
    embed, append = target.embed, layer.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "embed", lambda tokens: rows["target"].append(len(tokens)) or embed(tokens))
        patch.setattr(
            layer, "append", lambda hidden, *a, **k: rows["adapter"].append(len(hidden)) or append(hidden, *a, **k)
        )
        yield rows


def facts(written: Generation) -> tuple[Any, ...]:
    stats = written.stats
    return written.tokens, written.finish_reason, stats.drafted, stats.accepted, stats.verification_steps


def turn(session: Session, kangaroo: Kangaroo, prompt: list[int], **settings: Any) -> Generation:
    """A text in a session, held to the same one in memory of its own; drafts and counts are the same, too."""
    written = session.generate(prompt, **settings)
    fresh = kangaroo.generate(prompt, **settings)
    assert facts(written) == facts(fresh)
    assert fresh.stats.cached_tokens == 0
    assert written.stats.cached_tokens + written.stats.prefilled_tokens == len(prompt) - 1
    return written


@pytest.mark.parametrize("settings", KINDS, ids=lambda kind: "-".join(map(str, kind)) or "greedy")
def test_a_conversation(kangaroo, settings, guarded_workspaces):
    """Every turn runs its own tokens and the last three of the text before, in the target and in the adapter."""
    session, text = kangaroo.session(), []
    for question in QUESTIONS:
        prompt, kept = text + question, max(0, len(text) - MOST_UNSEEN)
        with counted(kangaroo) as rows:
            written = turn(session, kangaroo, prompt, max_new_tokens=20, **settings)
        assert written.stats.cached_tokens == kept
        assert rows["target"][0] == len(prompt) - 1 - kept
        assert rows["adapter"][:1] == ([] if settings.get("plain") else [len(prompt) - 1 - kept])
        text = prompt + written.tokens
    assert len(text) > 200  # the caches have grown on the way, more than once


def test_a_prefill_takes_no_output_of_the_adapter(pair):
    """Later drafts need its keys and values; in the only step there is room for no draft."""
    kangaroo, attended = pair.load(device="cpu"), []
    kangaroo._threads = 1
    count = replace(REFERENCES, attention=lambda q, *a, **k: attended.append(len(q)) or attention(q, *a, **k))
    with_backend(kangaroo, count).generate([5] * 9, max_new_tokens=1)
    layers = kangaroo.target.config.num_hidden_layers
    assert attended == [8] * layers + [1] * layers


def both(pair: Any) -> tuple[Kangaroo, Kangaroo]:
    return pair.load(device="cpu"), on_the_device(pair.load(device="cpu"))


@pytest.mark.parametrize("new", [5, 9, 1])
@pytest.mark.parametrize("loop", [0, 1], ids=["host", "resident"])
def test_an_adapter_that_lags_far(pair, loop, new, guarded_workspaces):
    """Every draft accepted, then a last step with room for one token: what the adapter has not run is not relied on."""
    kangaroo = both(pair)[loop]
    wanted = kangaroo.generate([3, 4, 5, 6], max_new_tokens=60, plain=True).tokens
    text = [3, 4, 5, 6, *wanted]
    if loop == 0:
        kangaroo = with_drafter(kangaroo, Scripted(kangaroo.drafter, oracle(text)))
    session, settings = kangaroo.session(), {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
    for length in (4, 4 + new, 4 + 2 * new, 4 + 3 * new):
        turn(session, kangaroo, text[:length], max_new_tokens=new, **settings)
        cache = session.memory.drafter_memory.cache
        assert not cache.keys[0][:, : length + new - MOST_UNSEEN].isnan().any()


def stop_string(session: Session) -> list[int]:
    whole = session.generate([1, 2, 3, 4, 5], max_new_tokens=40)
    session.memory.forget()
    piece = whole.text[9:11]
    stopped = session.generate([1, 2, 3, 4, 5], max_new_tokens=40, stop=[piece])
    assert stopped.finish_reason == "stop"
    return [1, 2, 3, 4, 5, *stopped.tokens]


def stop_token(session: Session) -> list[int]:
    token = session.generate([1, 2, 3, 4, 5], max_new_tokens=40).tokens[9]
    session.memory.forget()
    return [1, 2, 3, 4, 5, *session.generate([1, 2, 3, 4, 5], max_new_tokens=40, stop=[token]).tokens]


def closed(session: Session) -> list[int]:
    text = session.progress([1, 2, 3, 4, 5], max_new_tokens=40)
    for _ in range(4):
        next(text)
    text.close()
    return [1, 2, 3, 4, 5, *text.outcome.tokens]


def still_open(session: Session) -> list[int]:
    text = session.progress([1, 2, 3, 4, 5], max_new_tokens=40)
    for _ in range(4):
        next(text)
    session.kept_alive = text
    return [1, 2, 3, 4, 5, *text.outcome.tokens]


def the_context(session: Session) -> list[int]:
    prompt = [1 + place % 60 for place in range(500)]
    written = session.generate(prompt, max_new_tokens=100)
    assert written.finish_reason == "context"
    return (prompt + written.tokens)[:505]


@pytest.mark.parametrize("before", [stop_string, stop_token, closed, still_open, the_context], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS[:3:2], ids=["greedy", "sampled"])
def test_after_texts_that_ended_otherwise(kangaroo, before, kind):
    session = kangaroo.session()
    text = before(session)
    written = turn(session, kangaroo, [*text, 7, 8, 9], max_new_tokens=4, **kind)
    assert written.stats.cached_tokens >= len(text) - MOST_UNSEEN


@pytest.mark.parametrize("place", [0, 1, 17, 30])
def test_an_earlier_message_was_edited(kangaroo, place):
    """Only what stands before the edit is kept; what followed it is not looked at again."""
    session = kangaroo.session()
    prompt = [1 + place % 60 for place in range(40)]
    turn(session, kangaroo, prompt, max_new_tokens=10)
    edited = [*prompt[:place], 66, *prompt[place + 1 :]]
    assert turn(session, kangaroo, edited, max_new_tokens=10).stats.cached_tokens == place
    assert turn(session, kangaroo, edited[: place + 2], max_new_tokens=10).stats.cached_tokens == place
    assert turn(session, kangaroo, edited, max_new_tokens=10).stats.cached_tokens >= place


def test_plain_texts_between_drafted_ones(kangaroo):
    """The adapter has seen less than the target, and begins where it was."""
    session = kangaroo.session()
    text = [1, 2, 3, 4, 5, 6]
    first = text + turn(session, kangaroo, text, max_new_tokens=10).tokens
    plain = first + turn(session, kangaroo, first, max_new_tokens=10, plain=True).tokens
    kept = turn(session, kangaroo, [*plain, 9], max_new_tokens=10).stats.cached_tokens
    assert kept == len(first) - MOST_UNSEEN
    kept = turn(session, kangaroo, [*plain, 9, 9], max_new_tokens=10, plain=True).stats.cached_tokens
    assert kept == len(plain)


class Once(Drafter):
    """Proposes the newest token again, if there is room."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def propose(self, text, chooser, most, threshold):
        drafts = text.tokens[-1:] * min(most, 1)
        hidden = self.target.embed([text.tokens[-1], *drafts])
        return Draft(torch.tensor(drafts, dtype=torch.int64), hidden)


class Beginning(Once):
    """Has a prefill of its own and says nothing of keeping."""

    def prefill(self, text, hidden, reach, length):
        assert len(hidden) == text.newest


class Keeping(Beginning):
    """Keeps half of what it could."""

    def keep(self, memory, count, length):
        return count // 2

    def prefill(self, text, hidden, reach, length):
        self.seen = text.newest - len(hidden)


@pytest.mark.parametrize(("make", "kept"), [(Once, 27), (Beginning, 0), (Keeping, 13)])
def test_other_drafters(pair, make, kept):
    target = pair.load(device="cpu").target
    kangaroo = Kangaroo(target, make(target))
    session = kangaroo.session()
    text = [1 + place % 60 for place in range(20)]
    text += turn(session, kangaroo, text, max_new_tokens=10).tokens
    written = session.generate([*text, 7], max_new_tokens=10)
    assert written.stats.cached_tokens == kept
    assert getattr(kangaroo.drafter, "seen", kept) == kept
    assert facts(written) == facts(kangaroo.generate([*text, 7], max_new_tokens=10))


@pytest.mark.parametrize("scaled", ["target", "adapter"])
def test_angles_that_depend_on_the_length(tmp_path, scaled):
    """Dynamic RoPE: what was run with other angles is run again; below the trained length they are the same."""
    trained, dynamic = {"max_position_embeddings": 64}, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    both = {"target": {"max_position_embeddings": 256}, "adapter": {"max_position_embeddings": 256}}
    both[scaled] = {**trained, "rope_parameters": dynamic}
    target = make_target(tmp_path / "target", quiet_from=2, quiet=0.2, **both["target"])
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=2, copy_layer=2, **both["adapter"])
    kangaroo = Kangaroo.from_pretrained(target, adapter, device="cpu")
    session, text, kept = kangaroo.session(), [1, 2, 3, 4, 5], []
    for _ in range(5):
        written = turn(session, kangaroo, text, max_new_tokens=20)
        text, kept = text + written.tokens, [*kept, written.stats.cached_tokens]
    assert kept == [0, 22, 0, 0, 0]


def test_a_cache_that_cannot_grow_beside_the_old_one(pair, monkeypatch):
    """There is no memory for two: the old one goes, and with it what it held."""
    kangaroo = pair.load(device="cpu")
    session, empty, refusals = kangaroo.session(), torch.empty, []
    text = [1 + place % 60 for place in range(30)]
    text += turn(session, kangaroo, text, max_new_tokens=10).tokens
    longer = [*text, *[3] * 200]
    fresh = kangaroo.generate(longer, max_new_tokens=10)
    kangaroo.forget_idle()

    def short_of_memory(*args: Any, **named: Any) -> torch.Tensor:
        if len(args) == 5 and not refusals:
            refusals.append(args)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(*args, **named)

    monkeypatch.setattr(torch, "empty", short_of_memory)
    written = session.generate(longer, max_new_tokens=10)
    assert facts(written) == facts(fresh)
    assert (written.stats.cached_tokens, len(refusals)) == (0, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_prefill_that_does_not_end(kangaroo, monkeypatch, error, passes):
    """Nothing of it is relied on, wherever it was interrupted, and neither on what it may have overwritten."""
    session = kangaroo.session()
    text = [1 + place % 60 for place in range(30)]
    text += turn(session, kangaroo, text, max_new_tokens=10).tokens
    run, left = kangaroo.target.run, [passes]

    def interrupted(*args: Any, **named: Any) -> torch.Tensor:
        if not left[0]:
            raise error
        left[0] -= 1
        return run(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kangaroo.target, "run", interrupted)
        with pytest.raises(error):
            session.generate([*text[:10], *[66] * 40], max_new_tokens=10)
    for plain in (True, False):
        written = turn(session, kangaroo, [*text, 7], max_new_tokens=10, plain=plain)
        assert written.stats.cached_tokens == 0


def test_a_catching_up_that_does_not_end(pair, monkeypatch):
    """Ctrl-C while the adapter takes the rows that it missed: they are still to come, and no text relies on it."""
    kangaroo = pair.load(device="cpu")
    session, drafter, text = kangaroo.session(), kangaroo.drafter, [1, 2, 3, 4, 5]
    writing = session.progress(text, max_new_tokens=30, num_speculative_tokens=3, draft_confidence_threshold=0.0)
    propose = drafter.propose
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "propose", lambda text, chooser, most, threshold: propose(text, chooser, 0, threshold))
        for _ in range(9):
            next(writing)
    with monkeypatch.context() as patch:
        patch.setattr(drafter.adapter, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(writing)
    text += writing.outcome.tokens
    memory = session.memory.drafter_memory
    assert memory.length + sum(map(len, memory.missed)) == len(text) - 1
    assert turn(session, kangaroo, text, max_new_tokens=20).stats.cached_tokens == 0


def converse(session: Session, seed: int) -> list[list[int]]:
    """Five turns; the questions depend on the seed."""
    text, answers = [], []
    for number in range(5):
        text += [(seed * 7 + number * place) % 66 + 1 for place in range(9)]
        answers.append(session.generate(text, max_new_tokens=15).tokens)
        text += answers[-1]
    return answers


def test_two_conversations_in_threads(kangaroo):
    wanted = [converse(kangaroo.session(), seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(converse, [kangaroo.session(), kangaroo.session()], range(2))) == wanted


def test_on_the_kernels(tmp_path, device):
    """In the interpreter: what is new goes through the kernels where it is 16 tokens or fewer."""
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "layers": 2, "heads": 2, "kv_heads": 1}
    target = make_target(tmp_path / "target", quiet_from=1, quiet=0.2, **sizes)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1, copy_layer=1)
    kangaroo = Kangaroo.from_pretrained(target, adapter, device=device, dtype="float32", kernels="triton")
    for plain in (False, True):
        session, text = kangaroo.session(), [1, 2, 3, 4, 5]
        for question in ([], [7], [8] * 20):
            kept = max(0, len(text) - MOST_UNSEEN) if question else 0
            written = turn(session, kangaroo, text + question, max_new_tokens=4, plain=plain)
            assert written.stats.cached_tokens == kept
            text += question + written.tokens


def test_what_a_text_shares():
    written = Written([1, 2, 3], [4, 5, 6])
    assert [written.shared(tokens) for tokens in ([1, 2, 3, 4, 5, 6, 7], [1, 2], [1, 9, 3], [9], [])] == [3, 2, 1, 0, 0]
    assert Written([1, 2], []).shared([1, 2]) == 0
