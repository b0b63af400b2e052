"""Trees of drafts: the text is plain decoding's for any tree, and the caches are those of a chain afterwards."""

import random
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter
from test_bad_input import refuse
from test_iteration import Forbidden
from trees import random_parents

from kangaroo_kernels import Draft, Drafter, Kangaroo
from kangaroo_kernels.contract import MAX_CHILDREN
from kangaroo_kernels.model.drafters.growth import widths
from kangaroo_kernels.model.drafters.tree import TreeDrafter
from kangaroo_kernels.model.loop.iteration import Iteration

PROMPT = [7, 3, 5]
SAMPLINGS = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.9, "seed": 2, "min_p": 0.05, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "logprobs": 3},
)
VOCAB = 67


class Grown(Drafter):
    """Random trees, in which a row is now and then what plain decoding says there.

    Attributes:
        text: what plain decoding says, prompt included; drafts are right as often as ``right`` says.
        crooked: how many trees had their path beside the rows 0, 1, 2, ...
    """

    def __init__(self, target: Any) -> None:
        self.target, self.dice, self.text, self.right = target, random.Random(0), PROMPT, 0.8
        self.crooked = 0

    def propose(self, text, chooser, most, threshold):
        parents = random_parents(self.dice, self.dice.randint(0, 15) if most else 0)
        depths, tokens, kept = [0], [], []
        for wanted in parents:
            parent = 0 if depths[wanted] == most else wanted
            place = len(text.tokens) + depths[parent]
            right = place < len(self.text) and self.dice.random() < self.right
            tokens.append(self.text[place] if right else self.dice.randrange(VOCAB))
            depths.append(depths[parent] + 1)
            kept.append(parent)
        hidden = self.target.embed([text.tokens[-1], *tokens])
        return Draft(torch.tensor(tokens, dtype=torch.int64), hidden, parents=tuple(kept))

    def straighten(self, text, path, position):
        assert position == text.newest
        self.crooked += path.tolist() != list(range(len(path)))


def facts(kangaroo: Any, prompt: list[int], **settings: Any) -> tuple[Any, ...]:
    written = kangaroo.generate(prompt, **settings)
    return written.tokens, written.finish_reason, written.logprobs and [each.token for each in written.logprobs]


@pytest.fixture(scope="module")
def plain(pair) -> Kangaroo:
    return pair.load(device="cpu")


@pytest.fixture
def grown(plain) -> Kangaroo:
    return Kangaroo(plain.target, Grown(plain.target), plain.tokenizer)


@pytest.fixture(scope="module")
def trees(pair) -> Kangaroo:
    return pair.load(device="cpu", draft_tree=15)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_random_trees_change_nothing(plain, grown, sampling):
    """Right and wrong branches, in any order, with stop tokens and ends inside them."""
    whole = plain.generate(PROMPT, max_new_tokens=60, plain=True, **sampling).tokens
    grown.drafter.text = PROMPT + whole
    accepted = 0
    for most, new_tokens, stop in product((1, 4, 15), (1, 2, 7, 60), ((), (whole[11],), (whole[40],))):
        settings = {"max_new_tokens": new_tokens, "stop": stop, **sampling}
        wanted = facts(plain, PROMPT, plain=True, **settings)
        written = grown.generate(PROMPT, num_speculative_tokens=most, **settings)
        assert (written.tokens, written.finish_reason) == wanted[:2]
        if "logprobs" in sampling:
            both = zip(written.logprobs, plain.generate(PROMPT, plain=True, **settings).logprobs, strict=True)
            assert all(one.logprob == pytest.approx(other.logprob, abs=1e-4) for one, other in both)
        accepted += written.stats.accepted
    assert accepted > 100
    assert grown.drafter.crooked > 20


def test_a_tree_takes_as_many_draft_steps_as_its_longest_branch(grown):
    """Unless its drafter says another number."""
    for most in (1, 4):
        commits = [step.commit for step in grown.progress(PROMPT, max_new_tokens=60, num_speculative_tokens=most)]
        assert max(each.drafted for each in commits) == 15
        assert max(each.draft_steps for each in commits) == most
        assert all(each.draft_steps <= each.drafted for each in commits)
    parents = (0, 0, 2, 1, 3)
    draft = Draft(torch.zeros(5, dtype=torch.int64), torch.zeros(6, 8), parents=parents)
    assert (draft.draft_steps, Draft(draft.tokens, draft.hidden).draft_steps) == (3, 5)
    assert Draft(draft.tokens, draft.hidden, parents=parents, steps=7).draft_steps == 7


def test_the_context_ends_inside_a_branch(plain, grown):
    prompt = [dice % VOCAB for dice in range(plain.target.config.context_length - 9)]
    wanted = facts(plain, prompt, max_new_tokens=40, plain=True)
    grown.drafter.text = prompt + wanted[0]
    assert facts(grown, prompt, max_new_tokens=40, num_speculative_tokens=15) == wanted
    assert wanted[1] == "context"


def test_rejection_sampling_takes_a_trees_drafts_for_candidates(plain, grown):
    """The target's own sample decides, so the text is even that of plain sampling."""
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 9}
    wanted = plain.generate(PROMPT, plain=True, **settings).tokens
    grown.drafter.text = PROMPT + wanted
    written = grown.generate(PROMPT, acceptance="rejection", **settings)
    assert written.tokens == wanted
    assert written.stats.accepted > 5


# ---- Kangaroo's own


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_its_trees_change_nothing(plain, trees, sampling):
    accepted = 0
    for most, threshold, new_tokens in product((1, 3, 15), (0.0, 0.1, 1.0), (1, 3, 60)):
        wanted = facts(plain, PROMPT, max_new_tokens=new_tokens, plain=True, **sampling)
        settings = {"num_speculative_tokens": most, "draft_confidence_threshold": threshold, **sampling}
        written = trees.generate(PROMPT, max_new_tokens=new_tokens, **settings)
        assert (written.tokens, written.finish_reason) == wanted[:2]
        accepted += written.stats.accepted
    assert accepted > 20


def test_a_draft_step_for_each_round(trees, monkeypatch):
    """Which may add a row behind an earlier round's rows alone, so no branch need be as long as there were rounds."""
    rank, propose, ranked, longest = TreeDrafter.rank, TreeDrafter.propose, [], []

    def proposed(self: Any, *args: Any) -> Draft:
        longest.append((draft := propose(self, *args)).longest)
        return draft

    monkeypatch.setattr(TreeDrafter, "rank", lambda self, *args: (ranked.append(1), rank(self, *args))[1])
    monkeypatch.setattr(TreeDrafter, "propose", proposed)
    written = trees.generate(PROMPT, max_new_tokens=60, num_speculative_tokens=6, draft_confidence_threshold=0.0)
    assert sum(longest) < written.stats.draft_steps == len(ranked) < written.stats.drafted


def test_the_next_token_is_found_more_often(plain, trees):
    settings = {"max_new_tokens": 200, "num_speculative_tokens": 1, "draft_confidence_threshold": 0.0}
    chain, tree = (each.generate(PROMPT, **settings).stats for each in (plain, trees))
    assert tree.draft_acceptance_rate < chain.draft_acceptance_rate
    assert tree.mean_acceptance_length > 1.1 * chain.mean_acceptance_length


@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_the_caches_are_those_of_the_text(pair, trees, threshold):
    """Of the target, the shallow layers and the adapter: as if each text had been a prompt."""
    settings = {"num_speculative_tokens": 4, "draft_confidence_threshold": threshold}
    session, other = trees.session(), pair.load(device="cpu").session()
    written = session.generate(PROMPT, max_new_tokens=90, **settings)
    assert written.stats.accepted > 5
    text = PROMPT + written.tokens
    other.generate([*text, 1], max_new_tokens=1, num_speculative_tokens=1)
    length = min(session.memory.drafter_memory.length, len(text) - 2)
    assert length > 80
    for ours, theirs in (
        (session.memory.cache, other.memory.cache),
        (session.memory.drafter_memory.cache, other.memory.drafter_memory.cache),
    ):
        for name in ("keys", "values"):
            for one, two in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                torch.testing.assert_close(one[:, :length], two[:, :length], rtol=1e-4, atol=1e-4)


def test_a_conversation_keeps_what_it_ran(plain, trees):
    """Turn by turn the tokens of plain decoding, and only what is new is run."""
    session, text = trees.session(), []
    for question in ([5, 6, 7], [11], [12] * 40, [13, 14]):
        text += question
        settings = {"max_new_tokens": 20, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.1}
        written = session.generate(text, **settings)
        assert written.tokens == plain.generate(text, max_new_tokens=20, plain=True).tokens
        assert written.stats.cached_tokens == max(0, len(text) - len(question) - 3)
        fresh = trees.generate(text, **settings).stats
        assert (written.stats.drafted, written.stats.accepted) == (fresh.drafted, fresh.accepted)
        text += written.tokens


def test_a_head_of_some_tokens(pair, plain, tmp_path):
    from pairs import with_vocabulary

    adapter = with_vocabulary(pair.adapter, tmp_path / "some", range(0, VOCAB, 2))
    some = Kangaroo.from_pretrained(pair.target, adapter, device="cpu", draft_tree=8)
    for sampling in SAMPLINGS:
        settings = {"draft_confidence_threshold": 0.05, **sampling}
        written = some.generate(PROMPT, max_new_tokens=40, **settings)
        assert written.tokens == plain.generate(PROMPT, max_new_tokens=40, plain=True, **sampling).tokens
        assert written.stats.drafted > 0


def test_nan_drafts_nothing_and_changes_nothing(plain, trees):
    """An adapter whose output is NaN throughout."""
    drafter = TreeDrafter(trees.target, trees.drafter.adapter, 9)
    drafter.adapter.run, run = lambda hidden, *a, **k: run(hidden, *a, **k) * float("nan"), drafter.adapter.run
    try:
        written = Kangaroo(trees.target, drafter).generate(PROMPT, max_new_tokens=20)
    finally:
        drafter.adapter.run = run
    assert written.tokens == plain.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    assert written.stats.drafted == 0


# ---- the loop on the device


@pytest.fixture
def resident(pair) -> Kangaroo:
    return on_the_device(pair.load(device="cpu", draft_tree=15))


def counts(kangaroo: Any, prompt: list[int] = PROMPT, **settings: Any) -> tuple[Any, ...]:
    stats = (written := kangaroo.generate(prompt, **settings)).stats
    rounds = stats.verification_steps, stats.draft_steps
    return written.tokens, written.finish_reason, stats.drafted, stats.accepted_at, *rounds


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_it_does_what_the_host_loop_does(trees, resident, sampling):
    """The same trees: in the last steps, too, where their branches have no room, and behind a stop token."""
    drafted = 0
    for most, threshold in product((1, 3, 15), (0.0, 0.2, 1.0)):
        settings = {"num_speculative_tokens": most, "draft_confidence_threshold": threshold, **sampling}
        for new_tokens, stop in (
            (1, ()),
            (4, ()),
            (40, ()),
            (40, (trees.generate(PROMPT, max_new_tokens=9).tokens[8],)),
        ):
            wanted = counts(trees, max_new_tokens=new_tokens, stop=stop, **settings)
            found = counts(resident, max_new_tokens=new_tokens, stop=stop, **settings)
            assert found[:2] == wanted[:2]
            if most <= 3:  # the host shares out the rows anew where there is room for fewer rounds
                assert found[3:] == wanted[3:]
            drafted += found[2]
    assert drafted > 100


@pytest.mark.parametrize("rows", [3, 15])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_both_loops_count_rounds_alike(pair, rows, threshold):
    """Step by step, where there is room for all rounds; also where there are fewer rows than rounds might be."""
    host, device = (pair.load(device="cpu", draft_tree=rows) for _ in range(2))
    settings = {"num_speculative_tokens": 6, "draft_confidence_threshold": threshold}
    found = []
    for kangaroo in (host, on_the_device(device)):
        steps = kangaroo.progress(PROMPT, max_new_tokens=60, **settings)
        roomy = [each.commit for each in steps if len(each.generation.tokens) - len(each.commit.tokens) < 60 - 6]
        found.append([(each.tokens, each.drafted, each.draft_steps) for each in roomy])
    assert found[0] == found[1]
    assert max(rounds for *_, rounds in found[0]) == min(rows, 6)


def test_texts_leave_nothing_behind(trees, resident):
    """Longer, shorter, plain, of other depths: all through the same buffers, which a text that went wrong spoils."""
    session = resident.session()
    for prompt, most, plain in product((PROMPT, [5] * 50, [1, 2]), (4, 2), (False, True)):
        settings = {"max_new_tokens": 9, "num_speculative_tokens": most, "plain": plain}
        assert counts(session, prompt, **settings)[:2] == counts(trees, prompt, **settings)[:2]
        with torch.inference_mode():
            for buffer in session.memory.runner._buffers.values():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 2**30)
        session.memory.forget()


def test_a_prompt_and_a_context_that_end(trees, resident):
    for length in (resident.target.config.context_length, resident.target.config.context_length - 5):
        prompt = [token % VOCAB for token in range(length)]
        assert counts(resident, prompt, max_new_tokens=9)[:2] == counts(trees, prompt, max_new_tokens=9)[:2]


def hold_texts(kangaroo: Any, wanted: Any, settings: dict[str, Any]) -> tuple[Any, ...]:
    """The text of trees is what ``wanted`` decodes plainly; returns what was counted."""
    plain = {name: value for name, value in settings.items() if not name.startswith(("num_spec", "draft_conf"))}
    found = counts(kangaroo, **settings)
    assert found[0] == wanted.generate(PROMPT, plain=True, **plain).tokens
    assert found[2] > 0
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_the_kernels_never_ask_the_host(pair, device, trees, monkeypatch, sampling):
    """In the interpreter: plain decoding's tokens, and the same trees as the references'."""
    kernels = pair.load(device=device, kernels="triton", dtype="float32", draft_tree=5)
    forbidden = Forbidden()
    if device.type == "cpu":
        monkeypatch.setattr(Iteration, "run", forbidden.run)
    settings = {"max_new_tokens": 6, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.1, **sampling}
    found = hold_texts(kernels, trees, settings)
    assert forbidden.iterations or device.type != "cpu"
    monkeypatch.undo()
    assert found == counts(on_the_device(pair.load(device="cpu", draft_tree=5)), **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_on_a_gpu_graphs_change_nothing(pair, sampling):
    """Captured, or launched kernel by kernel, and led by the host where rows of logits are needed."""
    ways = [pair.load(dtype="bfloat16", draft_tree=15, graphs=graphs) for graphs in (True, False)]
    for most, threshold, new_tokens in product((1, 3, 15), (0.0, 0.2), (9, 120)):
        limits = {"num_speculative_tokens": most, "draft_confidence_threshold": threshold}
        captured, launched = (
            hold_texts(each, ways[1], {"max_new_tokens": new_tokens, **limits, **sampling}) for each in ways
        )
        assert captured == launched


# ---- how a tree grows


def test_rows_are_shared_out_over_the_rounds():
    for rows, rounds in product(range(1, 16), range(1, 16)):
        counts = list(widths(rows, rounds))
        assert len(counts) == min(rows, rounds)
        assert sum(counts) == min(rows, MAX_CHILDREN * len(counts))
        assert all(one >= other for one, other in pairwise(counts))


# ---- refusals


@pytest.mark.parametrize(
    ("tokens", "parents", "words"),
    [
        (2, (0,), "2 tokens, 3 rows and the parents (0,)"),
        (2, (0, 2), "an earlier row that it follows"),
        (2, (-1, 0), "an earlier row that it follows"),
        (16, (0,) * 16, "up to 15 tokens"),
        (4, (0, 1, 2, 3), "a branch of 4 tokens; it may give up to 3"),
    ],
)
def test_a_tree_of_another_form(plain, tokens, parents, words):
    class Wrong(Grown):
        def propose(self, text, chooser, most, threshold):
            hidden = self.target.embed([1] * (tokens + 1))
            return Draft(torch.zeros(tokens, dtype=torch.int64), hidden, parents=parents)

    wrong = Kangaroo(plain.target, Wrong(plain.target))
    refuse(lambda: wrong.generate(PROMPT, max_new_tokens=9, num_speculative_tokens=3), "Wrong.propose gave", words)


def test_what_cannot_draft_trees(pair, tmp_path):
    for rows in (-1, 16, 2.0, True):
        refuse(lambda rows=rows: pair.load(device="cpu", draft_tree=rows), "draft_tree is", "from 1 to 15")
    refuse(lambda: pair.load(device="cpu", draft_tree=4, persistent=True), "persistent=True drafts chains")
    deep = make_adapter(tmp_path / "deep", pair.target, exit_layer=2, deep_state_size=8)
    refuse(lambda: Kangaroo.from_pretrained(pair.target, deep, draft_tree=4), "deep state")
    halved = pair.load(device="cpu", dtype="float16", kv_dtype="float16")
    refuse(lambda: TreeDrafter(halved.target, halved.drafter.adapter, 4), "float16 cache", "kv_dtype")
    own = Kangaroo(halved.target, Grown(halved.target))
    refuse(lambda: own.generate(PROMPT, max_new_tokens=9), "kv_dtype", "chains alone")
    alone = {"device": "cpu", "draft_tree": 4}
    refuse(lambda: Kangaroo.from_pretrained(pair.target, **alone), "draft_tree needs an adapter")
    trees = pair.load(**alone)
    asked = {"max_new_tokens": 4, "draft_confidence_threshold": "auto"}
    refuse(lambda: trees.generate(PROMPT, **asked), "drafts trees; give a number")
