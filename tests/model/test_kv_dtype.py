"""Keys and values in float16 beside float32 arithmetic: plain decoding's tokens, and an error where one overflows."""

import random
from typing import Any

import pytest
import torch
from drafters import Scripted, oracle, with_drafter
from pairs import make_adapter, make_target
from safetensors.torch import load_file, save_file
from test_bad_input import refuse
from test_load import STATES
from test_not_finite import until_it_fails

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model import load
from kangaroo_kernels.reference import attention as reference

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "top_k": 9, "top_p": 0.9})
IDS = ["greedy", "sampled", "filtered"]
PROMPTS = ([7], [3, 5, 9], random.Random(1).choices(range(67), k=90))  # a prefill's own attention, too
LOUD = 40
HALF = {"dtype": "float16", "kv_dtype": "float16"}


@pytest.fixture(scope="module")
def kangaroo(pair) -> Kangaroo:
    return pair.load(device="cpu", **HALF)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_the_tokens_are_plain_decodings(kangaroo, sampling):
    accepted = 0
    for prompt in PROMPTS:
        plain = kangaroo.generate(prompt, max_new_tokens=60, plain=True, **sampling)
        drafted = kangaroo.generate(prompt, max_new_tokens=60, **sampling)
        assert drafted.tokens == plain.tokens
        accepted += drafted.stats.accepted
    assert accepted


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_so_they_are_in_a_session(kangaroo, sampling):
    """Turn by turn, with what the turns before left in the cache."""
    sessions = {plain: kangaroo.session() for plain in (True, False)}
    prompt: list[int] = []
    for new in ([5, 6, 7, 8], [11], [15] * 70, [16, 17]):
        prompt = prompt + new
        texts = [
            session.generate(prompt, max_new_tokens=20, plain=plain, **sampling) for plain, session in sessions.items()
        ]
        assert texts[0].tokens == texts[1].tokens
        assert texts[1].stats.cached_tokens == texts[0].stats.cached_tokens == max(0, len(prompt) - len(new) - 3)
        prompt += texts[0].tokens


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries sum in other orders")
def test_a_pass_of_many_rows_has_the_bits_of_plain_decoding(kangaroo):
    """Else a key that is rounded another way would be a difference in the fourth digit."""
    target, tokens, layers = kangaroo.target, PROMPTS[2], kangaroo.target.config.num_hidden_layers

    def written(passes: list[int]) -> torch.Tensor:
        cache, first, logits = target.new_cache(), 0, []
        cache.reserve(len(tokens))
        for rows in passes:
            hidden = target.embed(tokens[first : first + rows])
            logits.append(target.logits(target.run(hidden, cache, first, 0, layers)))
            first += rows
        return torch.cat(logits)

    assert torch.equal(written([1] * 90), written([2, 3, 4, 5, 7, 16, 1, 8, 12, 16, 16]))


def test_it_takes_half_the_memory(kangaroo, pair):
    """The adapter's, too; what is computed stays near to what it was."""
    exact = pair.load(device="cpu", dtype="float16")
    ours, theirs = (each.session(300).memory for each in (kangaroo, exact))
    for half, whole in (
        (ours.cache, theirs.cache),
        (kangaroo.drafter.new_memory().cache, exact.drafter.new_memory().cache),
    ):
        for cache in (half, whole):
            cache.reserve(300)
        rows = [sum(part.nbytes for part in (*cache.keys, *cache.values)) for cache in (half, whole)]
        assert 2 * rows[0] == rows[1]
    rounded, wanted = kangaroo.logits(PROMPTS[2]), exact.logits(PROMPTS[2])
    assert 0 < (rounded - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Any:
    """A pair in whose first layer the keys of one token are beyond float16."""
    folder = tmp_path_factory.mktemp("loud")
    target = make_target(folder / "target", quiet_from=2, quiet=0.2)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][LOUD, 0] = 6
    tensors["model.layers.0.self_attn.k_proj.weight"][:, 0] = 6e4
    save_file(tensors, file, {"format": "pt"})
    adapter = make_adapter(folder / "adapter", target, exit_layer=2, copy_layer=2)
    return lambda **settings: Kangaroo.from_pretrained(target, adapter, device="cpu", **settings)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "drafting"])
@pytest.mark.parametrize(
    "prompt", [[7, LOUD, 5], [3, 5, LOUD], [LOUD, *range(LOUD)] * 2], ids=["inside", "last", "long"]
)
def test_what_overflows_is_an_error(loud, prompt, plain):
    assert loud().generate(prompt, max_new_tokens=20, plain=plain).tokens
    tokens, error = until_it_fails(loud(**HALF), prompt, plain=plain)
    assert tokens == []
    assert "overflowed in torch.float16; leave kv_dtype out" in error


def test_a_draft_that_overflows_changes_nothing(loud):
    """The target would never say it."""
    kangaroo, prompt = loud(**HALF), [7, 3, 5]
    whole = kangaroo.generate(prompt, max_new_tokens=24, plain=True).tokens
    assert LOUD not in whole
    right = oracle([*prompt, *whole])

    def say(position: int, place: int, token: int, sure: float) -> tuple[int, float]:
        return (LOUD, 1.0) if position % 5 == 0 else right(position, place, token, sure)

    result = with_drafter(kangaroo, Scripted(kangaroo.drafter, say)).generate(
        prompt, max_new_tokens=24, num_speculative_tokens=2
    )
    assert result.tokens == whole
    assert result.stats.accepted > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_dtype": "bfloat16"}, ("'bfloat16'", "float16")),
        ({"kv_dtype": torch.float32}, ("torch.float32", "float16")),
        ({**HALF, "kernels": "triton"}, ("computes in torch.float16", "leave it out")),
        ({"kv_dtype": "float16"}, ("give dtype='float16', too",)),
        ({"kv_dtype": "float16", "dtype": "bfloat16"}, ("give dtype='float16', too",)),
    ],
)
def test_what_it_cannot_be_is_said_before_the_weights(pair, monkeypatch, settings, words):
    monkeypatch.setattr(load, "load_target", lambda *_, **__: pytest.fail("the weights were loaded"))
    refuse(lambda: pair.load(device="cpu", **settings), "kv_dtype", *words)


@pytest.mark.parametrize("state", STATES)
def test_the_callers_torch_state_decides_nothing(pair, kangaroo, state):
    reference.rows_are_alike.cache_clear()
    with STATES[state]():
        loaded = pair.load(device="cpu", **HALF)
    assert torch.equal(loaded.logits(PROMPTS[1]), kangaroo.logits(PROMPTS[1]))


def test_a_machine_that_does_not_keep_bits_is_refused(pair, monkeypatch):
    """As this one does not, where the reference takes no care."""
    monkeypatch.setattr(load, "rows_are_alike", reference.rows_are_alike.__wrapped__)
    monkeypatch.setattr(reference, "ROWS", 1)
    monkeypatch.setattr(reference, "POSITIONS", 1)
    refuse(lambda: pair.load(device="cpu", **HALF), "the same bits in any pass", "leave it out")
