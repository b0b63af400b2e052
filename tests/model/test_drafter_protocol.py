"""Any drafter, on both loops: the text is plain decoding's, and a loop that cannot run a drafter says so."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chi_square import REJECTED, p_value
from drafters import example_drafter
from no_host_reads import no_host_reads
from pairs import make_target
from test_bad_input import refuse

from kangaroo_kernels import Draft, Drafter, Kangaroo, Settings
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.drafters.prompt_lookup import PromptLookup
from kangaroo_kernels.model.drafters.protocol import Stage
from kangaroo_kernels.model.loop.iteration import Iteration

SAMPLINGS = ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "seed": 1, "top_k": 8, "top_p": 0.9})
RESIDENT = replace(REFERENCES, resident=True)
VOCAB = 11  # so few that guesses are right now and then
REPEATING = [5, 9, 2, 7, 5, 9, 2, 7, 5, 9, 2]


@pytest.fixture(scope="module", params=["example", "library"])
def lookup(request) -> Any:
    """The class of the example, and the library's own."""
    return PromptLookup if request.param == "library" else example_drafter()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Without an adapter."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "layers": 2, "heads": 2, "kv_heads": 1}
    return make_target(tmp_path_factory.mktemp("alone"), std=0.1, **sizes)


def load(checkpoint: Path, make: Any, resident: bool = False, **settings: Any) -> Kangaroo:
    target = Kangaroo.from_pretrained(checkpoint, device="cpu", dtype="float32", **settings).target
    if resident:
        for part in (target, *target.layers):
            part.backend = RESIDENT
    return Kangaroo(target, make(target))


def counts(kangaroo: Kangaroo, prompt: list[int], **settings: Any) -> tuple[list[int], int, int, int, int]:
    stats = (result := kangaroo.generate(prompt, **settings)).stats
    return result.tokens, stats.drafted, stats.accepted, stats.verification_steps, stats.draft_steps


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
def test_prompt_lookup_on_both_loops(checkpoint, lookup, sampling):
    """The same drafts, too, at every text length from one token on."""
    host, device = (load(checkpoint, lookup, resident) for resident in (False, True))
    drafted = accepted = 0
    for prompt in (REPEATING, [5], [5, 5, 5, 5], [1, 2, 3], REPEATING * 6):
        for most in (1, 6, 15):
            settings = {"max_new_tokens": 40, "num_speculative_tokens": most, **sampling}
            plain = host.generate(prompt, max_new_tokens=40, plain=True, **sampling).tokens
            found = counts(host, prompt, **settings)
            assert found[0] == plain
            assert counts(device, prompt, **settings) == found
            assert found[4] == (0 if lookup is PromptLookup else found[1])  # it has no network; another may have one
            drafted, accepted = drafted + found[1], accepted + found[2]
    assert drafted > accepted
    assert accepted or sampling  # a random model's samples are hard to foresee


@pytest.mark.parametrize("lookup", ["example"], indirect=True)
def test_the_example_proposes_what_followed(checkpoint, lookup):
    """Of several places the last one; without a match, nothing."""
    drafter = load(checkpoint, lookup).drafter
    for tokens, most, wanted in (
        ([1, 2, 3, 4, 1, 2, 3, 5, 9, 1, 2, 3], 2, [5, 9]),
        ([1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),
        ([1, 2, 3, 4], 9, []),
        ([7, 7, 7, 7], 3, [7]),
        ([1, 2], 3, []),
    ):
        draft = drafter.propose(SimpleNamespace(tokens=tokens), None, most, 0.0)
        assert draft.tokens.tolist() == wanted
        assert len(draft.hidden) == len(wanted) + 1


@torch.inference_mode()
def test_a_text_that_has_ended_is_not_drafted_for(checkpoint):
    """The device may begin an iteration before the host knows that the text has ended."""
    kangaroo = load(checkpoint, PromptLookup, resident=True)
    session = kangaroo.session()
    session.generate(REPEATING, max_new_tokens=9, num_speculative_tokens=3)
    request = kangaroo.resolve(REPEATING, Settings(max_new_tokens=9, num_speculative_tokens=3))
    memory = session.memory
    iteration = Iteration(kangaroo.target, kangaroo.drafter, memory.text, request, memory.runner)
    for grows in (1, 0):
        iteration.buffers.flags[0] = grows
        for stage in kangaroo.drafter.stages(iteration, 99):
            stage.work()
        assert iteration.buffers.flags.tolist() == [grows, grows, grows, 0]


def test_prompt_lookup_serves_where_no_adapter_is(checkpoint):
    kangaroo = Kangaroo.from_pretrained(checkpoint, device="cpu")
    assert kangaroo.generate(REPEATING, max_new_tokens=30).stats.accepted > 0


@pytest.mark.parametrize("threshold", [None, "auto"])
def test_prompt_lookup_on_the_kernels(checkpoint, lookup, monkeypatch, threshold):
    """In the interpreter: plain decoding's tokens, and no question to the host inside an iteration."""
    kangaroo = load(checkpoint, lookup, kernels="triton")
    assert kangaroo.target.backend.resident
    run, iterations = Iteration.run, []

    def forbidding(iteration: Iteration, reach: int) -> None:
        iterations.append(reach)
        with no_host_reads():
            run(iteration, reach)

    monkeypatch.setattr(Iteration, "run", forbidding)
    settings = {"max_new_tokens": 4, "num_speculative_tokens": 3, "draft_confidence_threshold": threshold}
    drafted = kangaroo.generate(REPEATING, **settings)
    assert drafted.stats.drafted > 0
    assert iterations
    assert drafted.tokens == kangaroo.generate(REPEATING, plain=True, **settings).tokens


class Guessing(Drafter):
    """Says random tokens; it knows no distribution of its own."""

    def __init__(self, target: Any) -> None:
        self.target, self.dice = target, random.Random(0)

    def propose(self, text, chooser, most, threshold):
        drafts = [self.dice.randrange(VOCAB) for _ in range(self.dice.randint(0, most))]
        hidden = self.target.embed([text.tokens[-1], *drafts])
        return Draft(torch.tensor(drafts, dtype=torch.int64), hidden)


def test_a_drafter_that_guesses_changes_nothing(checkpoint):
    kangaroo = load(checkpoint, Guessing)
    for sampling in SAMPLINGS:
        plain = kangaroo.generate([1, 2], max_new_tokens=60, plain=True, **sampling).tokens
        assert kangaroo.generate([1, 2], max_new_tokens=60, **sampling).tokens == plain


class Reminded(Guessing):
    """Has its drafts at hand while the text's length is even."""

    def at_hand(self, text, most, threshold):
        return len(text.tokens) % 2 == 0


def test_draft_steps_need_no_word_of_the_drafter(checkpoint):
    """As many as drafts, and none for drafts at hand or without a drafter."""
    kangaroo, known, found = load(checkpoint, Reminded), 2, set()
    for step in kangaroo.progress([1, 2], max_new_tokens=60):
        commit, even = step.commit, known % 2 == 0
        assert commit.draft_steps == (0 if even else commit.drafted)
        found.add((even, commit.drafted > 0))
        known += len(commit.tokens)
    assert len(found) == 4
    assert kangaroo.generate([1, 2], max_new_tokens=9, plain=True).stats.draft_steps == 0


class Insisting(Guessing):
    """Always says the same token, and names no distribution."""

    def propose(self, text, chooser, most, threshold):
        drafts = [3] * most
        return Draft(torch.tensor(drafts, dtype=torch.int64), self.target.embed([text.tokens[-1], *drafts]))


def test_rejection_sampling_takes_a_drafter_that_is_certain(checkpoint):
    """The distribution of the token that was drafted is the target's."""
    kangaroo = load(checkpoint, Insisting)
    settings = {"max_new_tokens": 2, "temperature": 1.0, "acceptance": "rejection", "num_speculative_tokens": 1}
    found = torch.zeros(VOCAB)
    for seed in range(3000):
        found[kangaroo.generate([1, 2], seed=seed, **settings).tokens[0]] += 1
    assert p_value(found, torch.softmax(kangaroo.logits([1, 2])[-1], dim=-1)) > REJECTED


class OnTheDevice(Drafter):
    """Has no ``propose``: nothing for the loop led by the host."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def stages(self, iteration, reach):
        def nothing() -> None:
            iteration.buffers.flags[0].zero_()
            iteration.buffers.hidden(0, 1).copy_(iteration.buffers.newest)

        yield Stage("draft", nothing)


def test_a_drafter_that_drafts_nothing(checkpoint):
    """It may lower the first flag; the text goes on all the same."""
    kangaroo = load(checkpoint, OnTheDevice, resident=True)
    plain = kangaroo.generate([1, 2], max_new_tokens=20, plain=True)
    drafted = kangaroo.generate([1, 2], max_new_tokens=20)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.drafted == 0


def test_a_loop_that_cannot_run_a_drafter(checkpoint):
    refuse(lambda: load(checkpoint, Guessing, resident=True), "Guessing has no stages()", "kernels='reference'")
    refuse(lambda: load(checkpoint, OnTheDevice), "OnTheDevice has no propose()")
    kangaroo = load(checkpoint, OnTheDevice, resident=True)
    rejecting = {"max_new_tokens": 3, "temperature": 1.0, "acceptance": "rejection"}
    refuse(lambda: kangaroo.generate([1, 2], **rejecting), "OnTheDevice has no propose()")


def test_what_is_no_drafter(checkpoint):
    """An object that only looks like one, or a class in the place of its object."""
    for wrong in (SimpleNamespace(first_layer=0), PromptLookup):
        refuse(lambda wrong=wrong: load(checkpoint, lambda target: wrong), "the drafter is", "derived from Drafter")


def test_a_drafter_of_another_target(checkpoint):
    """Its states would go into verification, and its keys into the cache."""
    targets = [Kangaroo.from_pretrained(checkpoint, device="cpu").target for _ in range(2)]
    refuse(lambda: Kangaroo(targets[0], Guessing(targets[1])), "Guessing was made for another target")


@pytest.mark.parametrize(("tokens", "rows"), [(3, 4), (2, 2), (0, 0), (1, 3)])
def test_a_draft_of_another_form(checkpoint, tokens, rows):
    class Wrong(Guessing):
        def propose(self, text, chooser, most, threshold):
            return Draft(torch.zeros(tokens, dtype=torch.int64), self.target.embed([1]).expand(rows, -1))

    kangaroo = load(checkpoint, Wrong)
    asked = {"max_new_tokens": 9, "num_speculative_tokens": 2}
    refuse(
        lambda: kangaroo.generate([1, 2], **asked), f"Wrong.propose gave {tokens} tokens and {rows} rows", "2 tokens"
    )


@pytest.mark.parametrize("given", [None, [5], Draft([5], torch.zeros(2, 8))])
def test_what_is_no_draft(checkpoint, given):
    class Wrong(Guessing):
        def propose(self, text, chooser, most, threshold):
            return given

    kangaroo = load(checkpoint, Wrong)
    refuse(lambda: kangaroo.generate([1, 2], max_new_tokens=9), "Wrong.propose must give a Draft")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("first_layer", 2, ("first_layer is 2", "0 to 1")),
        ("first_layer", None, ("first_layer is None",)),
        ("first_layer", False, ("first_layer is False",)),
        ("num_speculative_tokens", 16, ("num_speculative_tokens is 16", "1 to 15")),
        ("num_speculative_tokens", True, ("num_speculative_tokens is True",)),
        ("num_draft_steps", 16, ("num_draft_steps is 16", "0 to 15")),
        ("draft_tree", 99, ("draft_tree is 99", "0 to 15")),
        ("draft_confidence_threshold", 2.0, ("draft_confidence_threshold is 2.0", "0 to 1")),
        ("draft_confidence_threshold", True, ("draft_confidence_threshold is True",)),
    ],
)
def test_a_drafter_of_another_shape(checkpoint, attribute, value, words):
    def make(target: Any) -> Guessing:
        drafter = Guessing(target)
        setattr(drafter, attribute, value)
        return drafter

    refuse(lambda: load(checkpoint, make), *words)
