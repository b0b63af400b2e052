"""Adapters with a deep state: they see the target's last layer at the position before, or their own output for it."""

from typing import Any

import pytest
import torch
from drafters import Scripted, on_the_device, right_until, with_drafter
from no_host_reads import iterations_ask_nothing
from pairs import make_adapter, make_target
from torch import Tensor

from kangaroo_kernels import Kangaroo, KangarooError, Session
from kangaroo_kernels.model.drafters.kangaroo import AdapterMemory
from kangaroo_kernels.model.drafters.parts import Parts
from kangaroo_kernels.model.target.checkpoint import read_tensors
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "layers": 3, "heads": 2, "kv_heads": 1}
SAMPLINGS = ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9})
PROMPT = [7, 3, 5, 11, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("deep")
    target = make_target(folder / "target", **SIZES, quiet_from=1, quiet=0.2)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1, deep_state_size=20, std=0.1)
    return target, adapter


@pytest.fixture
def host(folders) -> Kangaroo:
    return Kangaroo.from_pretrained(*folders, device="cpu")


@pytest.fixture
def resident(folders) -> Kangaroo:
    return on_the_device(Kangaroo.from_pretrained(*folders, device="cpu"))


def counts(kangaroo: Kangaroo | Session, prompt: list[int] = PROMPT, **settings: Any) -> tuple[Any, ...]:
    result = kangaroo.generate(prompt, **settings)
    return result.tokens, result.stats.drafted, result.stats.accepted_at, result.stats.verification_steps


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("gamma", [1, 2, 4, 15])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_both_loops_draft_alike(host, resident, sampling, gamma, threshold):
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": threshold, **sampling}
    wanted = host.generate(PROMPT, max_new_tokens=30, plain=True, **sampling).tokens
    for prompt in (PROMPT, [9, 4], [9]):
        drafted = counts(host, prompt, max_new_tokens=30, **settings)
        assert counts(resident, prompt, max_new_tokens=30, **settings) == drafted
        assert drafted[1] > 0
        if prompt is PROMPT:
            assert drafted[0] == wanted


def test_the_kernels_draft_alike(folders, device, monkeypatch):
    """In the step-by-step way, also where one launch was asked for; nothing asks the host."""
    settings = {"max_new_tokens": 8, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.2}
    host, *kernels = (
        Kangaroo.from_pretrained(*folders, device=device, dtype="float32", **how)
        for how in ({"kernels": "reference"}, {"kernels": "triton"}, {"kernels": "triton", "persistent": True})
    )
    iterations_ask_nothing(monkeypatch)
    for prompt in (PROMPT, [9]):
        assert [counts(each, prompt, **settings) for each in kernels] == [counts(host, prompt, **settings)] * 2


def states_of(kangaroo: Kangaroo, text: list[int]) -> tuple[Tensor, Tensor]:
    """The exit layer's and the last layer's output for every token."""
    first, last = kangaroo.drafter.first_layer, kangaroo.target.config.num_hidden_layers
    return kangaroo._run_all(text, first), kangaroo._run_all(text, last)


@torch.inference_mode()
def check_memory(kangaroo: Kangaroo, memory: AdapterMemory, text: list[int], seen: int) -> None:
    """What the drafter keeps of the first ``seen`` positions is what one pass with the target's own states leaves."""
    exit_hidden, final = states_of(kangaroo, text)
    adapter = kangaroo.drafter.adapter
    cache = adapter.new_cache()
    cache.reserve(len(text))
    adapter.run(exit_hidden, cache, 0, torch.nn.functional.pad(final[:-1], (0, 0, 1, 0)))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(memory.states[1 : seen + 1], final[:seen], **close)
    for ours, wanted in ((memory.cache.keys[0], cache.keys[0]), (memory.cache.values[0], cache.values[0])):
        torch.testing.assert_close(ours[:, :seen], wanted[:, :seen], **close)


@pytest.mark.parametrize(("right", "gamma"), [(None, 1), (1, 1), (0, 1), (1, 2)])
def test_what_stood_in_is_replaced(host, right, gamma):
    """The first draft of a step is the teacher-forced adapter's, behind right and wrong drafts.

    An adapter's own output stands in for no state that is older than a step, where one draft a step is accepted.
    """
    plain = PROMPT + host.generate(PROMPT, max_new_tokens=40, plain=True).tokens
    say = None if right is None else right_until(plain, right, SIZES["vocab_size"])
    drafter = Scripted(host.drafter, say)
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": 0.0, "max_new_tokens": 25}
    text = PROMPT + with_drafter(host, drafter).generate(PROMPT, **settings).tokens
    logits = host.draft_logits(text)
    firsts = {length for length, _ in drafter.drafts}
    guesses = [guess for guess in drafter.own if guess[0] in firsts and guess[0] < len(text)]
    assert len(guesses) >= len(firsts) - 1 > 8
    for position, token, confidence in guesses:
        if gamma == 1 or position in firsts:
            assert token == int(logits[position - 1].argmax())
            assert confidence == pytest.approx(float(logits[position - 1].softmax(-1).max()), abs=2e-5)
    check_memory(host, drafter.states[-1].memory, text, len(text) - 3)


@torch.inference_mode()
def test_training_unrolls_what_the_runtime_drafts(host, folders):
    """The drafts of a step, one after the other, are the passes of the trained module."""
    module = TrainableAdapter(host.drafter.adapter.config.llama, 64, Parts(20))
    module.load_state_dict(dict(read_tensors(folders[1])))
    plain = PROMPT + host.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    prompt = plain[:10]
    drafter = Scripted(host.drafter)
    with_drafter(host, drafter).generate(
        prompt, max_new_tokens=6, num_speculative_tokens=4, draft_confidence_threshold=0.0
    )
    text = prompt + drafter.drafts[0][1]
    exit_hidden, final = states_of(host, text)
    passes = module(exit_hidden[None], final[None], 4)
    head = host.target.weights.embedding if host.target.config.tie_word_embeddings else None
    head = dict(read_tensors(folders[0]))["lm_head.weight"] if head is None else head
    for later, (position, token, confidence) in enumerate(drafter.own[:4]):
        assert position == len(prompt) + later
        logits = passes[later][0, position - 1] @ head.T
        assert token == int(logits.argmax())
        assert confidence == pytest.approx(float(logits.softmax(-1).max()), abs=2e-5)
    teacher_forced = passes[0][0, len(prompt)] @ head.T
    assert drafter.own[1][2] != pytest.approx(float(teacher_forced.softmax(-1).max()), abs=2e-5)


@pytest.mark.parametrize("loop", ["host", "resident"])
@pytest.mark.parametrize("between", [{}, {"plain": True}, {"temperature": 0.9, "seed": 1}])
def test_a_session_keeps_the_states(host, resident, loop, between):
    """A conversation drafts what a fresh text drafts; a text that was decoded plainly in between is caught up with."""
    kangaroo = {"host": host, "resident": resident}[loop]
    session, prompt = kangaroo.session(), list(PROMPT)
    settings = {"max_new_tokens": 9, "num_speculative_tokens": 1, "draft_confidence_threshold": 0.0}
    for number in range(4):
        how = settings | (between if number % 2 else {})
        written = session.generate(prompt, **how)
        fresh = kangaroo.generate(prompt, **how)
        assert (written.tokens, written.stats.accepted_at) == (fresh.tokens, fresh.stats.accepted_at)
        if number:
            assert written.stats.cached_tokens > 0
        prompt += [*written.tokens, 4 + number]
    if between.get("plain"):
        session.generate(prompt, **settings)  # catches up
    check_memory(kangaroo, session.memory.drafter_memory, prompt, len(prompt) - 5)


def test_other_engines_refuse_it(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    from kangaroo_kernels.model.integrations.assistant import assistant
    from kangaroo_kernels.model.integrations.export import export_drafter

    with pytest.raises(KangarooError, match="deep state"):
        export_drafter(*folders, tmp_path / "out")
    with pytest.raises(KangarooError, match="deep state"):
        assistant(AutoModelForCausalLM.from_pretrained(folders[0]), folders[1])
