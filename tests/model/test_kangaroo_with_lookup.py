"""The adapter and prompt lookup by turns, on both loops: plain decoding's text, the same drafts, the better ones."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter, make_target
from test_auto import Leaving
from test_bad_input import refuse
from test_iteration import Forbidden

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import Experience, Match
from kangaroo_kernels.model import session as session_module
from kangaroo_kernels.model.drafters.kangaroo_with_lookup import KangarooWithLookup
from kangaroo_kernels.model.drafters.ways import CHAINS, Way, choose_way
from kangaroo_kernels.model.loop import pace
from kangaroo_kernels.model.loop.graphs import GraphRunner
from kangaroo_kernels.model.loop.iteration import Iteration
from kangaroo_kernels.model.loop.pace import Auto, Done, Limits
from kangaroo_kernels.model.loop.state import MOST_UNSEEN, TextState
from kangaroo_kernels.model.target.llama import Llama

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9})
IDS = ["greedy", "sampled", "filtered"]
REPEATING = [5, 9, 2, 7, 31] * 6
SMALL = {"vocab_size": 11, "hidden_size": 24, "intermediate_size": 40, "layers": 2, "heads": 2, "kv_heads": 1}
NEAR = {"rtol": 1e-4, "atol": 1e-4}
Loops = tuple[Kangaroo, Kangaroo]
Step = tuple[list[int], int, int, int]
"""What is committed, the drafts, those that the target agreed with, the draft steps."""


def load(target: Any, adapter: Any, **settings: Any) -> Loops:
    """The same pair on the loop led by the host and on the resident one."""
    host, device = (
        Kangaroo.from_pretrained(target, adapter, device="cpu", prompt_lookup=True, **settings) for _ in range(2)
    )
    return host, on_the_device(device)


@pytest.fixture
def loops(pair) -> Loops:
    return load(*pair)


def guess(
    kangaroo: Kangaroo, text: list[int] | None = None, lengths: tuple[int, ...] = (0, 3, 4, 7, 15), right: float = 0.8
) -> None:
    """Put guesses in the place of ``look_up``: matches of some lengths, whose tokens are as often ``right``."""

    def look_up(known: torch.Tensor, length: Any, most: int, least: int, *, out: Any = None, **_: Any) -> Match:
        dice, place = random.Random(int(length)), int(length)
        wanted = [] if text is None else text[place : place + 15]
        tokens = [token if dice.random() < right else dice.randrange(67) for token in wanted]
        tokens += [dice.randrange(67) for _ in range(15 - len(tokens))]
        found = Match(torch.tensor(tokens[:most]), torch.tensor([dice.choice((*lengths, least))]))
        return found if out is None else Match(*(kept.copy_(new) for kept, new in zip(out, found, strict=True)))

    kangaroo.target.backend = replace(kangaroo.target.backend, look_up=look_up)


def steps(kangaroo: Any, prompt: list[int], **settings: Any) -> list[Step]:
    """What each step did."""
    commits = [step.commit for step in kangaroo.progress(prompt, **settings)]
    return [(each.tokens, each.drafted, each.agreed, each.draft_steps) for each in commits]


def text_of(found: list[Step]) -> list[int]:
    return [token for tokens, *_ in found for token in tokens]


def same_steps(loops: Loops, prompt: list[int], **settings: Any) -> list[Step]:
    """Those of both loops, whose text is plain decoding's."""
    host, device = loops
    found = steps(host, prompt, **settings)
    assert steps(device, prompt, **settings) == found
    drafting = ("num_speculative_tokens", "draft_confidence_threshold")
    plain = {name: value for name, value in settings.items() if name not in drafting}
    assert host.generate(prompt, plain=True, **plain).tokens == text_of(found)
    return found


def test_only_new_tokens_go_to_the_device(loops: Loops) -> None:
    """A step led by the host looks up in a copy of the text that grows with it."""
    text = TextState([1, 2, 3], loops[0].target.new_cache())
    assert text.on_device().tolist() == [1, 2, 3]
    text.on_device()[0] = 9  # what was copied stays as it is
    text.tokens += [4, 5]
    assert text.on_device().tolist() == [9, 2, 3, 4, 5]
    text.tokens += [6, 7]  # there is no room, so all are copied anew
    assert text.on_device().tolist() == [1, 2, 3, 4, 5, 6, 7] and text.on_device().dtype == torch.int64


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("drafts", [None, 2, 15])
def test_whatever_is_looked_up_changes_nothing(loops, sampling, drafts):
    asked = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.2, "max_new_tokens": 60, **sampling}
    for prompt in ([3, 5, 9], [15] * 70):
        plain = loops[0].generate(prompt, max_new_tokens=60, plain=True, **sampling).tokens
        for text in (None, [*prompt, *plain]):
            for each in loops:
                guess(each, text)
            found = same_steps(loops, prompt, **asked)
            assert sum(drafted for _, drafted, *_ in found) > 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("lag", [0, 2])
def test_both_loops_choose_alike(loops, sampling, lag, monkeypatch):
    """With what is really looked up, whether the host reads at once or two iterations later."""
    device_steps = session_module.device_steps
    monkeypatch.setattr(session_module, "device_steps", lambda *args, **named: device_steps(*args, **named, lag=lag))
    lengths = set()
    for prompt in (REPEATING, [3, 5, 9], [7], [15] * 70):
        for threshold in (0.0, 0.72):
            asked = {"draft_confidence_threshold": threshold, "max_new_tokens": 50, **sampling}
            lengths |= {drafted for _, drafted, *_ in same_steps(loops, prompt, **asked)}
    most = loops[0].drafter.num_draft_steps
    assert min(lengths) < most < max(lengths)


@pytest.mark.parametrize("asks", [lambda step: 4, lambda step: 6 * (step % 3 == 0), lambda step: max(0, 6 - step % 10)])
def test_both_loops_draft_the_same_within_changing_limits(loops, asks):
    """Nothing at times, too; a looked-up token's confidence is how likely it is to stand."""
    found = []
    for kangaroo in loops:
        pace = Leaving(asks)
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(session_module, "pace_of", lambda *_, pace=pace, **__: pace)
            written = kangaroo.generate(REPEATING, max_new_tokens=60, draft_confidence_threshold="auto")
        found.append((pace.drafts, written.tokens))
    (by_the_host, wanted), (on_it, tokens) = found
    assert tokens == wanted
    for one, other in zip(by_the_host[:-4], on_it, strict=False):  # at the end the host's loop has room for fewer
        assert one == (*other[:2], pytest.approx(other[2], abs=1e-5))


@pytest.mark.parametrize("loop", [0, 1], ids=["host", "device"])
def test_auto_bounds_the_adapter_alone(loops, monkeypatch, loop):
    """Where drafting is to stop, what is looked up is drafted all the same, and the search is told so."""
    told = []

    class Never(Auto):
        def limits(self, room: int, at_hand: bool = False) -> Limits:
            return super().limits(room, at_hand) if at_hand else Limits(0, 1.0)

        def record(self, done: Done) -> None:
            told.append((done.at_hand, done.drafts))

    kangaroo = loops[loop]
    most = kangaroo.drafter.num_draft_steps
    monkeypatch.setattr(pace, "Auto", Never)
    guess(kangaroo, [*REPEATING, *[0] * 60])
    kangaroo.generate(REPEATING, max_new_tokens=60, draft_confidence_threshold="auto")
    assert {at_hand for at_hand, drafts in told if drafts} == {True}
    assert {at_hand for at_hand, drafts in told if not drafts} == {False}
    assert max(drafts for _, drafts in told) > most
    assert set(kangaroo.paces) == {(Limits(most, 0.6), Limits(15, 0.6), most if loop else 15, bool(loop))}


@pytest.mark.parametrize("loop", [0, 1], ids=["host", "device"])
@pytest.mark.parametrize("settings", [*SAMPLINGS, {"draft_confidence_threshold": "auto"}], ids=[*IDS, "auto"])
def test_a_conversation(loops, settings, loop):
    """Turn by turn what a fresh session gives, counts included where the clock has no part in them."""
    kangaroo, text = loops[loop], []
    session = kangaroo.session()
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


def test_looked_up_tokens_take_no_draft_steps(loops, monkeypatch):
    """The head is asked once a draft step; both loops count the same, step by step."""
    guess, asked = KangarooWithLookup.guess, []
    monkeypatch.setattr(KangarooWithLookup, "guess", lambda self, *args: (asked.append(1), guess(self, *args))[1])
    found = same_steps(loops, REPEATING, max_new_tokens=60, draft_confidence_threshold=0.0)
    assert sum(taken for *_, taken in found) == len(asked) > 0
    most = loops[0].drafter.num_draft_steps
    assert all(taken in ((0,) if drafted > most else (0, drafted)) for _, drafted, _, taken in found)
    assert any(drafted > most for _, drafted, *_ in found)


def test_a_text_forgets_what_the_one_before_learned(loops):
    for kangaroo in loops:
        session, asked = kangaroo.session(), {"max_new_tokens": 40, "draft_confidence_threshold": 0.0}
        wanted = steps(session, REPEATING, **asked)
        session.memory.drafter_memory.experience.beside.fill_(1e9)  # it would never look up again
        assert steps(session, [3, *REPEATING], **asked) == steps(kangaroo.session(), [3, *REPEATING], **asked)
        assert steps(session, REPEATING, **asked) == wanted


def after_steps(kangaroo: Kangaroo, count: int, loop: int) -> tuple[Any, torch.Tensor]:
    """Some steps in, whoever drafted, the adapter's cache is that of a prefill of the same text.

    Returns what the drafter keeps of the text, and the exit layer's states that the adapter has yet to see.
    """
    text = list(REPEATING)
    plain = kangaroo.generate(REPEATING, max_new_tokens=60, plain=True).tokens
    guess(kangaroo, [*REPEATING, *plain])
    session = kangaroo.session()
    writing = session.progress(REPEATING, max_new_tokens=60, draft_confidence_threshold=0.0)
    for _ in range(count):
        text += next(writing).commit.tokens
    memory = session.memory.drafter_memory
    target, adapter = kangaroo.target, kangaroo.drafter.adapter
    caches = target.new_cache(), adapter.new_cache()
    for cache in caches:
        cache.reserve(len(text))
    states = target.run(target.embed(text[:-1]), caches[0], 0, 0, kangaroo.drafter.first_layer)
    adapter.run(states, caches[1], 0)
    seen = len(text) - 2 if loop else memory.length  # on the device it lags by one at most
    for ours, wanted in ((memory.cache.keys, caches[1].keys), (memory.cache.values, caches[1].values)):
        torch.testing.assert_close(ours[0][:, :seen], wanted[0][:, :seen], **NEAR)
    return memory, states[seen:]


@pytest.mark.parametrize("loop", [0, 1], ids=["host", "device"])
@pytest.mark.parametrize("count", range(1, 9))
def test_the_adapter_catches_up(loops, count, loop):
    """What it holds, and what it is to run yet, are those of a prefill of the same text."""
    memory, unseen = after_steps(loops[loop], count, loop)
    if not loop:
        torch.testing.assert_close(torch.cat([*memory.missed, unseen[:0]]), unseen, **NEAR)


def test_text_that_repeats_itself_is_looked_up(tmp_path):
    """The target falls into a loop, and the adapter knows nothing."""
    target = make_target(tmp_path / "target", std=0.1, **SMALL)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1)
    alone = Kangaroo.from_pretrained(target, adapter, device="cpu", prompt_lookup=False)
    found = same_steps(load(target, adapter), [1, 2, 3], max_new_tokens=100)
    assert 2 * len(found) < alone.generate([1, 2, 3], max_new_tokens=100).stats.verification_steps
    assert max(agreed for _, _, agreed, _ in found) > 6  # more than the adapter may draft


def test_the_way_that_does_not_draft_is_left_out(loops, monkeypatch):
    """On the device: the shallow layers run on all rows at once, or on the first one and then step by step."""
    run, ran = Llama.run, []

    def noted(target: Llama, hidden: torch.Tensor, *args: Any, active: Any = None, **named: Any) -> torch.Tensor:
        if active is not None:
            ran.append((len(hidden), int(active)))
        return run(target, hidden, *args, active=active, **named)

    monkeypatch.setattr(Llama, "run", noted)
    steps(loops[1], REPEATING, max_new_tokens=40, draft_confidence_threshold=0.0)
    ways = [(at_once, ran[place + 1][1]) for place, (rows, at_once) in enumerate(ran) if rows == 16]
    assert {*ways} == {(1, 0), (0, 1)}


def test_a_stop_token_inside_a_looked_up_draft(loops):
    plain = loops[0].generate(REPEATING, max_new_tokens=60, plain=True).tokens
    for each in loops:
        guess(each, [*REPEATING, *plain])
    cut = 0
    for stop in dict.fromkeys(plain):
        (*_, last) = same_steps(loops, REPEATING, max_new_tokens=60, stop=[stop])
        cut += last[2] >= len(last[0])  # drafts beyond it would have stood
    assert cut > 3


def test_a_context_that_ends(loops):
    """Nothing is drafted past the end."""
    length = loops[0].target.config.max_position_embeddings
    for left in (1, 2, 5, 17):
        found = same_steps(
            loops, (REPEATING * 20)[: length - left], max_new_tokens=left, draft_confidence_threshold=0.0
        )
        assert len(text_of(found)) == left
        assert all(drafted < left for _, drafted, *_ in found)


def test_the_adapter_drafts_where_it_expects_more(loops, monkeypatch):
    """And makes no more drafts than its own configuration says."""
    monkeypatch.setattr(Experience, "forget", lambda experience: experience.beside.fill_(1e9))
    for each in loops:
        guess(each)
    found = same_steps(loops, [1, 2, 3], max_new_tokens=40, draft_confidence_threshold=0.0)
    drafter = loops[0].drafter
    assert max(drafted for _, drafted, *_ in found) == drafter.num_draft_steps < drafter.num_speculative_tokens


@pytest.mark.parametrize("kind", [{"deep_state_size": 20, "std": 0.1}, {"mlp": True}], ids=["deep state", "MLP"])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=IDS[:2])
def test_adapters_of_other_kinds(tmp_path, kind, sampling):
    target = make_target(tmp_path / "target", quiet_from=1, quiet=0.2, **(SMALL | {"layers": 3}))
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1, copy_layer=1, **kind)
    loops = load(target, adapter)
    for prompt in ([1, 2, 3], [5, 9, 2, 7] * 5):
        found = same_steps(loops, prompt, max_new_tokens=60, draft_confidence_threshold=0.1, **sampling)
        assert sum(agreed for _, _, agreed, _ in found) > 5


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_a_captured_iteration_serves_both(loops, monkeypatch, sampling):
    """One graph, whichever of the two drafts, whatever the limits; what is replayed is the first request's work."""
    first: dict[Any, Callable[[], None]] = {}
    monkeypatch.setattr(GraphRunner, "run", lambda runner, key, work: first.setdefault(key, work)())
    for threshold in (0.3, 0.75, 0.0):
        asked = {"max_new_tokens": 30, "draft_confidence_threshold": threshold, **sampling}
        host, device = loops
        for prompt in (REPEATING, [3, 5, 9]):
            assert steps(device, prompt, **asked) == steps(host, prompt, **asked)
    assert len(first) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's way to see it")
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=IDS[:2])
def test_the_kernels_never_ask_the_host(tmp_path, sampling, monkeypatch):
    """And draft what the references draft, from a prompt of one token on."""
    target = make_target(tmp_path / "target", quiet_from=1, quiet=0.2, **SMALL)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1, copy_layer=1, num_speculative_tokens=2)
    kernels = Kangaroo.from_pretrained(
        target, adapter, device="cpu", prompt_lookup=True, kernels="triton", dtype="float32"
    )
    host, _ = load(target, adapter)
    forbidden, asked = Forbidden(), {"num_speculative_tokens": 4, "max_new_tokens": 8, **sampling}
    monkeypatch.setattr(Iteration, "run", forbidden.run)
    for prompt in ([7], [5, 9, 2, 7] * 4):
        assert steps(kernels, prompt, **asked) == steps(host, prompt, **asked)
    assert forbidden.iterations > 0
    assert len(kernels.generate([5, 9, 2] * 3, max_new_tokens=4, draft_confidence_threshold="auto").tokens) == 4
    wanted = [each.generate([5, 9, 2] * 3, max_new_tokens=4, repetition_penalty=1.1) for each in (kernels, host)]
    assert wanted[0].tokens == wanted[1].tokens  # led by the host, on the kernels


def test_on_which_ways_it_drafts(pair):
    """An adapter whose default it is has it on both loops; drafting in one launch has no room for it."""
    default, chosen = Way(prompt_lookup=True), {"draft_tree": None, "prompt_lookup": None}
    assert choose_way(default, **chosen, persistent=False) == default
    assert choose_way(default, **chosen, persistent=True) == CHAINS
    loaded = pair.load(device="cpu", prompt_lookup=True, kernels="triton", dtype="float32")
    assert isinstance(loaded.drafter, KangarooWithLookup)
    assert loaded.target.backend.resident
    refuse(lambda: pair.load(device="cpu", prompt_lookup=True, persistent=True), "persistent=True", "prompt_lookup")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_on_a_gpu_graphs_change_nothing(pair, sampling):
    """Captured or launched kernel by kernel: the same steps, and plain decoding's tokens."""
    captured, launched = (pair.load(dtype="bfloat16", graphs=graphs, prompt_lookup=True) for graphs in (True, False))
    for prompt in (REPEATING, [7], [15] * 70):
        asked = {"max_new_tokens": 100, "draft_confidence_threshold": 0.3, **sampling}
        found = steps(captured, prompt, **asked)
        assert steps(launched, prompt, **asked) == found
        assert captured.generate(prompt, max_new_tokens=100, plain=True, **sampling).tokens == text_of(found)


@pytest.mark.parametrize("tree", [None, 6], ids=["chain", "tree"])
def test_a_looked_up_token_that_overflows(pair, tree, monkeypatch):
    """It spoils the newest token's row beside it; that one then goes through alone, as in plain decoding."""
    kangaroo = pair.load(device="cpu", prompt_lookup=True, draft_tree=tree)
    whole = kangaroo.generate(REPEATING, max_new_tokens=40, plain=True).tokens
    never = next(token for token in range(67) if token not in (*REPEATING, *whole))
    kangaroo.target.weights.embedding[never] = torch.inf

    def look_up(known: Any, length: Any, most: int, least: int, **_: Any) -> Match:
        return Match(torch.full((most,), never), torch.tensor([15 if int(length) % 3 else 0]))

    kangaroo.target.backend = replace(kangaroo.target.backend, look_up=look_up)
    said, embed = [], kangaroo.target.embed
    monkeypatch.setattr(kangaroo.target, "embed", lambda tokens: (said.extend(tokens), embed(tokens))[1])
    session = kangaroo.session()
    for _ in range(2):
        said.clear()
        found = session.generate(REPEATING, max_new_tokens=40, draft_confidence_threshold=0.0)
        assert found.tokens == whole
        assert never in said  # it was drafted
    memory = session.memory.drafter_memory
    assert memory.cache.keys[0][:, : memory.length].isfinite().all()  # nor does it spoil the adapter
    assert all(rows.isfinite().all() for rows in memory.missed)


@pytest.mark.parametrize("missed", [(), (3,), (15,), (16,), (20, 19)])
@pytest.mark.parametrize("deep", [0, 24])
def test_many_missed_rows_are_a_prefill_for_the_adapter(pair, tmp_path, missed, deep, monkeypatch):
    """After a long passage of looked-up tokens: keys and values are all that it computes of them."""
    folder = make_adapter(tmp_path / "adapter", pair.target, exit_layer=1, deep_state_size=deep)
    drafter = Kangaroo.from_pretrained(pair.target, folder, device="cpu", prompt_lookup=True).drafter
    adapter, memory, count = drafter.adapter, drafter.new_memory(), 1 + sum(missed)
    cache, rows, states = adapter.new_cache(), torch.randn(count, 48), torch.randn(count, 48) if deep else None
    for each in (cache, memory.cache):
        each.reserve(count)
    wanted = adapter.run(rows, cache, 0, states)
    memory.missed, memory.states = [*rows[:-1].split(missed)] if missed else [], states
    run, ran = adapter.run, []
    monkeypatch.setattr(adapter, "run", lambda rows, *others: (ran.append(len(rows)), run(rows, *others))[1])
    torch.testing.assert_close(drafter.run_adapter(memory, rows[-1:]), wanted[-1:], **NEAR)
    torch.testing.assert_close(memory.cache.keys[0][:, :count], cache.keys[0][:, :count], **NEAR)
    torch.testing.assert_close(memory.cache.values[0][:, :count], cache.values[0][:, :count], **NEAR)
    assert ran == [count if count <= 16 else 1]
    assert (memory.length, memory.missed) == (count, [])
