"""The adapter and prompt lookup by turns: plain decoding's text, an adapter that catches up, the better of the two."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter, make_target
from test_bad_input import refuse

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import Match
from kangaroo_kernels.model import load as load_module
from kangaroo_kernels.model.drafters import kangaroo_with_lookup as module
from kangaroo_kernels.model.drafters.kangaroo_with_lookup import Experience, KangarooWithLookup
from kangaroo_kernels.model.loop.state import MOST_UNSEEN

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9})
IDS = ["greedy", "sampled", "filtered"]
REPEATING = [5, 9, 2, 7, 31] * 6


@pytest.fixture(scope="module")
def kangaroo(pair) -> Kangaroo:
    return pair.load(device="cpu", prompt_lookup=True)


@pytest.fixture
def guesses(kangaroo, monkeypatch) -> Any:
    """In the place of ``look_up``: matches of any length, and tokens that are right now and then."""

    def put(text: list[int] | None = None) -> None:
        dice = random.Random(4)

        def look_up(known: torch.Tensor, length: int, most: int, least: int) -> Match:
            right = [] if text is None else text[length : length + most]
            tokens = [token if dice.random() < 0.8 else dice.randrange(67) for token in right]
            tokens += [dice.randrange(67) for _ in range(most - len(tokens))]
            return Match(torch.tensor(tokens), torch.tensor([dice.choice((0, 3, 4, 7, 15))]))

        monkeypatch.setattr(kangaroo.target, "backend", replace(kangaroo.target.backend, look_up=look_up))

    return put


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("drafts", [None, 2, 15])
def test_whatever_is_looked_up_changes_nothing(kangaroo, guesses, sampling, drafts):
    settings = {"max_new_tokens": 60, **sampling}
    asked = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.2}
    for prompt in ([7], [3, 5, 9], [15] * 70):
        plain = kangaroo.generate(prompt, plain=True, **settings).tokens
        for text in (None, [*prompt, *plain]):
            guesses(text)
            drafted = kangaroo.generate(prompt, **settings, **asked)
            assert drafted.tokens == plain
            assert drafted.stats.drafted > 0


@pytest.mark.parametrize("settings", [*SAMPLINGS, {"draft_confidence_threshold": "auto"}], ids=[*IDS, "auto"])
def test_a_conversation(kangaroo, settings):
    """Turn by turn what a fresh session gives, counts included where the clock has no part in them."""
    session, text = kangaroo.session(), []
    for question in (REPEATING, [11], [15] * 70, [16, 17, *REPEATING]):
        prompt, kept = text + question, max(0, len(text) - MOST_UNSEEN)
        written = session.generate(prompt, max_new_tokens=20, **settings)
        fresh = kangaroo.generate(prompt, max_new_tokens=20, **settings)
        plain = kangaroo.generate(prompt, max_new_tokens=20, plain=True, **settings)
        assert written.tokens == fresh.tokens == plain.tokens
        assert written.stats.cached_tokens == kept
        if "auto" not in settings.values():
            counts = [(each.stats.drafted, each.stats.accepted_at) for each in (written, fresh)]
            assert counts[0] == counts[1]
        text = prompt + written.tokens


def steps(kangaroo: Kangaroo, prompt: list[int], count: int) -> tuple[list[int], Any]:
    """The text after ``count`` steps of a session, and what the drafter keeps of it."""
    session, tokens = kangaroo.session(), list(prompt)
    writing = session.progress(prompt, max_new_tokens=60, draft_confidence_threshold=0.0)
    for _ in range(count):
        tokens += next(writing).commit.tokens
    return tokens, session.memory.drafter


@pytest.mark.parametrize("count", range(1, 9))
def test_the_adapter_catches_up(kangaroo, guesses, count):
    """What it holds, and what it is to run yet, are those of a prefill of the same text."""
    plain = kangaroo.generate(REPEATING, max_new_tokens=60, plain=True).tokens
    guesses([*REPEATING, *plain])
    text, memory = steps(kangaroo, REPEATING, count)
    assert memory.latest[0] or count > 1
    target, adapter = kangaroo.target, kangaroo.drafter.adapter
    caches = target.new_cache(), adapter.new_cache()
    for cache in caches:
        cache.reserve(len(text))
    states = target.run(target.embed(text[:-1]), caches[0], 0, 0, kangaroo.drafter.first_layer)
    adapter.run(states, caches[1], 0)
    near = {"rtol": 1e-4, "atol": 1e-4}
    for ours, wanted in ((memory.cache.keys, caches[1].keys), (memory.cache.values, caches[1].values)):
        torch.testing.assert_close(ours[0][:, : memory.length], wanted[0][:, : memory.length], **near)
    missed = torch.cat([*memory.missed, states[:0]])
    torch.testing.assert_close(missed, states[memory.length :], **near)


def test_text_that_repeats_itself_is_looked_up(tmp_path):
    """The target falls into a loop, and the adapter knows nothing."""
    sizes = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 40, "layers": 2, "heads": 2, "kv_heads": 1}
    target = make_target(tmp_path / "target", std=0.1, **sizes)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1)
    alone, both = (Kangaroo.from_pretrained(target, adapter, prompt_lookup=lookup) for lookup in (False, True))
    alone, both = (each.generate([1, 2, 3], max_new_tokens=100) for each in (alone, both))
    assert both.tokens == alone.tokens
    assert 2 * both.stats.verification_steps < alone.stats.verification_steps
    assert len(both.stats.accepted_at) > 6  # more than the adapter may draft


class TestExperience:
    def test_longer_matches_are_surer(self):
        sure = [Experience().sure(matched) for matched in range(3, 16)]
        assert sure == sorted(sure)
        assert sure[0] < sure[-1] < 1

    def test_what_failed_is_tried_again_later(self):
        experience, usual = Experience(), Experience().sure(4)
        experience.learn(4, 4, 0)
        after = experience.sure(4)
        assert after < 0.6 < usual
        assert experience.sure(5) == Experience().sure(5)
        for _ in range(30):
            experience.learn(0, 2, 1)
        assert 0.6 < experience.sure(4) < usual

    def test_what_stood_is_surer(self):
        experience = Experience()
        experience.learn(9, 9, 9)
        assert experience.sure(9) > Experience().sure(9)

    def test_the_adapters_drafts_are_counted(self):
        experience = Experience()
        for _ in range(100):
            experience.learn(0, 6, 3)
        assert experience.adapter == pytest.approx(3, abs=0.05)
        experience.learn(0, 0, 0)
        assert experience.adapter == pytest.approx(3, abs=0.05)


def test_the_adapter_drafts_where_it_expects_more(kangaroo, guesses, monkeypatch):
    """And is asked for no more drafts than its own configuration says."""
    guesses()
    monkeypatch.setattr(module, "Experience", lambda: Experience(adapter=20.0))
    asked = {"max_new_tokens": 40, "draft_confidence_threshold": 0.0}
    found = [step.commit.drafted for step in kangaroo.progress([1, 2, 3], **asked)]
    assert max(found) == kangaroo.drafter.most_of_adapter < kangaroo.drafter.num_speculative_tokens


def test_the_loop_on_the_device_refuses_it(pair, monkeypatch):
    loaded = on_the_device(pair.load(device="cpu"))
    words = "KangarooWithLookup has no stages()", "kernels='reference'"
    refuse(lambda: Kangaroo(loaded.target, KangarooWithLookup(loaded.target, loaded.drafter.adapter)), *words)
    monkeypatch.setattr(load_module, "load_target", lambda *_, **__: pytest.fail("the weights were loaded"))
    asked = {"kernels": "triton", "dtype": "float32", "prompt_lookup": True}
    refuse(lambda: pair.load(device="cpu", **asked), "prompt_lookup=True", "kernels='reference'")
