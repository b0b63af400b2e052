"""Adapters that draft a block: several tokens from one pass, each corrected by the draft before it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import on_the_device, with_drafter
from no_host_reads import iterations_ask_nothing
from pairs import make_adapter, make_target, with_vocabulary
from torch import Tensor

from kangaroo_kernels import Kangaroo, KangarooError, Session
from kangaroo_kernels.contract import Top1
from kangaroo_kernels.model.drafters.block import BlockDrafter
from kangaroo_kernels.model.drafters.parts import Parts
from kangaroo_kernels.model.sampling import Chooser
from kangaroo_kernels.model.target.checkpoint import read_tensors
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "layers": 3, "heads": 2, "kv_heads": 1}
SAMPLINGS = ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9})
PROMPT = [7, 3, 5, 11, 2]
PLACES = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("block")
    target = make_target(folder / "target", **SIZES, quiet_from=1, quiet=0.2)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1, draft_block=PLACES, std=0.2)
    return target, adapter


@pytest.fixture
def host(folders) -> Kangaroo:
    return Kangaroo.from_pretrained(*folders, device="cpu")


@pytest.fixture
def resident(folders) -> Kangaroo:
    return on_the_device(Kangaroo.from_pretrained(*folders, device="cpu"))


def counts(kangaroo: Kangaroo | Session, prompt: list[int] = PROMPT, **settings: Any) -> tuple[Any, ...]:
    result = kangaroo.generate(prompt, **settings)
    stats = result.stats
    return result.tokens, stats.drafted, stats.accepted_at, stats.verification_steps, stats.draft_steps


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("gamma", [1, 2, 4, 15])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_both_loops_draft_alike(host, resident, sampling, gamma, threshold):
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": threshold, **sampling}
    for prompt in (PROMPT, [9, 4], [9]):
        wanted = host.generate(prompt, max_new_tokens=30, plain=True, **sampling).tokens
        drafted = counts(host, prompt, max_new_tokens=30, **settings)
        assert counts(resident, prompt, max_new_tokens=30, **settings) == drafted
        tokens, made, accepted, steps, draft_steps = drafted
        assert tokens == wanted
        assert made > 0
        assert sum(accepted) > 0
        assert draft_steps <= steps <= draft_steps + 1  # the last step may have no room for a draft
        assert made <= steps * min(gamma, PLACES)
        if threshold == 0:
            assert made > (steps - 2) * min(gamma, PLACES) - PLACES


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_the_kernels_draft_alike(folders, sampling, device, monkeypatch):
    """Also where one launch was asked for; nothing asks the host."""
    settings = {"max_new_tokens": 8, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.2, **sampling}
    host, *kernels = (
        Kangaroo.from_pretrained(*folders, device=device, dtype="float32", **how)
        for how in ({"kernels": "reference"}, {"kernels": "triton"}, {"kernels": "triton", "persistent": True})
    )
    iterations_ask_nothing(monkeypatch)
    for prompt in (PROMPT, [9]):
        assert [counts(each, prompt, **settings) for each in kernels] == [counts(host, prompt, **settings)] * 2


class Recorded(BlockDrafter):
    """Says what ``say`` gives for a position, and keeps ``(position, token, confidence)`` of the adapter's guesses."""

    def __init__(self, real: BlockDrafter, say: list[int] | None = None) -> None:
        super().__init__(real.target, real.adapter)
        self.say, self.own = say, list[tuple[int, int, float]]()

    def guess(self, hidden: Tensor, chooser: Chooser, position: int, drafted: Any = ()) -> tuple[Top1, Tensor | None]:
        guess, distribution = super().guess(hidden, chooser, position, drafted)
        self.own.append((position, int(guess.token), float(guess.confidence)))
        if self.say is not None:
            guess = Top1(torch.tensor([self.say[position] if position < len(self.say) else 0]), torch.ones(1))
        return guess, distribution


@torch.inference_mode()
def test_training_unrolls_what_the_runtime_drafts(host, folders):
    """Place by place and behind a right draft each, the runtime's guesses are the passes of the trained module."""
    module = TrainableAdapter(host.drafter.adapter.config.llama, 64, Parts(draft_block=PLACES))
    module.load_state_dict(dict(read_tensors(folders[1])))
    text = PROMPT + host.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    drafter = Recorded(host.drafter, text)
    with_drafter(host, drafter).generate(PROMPT, max_new_tokens=20, num_speculative_tokens=PLACES)
    exit_hidden = host._run_all(text, 1)
    passes = module(exit_hidden[None], None, PLACES, host.target.embed(text)[None])
    head = dict(read_tensors(folders[0]))["lm_head.weight"]
    begins = [*range(len(PROMPT), len(text) - 1, PLACES + 1)]
    assert [position for position, *_ in drafter.own] == [
        begin + place for begin in begins for place in range(min(PLACES, len(text) - 1 - begin))
    ]
    for position, token, confidence in drafter.own:
        place = (position - len(PROMPT)) % (PLACES + 1)
        logits = passes[place][0, position - 1] @ head.T
        assert token == int(logits.argmax())
        assert confidence == pytest.approx(float(logits.softmax(-1).max()), abs=2e-5)
    one, other = (each[0, len(PROMPT) + 1] for each in passes[:2])
    assert (one - other).abs().max() > 0.1, "what is compared depends on the place"


@torch.inference_mode()
@pytest.mark.parametrize("loop", ["host", "resident"])
@pytest.mark.parametrize("between", [{}, {"plain": True}, {"temperature": 0.9, "seed": 1}])
def test_the_adapter_sees_the_text_and_no_place(host, resident, loop, between):
    """A conversation drafts what a fresh text does, and its cache is what one pass over the text would leave."""
    kangaroo = {"host": host, "resident": resident}[loop]
    session, prompt = kangaroo.session(), list(PROMPT)
    settings = {"max_new_tokens": 9, "num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
    for number in range(4):
        how = settings | (between if number % 2 else {})
        written, fresh = session.generate(prompt, **how), kangaroo.generate(prompt, **how)
        assert (written.tokens, written.stats.accepted_at) == (fresh.tokens, fresh.stats.accepted_at)
        prompt += [*written.tokens, 4 + number]
    session.generate(prompt, **settings)  # catches up
    adapter, memory = kangaroo.drafter.adapter, session.memory.drafter_memory
    cache, seen = adapter.new_cache(), len(prompt) - 1
    cache.reserve(len(prompt))
    adapter.run(kangaroo._run_all(prompt, 1), cache, 0)
    for ours, wanted in ((memory.cache.keys[0], cache.keys[0]), (memory.cache.values[0], cache.values[0])):
        torch.testing.assert_close(ours[:, :seen], wanted[:, :seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loop", ["host", "resident"])
def test_auto_and_rejection_and_a_draft_vocabulary(folders, loop, tmp_path):
    """The text is plain decoding's whatever decides how much is drafted, and which tokens may be."""
    few = with_vocabulary(folders[1], tmp_path / "few", [*range(0, 40, 2)])
    kangaroo = Kangaroo.from_pretrained(folders[0], few, device="cpu")
    kangaroo = kangaroo if loop == "host" else on_the_device(kangaroo)
    made = 0
    for sampling in SAMPLINGS:
        wanted = kangaroo.generate(PROMPT, max_new_tokens=40, plain=True, **sampling)
        drafted = kangaroo.generate(PROMPT, max_new_tokens=40, draft_confidence_threshold="auto", **sampling)
        assert drafted.tokens == wanted.tokens
        made += drafted.stats.drafted
    assert made > 0
    rejecting = {"temperature": 1.0, "seed": 5, "acceptance": "rejection", "max_new_tokens": 30}
    one, other = (kangaroo.generate(PROMPT, **rejecting, draft_confidence_threshold=0.0) for _ in range(2))
    assert one.tokens == other.tokens
    assert 0 < one.stats.accepted < one.stats.drafted


def test_drafts_that_were_not_made_are_run_as_zeros(resident, monkeypatch):
    """An earlier iteration's embedding might overflow where it stands now, and spoil the rows beside it."""
    session, prompt, seen = resident.session(), [*PROMPT, 6, 1, 8], []
    session.generate(prompt, max_new_tokens=12, num_speculative_tokens=4, draft_confidence_threshold=0.0)
    run = resident.target.run
    monkeypatch.setattr(
        resident.target, "run", lambda rows, *at, **how: (seen.append(rows.clone()), run(rows, *at, **how))[1]
    )
    session.generate(prompt, max_new_tokens=12, num_speculative_tokens=4, draft_confidence_threshold=1.0)
    drafted = [rows for rows in seen if len(rows) == 4]
    assert len(drafted) > 4
    assert all(rows[0].any() and not rows[1:].any() for rows in drafted)


def test_auto_stops_where_nothing_is_accepted(folders, tmp_path):
    """Also where the caller's number is more than a block has: its ladder is that of the places."""
    wrong = make_adapter(tmp_path / "wrong", folders[0], exit_layer=1, draft_block=PLACES, std=3.0)
    for most in ({}, {"num_speculative_tokens": 15}):
        kangaroo = on_the_device(Kangaroo.from_pretrained(folders[0], wrong, device="cpu"))
        stats = kangaroo.generate(PROMPT, max_new_tokens=400, draft_confidence_threshold="auto", **most).stats
        assert stats.accepted < 40 < stats.steps_without_drafts


def test_it_drafts_blocks_alone(folders, host):
    for way, word in ({"draft_tree": 4}, "draft_tree"), ({"prompt_lookup": True}, "prompt_lookup"):
        with pytest.raises(KangarooError, match=f"drafts blocks, and these alone; leave {word} out"):
            Kangaroo.from_pretrained(*folders, device="cpu", **way)
    assert host.drafter.num_speculative_tokens == PLACES  # the paper's six are more than it has places


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"draft_block": 0}, "unexpected tensor 'block."),
        ({"draft_block": 1}, "draft_block is 1; it must be a whole number from 2 to 15"),
        ({"draft_block": 16}, "draft_block is 16"),
        ({"draft_block": True}, "draft_block is True"),
        ({"draft_block": 4}, "'block.places' has shape"),
        ({"deep_state_size": 8}, "draft_block and deep_state_size exclude each other"),
        ({"draft_tree": 8}, "blocks drafts nothing else; drop the entries of trees of 8"),
        ({"prompt_lookup": True}, "blocks drafts nothing else; drop the entries of chains and lookup"),
    ],
)
def test_what_config_json_must_say(folders, tmp_path, said, words):
    folder = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | said))
    with pytest.raises(KangarooError, match=words):
        Kangaroo.from_pretrained(folders[0], folder, device="cpu")
