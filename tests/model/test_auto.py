"""``draft_confidence_threshold="auto"``: it ends at the right choice, and the text is plain decoding's all along."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drafters import Scripted, example_drafter, in_one_launch, on_the_device, oracle, right_until, with_drafter
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.contract import RECORD_HEAD, Record
from kangaroo_kernels.model import session as session_module
from kangaroo_kernels.model.drafters.prompt_lookup import PromptLookup
from kangaroo_kernels.model.loop import device, mailbox
from kangaroo_kernels.model.loop.graphs import GraphRunner
from kangaroo_kernels.model.loop.iteration import Iteration
from kangaroo_kernels.model.loop.pace import Auto, Costs, Done, Limits, ladder
from kangaroo_kernels.model.target.llama import Llama

OWN = Limits(6, 0.6)


class Clock:
    """A machine whose time is what the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """Writes imagined text with an ``Auto``, on a clock that moves by what steps cost.

    Args:
        right: from the length of the text to the probability that a draft is right, which is its confidence, too.
        draft: what a draft adds to a step that takes 1.
        busy: from the time to a factor of all costs.
        idle: drafts nothing although it is asked to.
    """

    def __init__(
        self,
        right: Callable[[int], float],
        draft: float = 0.4,
        busy: Callable[[float], float] = lambda now: 1.0,
        idle: bool = False,
    ) -> None:
        self.right, self.draft, self.busy, self.idle = right, draft, busy, idle
        self.dice, self.clock, self.asked, self.written = random.Random(3), Clock(), [], 0
        self.pace = Auto(OWN, 15, Limits(15, 0.6), self.clock)

    def write(self, tokens: int) -> float:
        """Tokens in the time of a plain step."""
        began, first, end = self.clock.now, self.written, self.written + tokens
        factors = []
        while self.written < end:
            limits = self.pace.limits(end - self.written - 1)
            confidences: list[float] = []
            while len(confidences) < limits.most and not self.idle and all(c >= limits.threshold for c in confidences):
                confidences.append(self.right(self.written))
            stands = [self.dice.random() < confidence for confidence in confidences]
            agreed = next((place for place, right in enumerate(stands) if not right), len(stands))
            factors.append(self.busy(self.clock.now))
            lost = 0.2 * (self.idle and limits.most > 0)
            self.clock.now += factors[-1] * (1 + lost + self.draft * len(stands)) * self.dice.uniform(1, 1.1)
            self.pace.record(Done(len(stands), agreed, confidences))
            self.asked.append(limits.most)
            self.written += agreed + 1
        return (end - first) / (self.clock.now - began) * 1.05 * (sum(factors) / len(factors))

    def undrafted(self) -> float:
        """The share of the latest steps that drafted nothing."""
        return self.asked[-100:].count(0) / 100


@pytest.mark.parametrize("busy", [lambda now: 1.0, lambda now: 1.0 + (now // 50) % 2], ids=["calm", "busy by turns"])
class TestEndsAtTheRightChoice:
    def test_never_right(self, busy):
        machine = Machine(lambda place: 0.05, busy=busy)
        machine.write(100)
        assert machine.write(2000) > 0.97
        assert machine.undrafted() > 0.9
        assert not machine.pace.drafting

    def test_always_right(self, busy):
        machine = Machine(lambda place: 1.0, draft=0.1, busy=busy)
        machine.write(400)
        assert machine.write(2000) > 5
        assert machine.pace.drafting
        assert machine.pace.rungs[machine.pace.rung].limits.most == 15

    def test_often_right(self, busy):
        """Drafts of 0.4 steps each: one, or a second after a sure one, is worth it; six never are."""
        machine = Machine(lambda place: random.Random(place).choice((0.9, 0.5)), busy=busy)
        machine.write(400)
        assert machine.write(2000) > 1.05
        assert machine.pace.rungs[machine.pace.rung].limits.most < 6

    def test_right_by_phases(self, busy):
        machine = Machine(lambda place: 0.98 if place // 500 % 2 else 0.05, draft=0.2, busy=busy)
        machine.write(500)
        for _ in range(2):
            assert machine.write(500) > 2
            assert machine.pace.drafting
            assert machine.write(500) > 0.9
            assert not machine.pace.drafting


def test_a_drafter_that_has_nothing_to_say():
    """It loses the time of looking, a fifth of a step, unless it is not asked."""
    machine = Machine(lambda place: 0.0, idle=True)
    machine.write(100)
    assert machine.write(2000) > 0.97
    assert machine.undrafted() > 0.9


def test_drafts_at_hand_are_taken_and_tell_nothing():
    """The adapter is never right, and now and then a sure match of fifteen tokens is there."""
    machine = Machine(lambda place: 0.05)
    machine.write(1000)
    pace = machine.pace
    before = [replace(rung) for rung in pace.rungs], pace.credit
    for room, most in ((40, 15), (7, 7)):
        assert pace.limits(room, at_hand=True) == (most, 0.6)
        machine.clock.now += 9
        pace.record(Done(most, most, (0.9,) * most, at_hand=True))
    assert (pace.rungs, pace.credit) == before
    assert machine.write(500) > 0.97 and not pace.drafting


def test_an_interrupted_step_decides_nothing():
    costs = Costs()
    for seconds in (1.4, 1.4, 30.0, 1.4):
        costs.compare(1, seconds, 1.0)
    for slow in (2.0, 9.0):
        costs.compare(1, 1.4 * slow, slow)  # and neither does a machine that is slow for both
    assert costs.of(1) == pytest.approx(1.4)
    for _ in range(5):
        costs.compare(8, 5.0, 1.0)
    assert costs.of(8) == pytest.approx(5.0)
    assert costs.of(15) == pytest.approx(8.5)  # on the nearest one's line
    assert costs.of(1) == pytest.approx(1.4, abs=0.11)


def test_the_ladder():
    limits = [rung.limits for rung in ladder(Limits(5, 0.6), 15)]
    assert Limits(5, 0.6) in limits
    assert [rung.most for rung in limits] == [1, 2, 3, 4, 5, 6, 8, 11, 15]
    assert all(strict.threshold > loose.threshold for strict, loose in pairwise(limits))
    assert ladder(OWN, 3)[-1].limits.most == 3


def test_shorter_drafts_are_known_from_longer_ones():
    rung = ladder(OWN, 15)[3]  # 4 drafts, 0.73
    for confidences, made in (((0.9, 0.7, 0.9), 2), ((0.9,) * 6, 4), ((0.9,), 1), ((float("nan"), 0.9), 1), ((), 0)):
        assert rung.drafts_of(len(confidences), confidences) == made
    assert rung.drafts_of(9, None) == 4


# ---- in real text

SETTINGS = (
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9},
    {"repetition_penalty": 1.2, "logit_bias": {3: 0.5}, "logprobs": 2},
)
PROMPT = [3, 1, 4, 1, 5, 9]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time is counted in layers: each takes 1, and every further row 0.05."""
    clock, run = Clock(), Llama.run

    def counted(self: Llama, hidden: Any, cache: Any, position: Any, first: int, last: int, **more: Any) -> Any:
        clock.now += (last - first) * (0.95 + 0.05 * len(hidden))
        return run(self, hidden, cache, position, first, last, **more)

    monkeypatch.setattr(Llama, "run", counted)
    monkeypatch.setattr(Auto.__init__, "__defaults__", (None, clock))
    return clock


def scripted(pair: Any, kind: str, wanted: list[int]) -> Kangaroo:
    """A drafter that is never right, or always, or by turns of 40 tokens."""
    kangaroo = pair.load(device="cpu")
    kangaroo._threads = 1  # measuring would move the clock
    never, always = right_until(wanted, 0, kangaroo.target.config.vocab_size), oracle(wanted)
    say = {
        "never": never,
        "always": always,
        "by turns": lambda place, *rest: (always if place // 40 % 2 else never)(place, *rest),
        "itself": None,
    }[kind]
    return with_drafter(kangaroo, Scripted(kangaroo.drafter, say))


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled", "filtered", "shaped"])
@pytest.mark.parametrize("kind", ["never", "always", "by turns", "itself"])
def test_the_text_is_plain_decodings(pair, clock, kind, settings, guarded_workspaces):
    plain = pair.load(device="cpu").generate(PROMPT, max_new_tokens=300, plain=True, **settings)
    kangaroo = scripted(pair, kind, [*PROMPT, *plain.tokens])
    for _ in range(2):  # the second text begins where the first one's search ended
        written = kangaroo.generate(PROMPT, max_new_tokens=300, draft_confidence_threshold="auto", **settings)
        assert written.tokens == plain.tokens
    share = written.stats.steps_without_drafts / written.stats.verification_steps
    assert {"never": share > 0.9, "always": share < 0.2}.get(kind, True)
    if kind == "always":
        assert written.stats.mean_acceptance_length > 3


def test_prompt_lookup(pair, clock):
    """Text in a loop is foreseen; the same drafter is not asked much where it is never right."""
    kangaroo = Kangaroo(target := pair.load(device="cpu").target, PromptLookup(target))
    wanted = kangaroo.generate(PROMPT * 9, max_new_tokens=200, plain=True).tokens
    assert kangaroo.generate(PROMPT * 9, max_new_tokens=200, draft_confidence_threshold="auto").tokens == wanted


class Leaving:
    """Asks for no draft in some steps: ``asks`` says in which there are some, and then how many."""

    def __init__(self, asks: Callable[[int], int]) -> None:
        self.asks, self.step, self.drafts = asks, -1, []

    def limits(self, room: int, at_hand: bool = False) -> Limits:
        self.step += 1
        return Limits(room if at_hand else min(self.asks(self.step), room), 0.0)

    def record(self, done: Done) -> None:
        confidences = done.confidences or [1.0] * done.drafts  # who has none is certain
        self.drafts.append((done.drafts, done.agreed, list(confidences)))


def begin(kangaroo: Kangaroo, session: Any, prompt: list[int], length: int, pace: Leaving) -> Any:
    """The steps of a text at a pace."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("kangaroo_kernels.model.session.pace_of", lambda *_: pace)
        return session.generate(prompt, max_new_tokens=length).tokens


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_drafts_after_a_pause(pair, steps, guarded_workspaces):
    """They are those of a text that begins there: the adapter caught up with what it was not asked about."""
    kangaroo = pair.load(device="cpu")
    late = Leaving(lambda step: 5 if step in (0, steps + 1) else 0)
    tokens = begin(kangaroo, kangaroo.session(), PROMPT, steps + 20, late)
    assert late.drafts[0][0]
    written = sum(1 for drafts, *_ in late.drafts[1 : steps + 1] if not drafts)
    assert written == steps
    place = next(
        length for length in range(steps, steps + 8) if matches(kangaroo, [*PROMPT, *tokens[:length]], late, steps + 1)
    )
    assert place >= steps + 1


def matches(kangaroo: Kangaroo, text: list[int], late: Leaving, step: int) -> bool:
    """Whether a text that begins here has that step's drafts."""
    fresh = Leaving(lambda step: 5)
    begin(kangaroo, kangaroo.session(), text, 6, fresh)
    return fresh.drafts[0][2] == pytest.approx(late.drafts[step][2], abs=1e-5)


@pytest.mark.parametrize("asks", [lambda step: 0, lambda step: 4 * (step < 2), lambda step: 4 * (step % 3 == 0)])
def test_a_session_goes_on_after_a_pause(pair, asks, guarded_workspaces):
    """The next text's prefill takes what the adapter missed, and runs the target on what is new alone."""
    kangaroo = pair.load(device="cpu")
    session, fresh = kangaroo.session(), kangaroo.session()
    prompt = [*PROMPT, *begin(kangaroo, session, PROMPT, 40, Leaving(asks)), 7, 8]
    texts = [one.generate(prompt, max_new_tokens=30, num_speculative_tokens=4) for one in (session, fresh)]
    assert texts[0].stats.cached_tokens == len(prompt) - 2 - 3
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].stats.drafted == texts[1].stats.drafted
    kept = [one.memory.drafter_memory.cache for one in (session, fresh)]
    torch.testing.assert_close(kept[0].keys[0][:, : len(prompt)], kept[1].keys[0][:, : len(prompt)], rtol=0, atol=1e-4)


# ---- on the device


@pytest.fixture
def iteration_costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``iteration_costs(c)``: an iteration takes a second, and each of its drafts c seconds more."""
    clock, run, cost = Clock(), Iteration.run, [0.0]

    def timed(iteration: Iteration, reach: int) -> None:
        run(iteration, reach)
        clock.now += 1 + cost[0] * Record(*iteration.buffers.report[:RECORD_HEAD].tolist()).drafted

    monkeypatch.setattr(Iteration, "run", timed)
    monkeypatch.setattr(mailbox.time, "perf_counter", clock)
    return partial(cost.__setitem__, 0)


@pytest.fixture(scope="module")
def repeating(tmp_path_factory) -> Callable[[Any], Kangaroo]:
    """``repeating(make)``: a target with few words, whose text often says again what it said, and its drafter."""
    sizes = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 40, "layers": 2, "heads": 2, "kv_heads": 1}
    folder = make_target(tmp_path_factory.mktemp("repeating"), std=0.3, **sizes)

    def load(make: Any) -> Kangaroo:
        target = Kangaroo.from_pretrained(folder, device="cpu").target
        return Kangaroo(target, make(target))

    return load


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=["greedy", "sampled", "filtered"])
def test_on_the_device_it_ends_at_the_right_choice(resident, iteration_costs, monkeypatch, settings, lag):
    """Drafts that cost nothing are made, those that take two seconds are not; the text is plain decoding's."""
    steps = session_module.device_steps
    monkeypatch.setattr(session_module, "device_steps", lambda *args, **named: steps(*args, **named, lag=lag))
    wanted = resident.generate(PROMPT, max_new_tokens=200, plain=True, **settings).tokens
    for cost, few, many in ((0.0, 0.0, 0.35), (2.0, 0.8, 1.0)):
        iteration_costs(cost)
        resident.paces.clear()
        for _ in range(2):  # the second text begins where the first one's search ended
            written = resident.generate(PROMPT, max_new_tokens=200, draft_confidence_threshold="auto", **settings)
            assert written.tokens == wanted
        assert few <= written.stats.steps_without_drafts / written.stats.verification_steps <= many
        assert written.stats.mean_acceptance_length > (1.3 if cost == 0 else 1)
    (pace,) = resident.paces.values()
    assert max(rung.limits.most for rung in pace.rungs) == 6  # the shapes are those of the drafter's own number


@pytest.mark.parametrize("lag", [0, 1])
def test_on_the_device_nothing_is_learned_while_kernels_are_compiled_or_captured(resident, monkeypatch, lag):
    """The first two iterations of every bucket take long, one launched as it is and one captured."""
    steps, run, clock, runs, compared = session_module.device_steps, Iteration.run, Clock(), [], []

    def timed(iteration, reach):
        run(iteration, reach)
        runs.append(reach)
        clock.now += 100 if runs.count(reach) <= 2 else 1

    monkeypatch.setattr(session_module, "device_steps", lambda *args, **named: steps(*args, **named, lag=lag))
    monkeypatch.setattr(device, "LEAST_REACH", 8)
    monkeypatch.setattr(GraphRunner, "captures", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(GraphRunner, "_capture", lambda self, work: SimpleNamespace(replay=work))
    monkeypatch.setattr(GraphRunner, "_wait", lambda self: None)
    monkeypatch.setattr(mailbox.time, "perf_counter", clock)
    monkeypatch.setattr(Iteration, "run", timed)
    monkeypatch.setattr(Costs, "compare", lambda self, drafts, seconds, plain: compared.append((seconds, plain)))
    resident.generate(PROMPT, max_new_tokens=40, draft_confidence_threshold="auto")
    assert runs.count(max(runs)) < len(runs) - 2  # of several buckets
    assert set(compared) == {(1.0, 1.0)}


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
    "asks", [lambda step: 4, lambda step: 4 * (step % 3 == 0), lambda step: 3 if step in (0, 30) else 0]
)
@pytest.mark.parametrize("make", [None, PromptLookup, example_drafter()], ids=["adapter", "lookup", "example"])
def test_both_loops_draft_the_same_within_changing_limits(pair, repeating, monkeypatch, make, asks, lag):
    """Nothing at times, too: the adapter then sees what the text goes on with all the same."""
    steps = session_module.device_steps
    monkeypatch.setattr(session_module, "device_steps", lambda *args, **named: steps(*args, **named, lag=lag))
    found = []
    for place in (lambda kangaroo: kangaroo, on_the_device):
        pace, kangaroo = Leaving(asks), place(pair.load(device="cpu") if make is None else repeating(make))
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(session_module, "pace_of", lambda *_, pace=pace, **__: pace)
            written = kangaroo.generate(PROMPT * 3, max_new_tokens=60, draft_confidence_threshold="auto")
        found.append((pace.drafts, written.tokens))
    (by_the_host, wanted), (on_it, tokens) = found
    assert tokens == wanted
    assert sum(drafts for drafts, *_ in on_it) > 0
    for one, other in zip(by_the_host[:-4], on_it, strict=False):  # at the end the host's loop has room for fewer
        assert one == (*other[:2], pytest.approx(other[2], abs=1e-5))


def test_on_the_device_prompt_lookup_ends_at_the_right_choice(repeating, iteration_costs):
    """It has no confidences, and the search learns all the same what its drafts give."""
    kangaroo = on_the_device(repeating(PromptLookup))
    wanted = kangaroo.generate(PROMPT, max_new_tokens=200, plain=True).tokens
    for cost, few, many in ((0.02, 1.5, 16.0), (2.0, 1.0, 1.2)):
        iteration_costs(cost)
        kangaroo.paces.clear()
        for _ in range(2):
            written = kangaroo.generate(PROMPT, max_new_tokens=200, draft_confidence_threshold="auto")
            assert written.tokens == wanted
        assert few <= written.stats.mean_acceptance_length <= many


def test_on_the_device_only_who_asks_for_it_gets_it(resident, iteration_costs, monkeypatch):
    """A calibrated adapter's default stays its own numbers there; drafting in one launch has no limits to change."""
    monkeypatch.setattr(resident.drafter, "auto", True)
    iteration_costs(2.0)
    persistent = in_one_launch(resident)
    monkeypatch.setattr(persistent.drafter, "auto", True)
    for kangaroo in (resident, persistent):
        assert kangaroo.generate(PROMPT, max_new_tokens=90).stats.steps_without_drafts <= 1
    monkeypatch.setattr(persistent.drafter, "draft_all", None)
    written = persistent.generate(PROMPT, max_new_tokens=90, draft_confidence_threshold="auto")
    assert written.stats.steps_without_drafts > 20


# ---- when it is on


def test_what_a_request_says(tmp_path, pair):
    adapter = make_adapter(
        tmp_path / "calibrated",
        pair.target,
        exit_layer=2,
        copy_layer=2,
        num_speculative_tokens=3,
        draft_confidence_threshold=0.25,
        calibrated=True,
    )
    calibrated = Kangaroo.from_pretrained(pair.target, adapter, device="cpu")

    def numbers(kangaroo: Kangaroo, **settings: Any) -> tuple[int, float, int]:
        request = kangaroo.resolve([1], Settings(max_new_tokens=9, **settings))
        return request.max_drafts, request.threshold, request.auto_drafts

    assert numbers(calibrated) == (3, 0.25, 15)
    assert numbers(calibrated, num_speculative_tokens=2) == (2, 0.25, 0)
    assert numbers(calibrated, draft_confidence_threshold=0.5) == (3, 0.5, 0)
    assert numbers(calibrated, temperature=1.0, acceptance="rejection") == (3, 0.25, 0)
    assert numbers(calibrated, plain=True, draft_confidence_threshold="auto") == (0, 0.0, 0)
    other = pair.load(device="cpu")
    assert numbers(other) == (6, 0.6, 0)
    assert numbers(other, draft_confidence_threshold="auto") == (6, 0.6, 15)
    assert numbers(other, draft_confidence_threshold="auto", num_speculative_tokens=2) == (2, 0.6, 2)
    drafted = other.progress([1], max_new_tokens=60, draft_confidence_threshold="auto", num_speculative_tokens=2)
    assert max(step.commit.drafted for step in drafted) == 2


def test_rejection_sampling_has_no_auto():
    with pytest.raises(KangarooError, match="'rejection' would give other tokens every time"):
        Settings(max_new_tokens=1, draft_confidence_threshold="auto", temperature=1.0, acceptance="rejection")


def test_the_next_text_begins_where_the_search_stands(pair, clock):
    kangaroo = scripted(pair, "never", [])
    settings = {"max_new_tokens": 120, "draft_confidence_threshold": "auto"}
    first = kangaroo.generate(PROMPT, **settings).stats
    second = kangaroo.generate(PROMPT, **settings).stats
    assert second.drafted < first.drafted / 2
    assert len(kangaroo.paces) == 1
