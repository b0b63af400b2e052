"""What other engines take in a request: each setting means what it means there, and drafting changes no token of it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drafters import Scripted, on_the_device, oracle, with_drafter
from pairs import make_target

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.sampling import Sampling
from kangaroo_kernels.model.shaping import Shaping

PROMPT = [7, 3, 5]
COUNT = 30
SHAPED: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7, "temperature": 1.1, "seed": 3},
    {"logit_bias": {9: 4.0, 20: -3.0, 31: 2.5}},
    {"logit_bias": {9: 4.0}, "temperature": 0.8, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"min_p": 0.1, "temperature": 1.5, "seed": 5},
    {"min_new_tokens": 20, "stop": (9, 20, 31)},
    {"logprobs": 0, "temperature": 1.0, "seed": 6},
)
IDS = ["+".join(settings) for settings in SHAPED]


@pytest.fixture(scope="module")
def kangaroo(pair) -> Kangaroo:
    return pair.load(device="cpu")


@pytest.fixture(scope="module")
def hf(pair) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)


def theirs(hf: Any, **settings: Any) -> list[int]:
    prompt = torch.tensor([PROMPT])
    tokens = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=COUNT, do_sample=False, **settings
    )
    return tokens[0, len(PROMPT) :].tolist()


# --- lossless


@pytest.mark.parametrize("settings", SHAPED, ids=IDS)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_tokens_are_plain_tokens(pair, kangaroo, settings, threshold):
    """The drafter is right now and then; the target that the host leads on a resident backend gives the same, too."""
    settings = {"max_new_tokens": COUNT, **settings}
    plain = kangaroo.generate(PROMPT, plain=True, **settings)
    for each in (kangaroo, on_the_device(pair.load(device="cpu"))):
        drafted = each.generate(PROMPT, draft_confidence_threshold=threshold, num_speculative_tokens=5, **settings)
        assert drafted.tokens == plain.tokens
        assert drafted.finish_reason == plain.finish_reason
        assert drafted.stats.accepted > 0


@pytest.mark.parametrize("settings", SHAPED, ids=IDS)
def test_drafts_that_are_right_are_all_accepted(kangaroo, settings):
    """So every row of a verification is shaped for the text up to its own draft."""
    settings = {"max_new_tokens": COUNT, **settings}
    plain = kangaroo.generate(PROMPT, plain=True, **settings).tokens
    right = Scripted(kangaroo.drafter, oracle([*PROMPT, *plain]))
    drafted = with_drafter(kangaroo, right).generate(PROMPT, num_speculative_tokens=7, **settings)
    assert drafted.tokens == plain
    assert drafted.stats.verification_steps == -(-len(plain) // 8)


def test_the_drafter_heeds_the_same_shaping(kangaroo):
    result = kangaroo.generate(
        PROMPT, max_new_tokens=COUNT, logit_bias={9: 1000.0}, repetition_penalty=1.01, draft_confidence_threshold=0.0
    )
    assert result.tokens == [9] * COUNT
    assert result.stats.draft_acceptance_rate == 1


@pytest.mark.parametrize("settings", SHAPED, ids=IDS)
def test_the_kernels_give_the_references_tokens(pair, kangaroo, settings):
    """Their own logits, from rows side by side, are shaped."""
    on_kernels = pair.load(device="cpu", kernels="triton")
    settings = {"max_new_tokens": 4, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.0, **settings}
    settings["min_new_tokens"] = min(settings.get("min_new_tokens", 0), 3)
    assert on_kernels.generate(PROMPT, **settings).tokens == kangaroo.generate(PROMPT, **settings).tokens


def test_rejection_keeps_to_a_bias(kangaroo):
    """Its tokens are its own, so only what a bias forbids or forces can be told."""
    settings = {"max_new_tokens": COUNT, "temperature": 1.0, "acceptance": "rejection"}
    text = kangaroo.generate(PROMPT, **settings).tokens
    banned = dict.fromkeys(set(text), -1000.0)
    assert not set(kangaroo.generate(PROMPT, logit_bias=banned, **settings).tokens) & set(text)


# --- the same as elsewhere


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": {9: 3.0, 31: -2.0}}, {"sequence_bias": {(9,): 3.0, (31,): -2.0}}),
        (
            {"logit_bias": {9: 3.0, 31: 2.0}, "repetition_penalty": 1.6, "min_new_tokens": 9, "stop": (31, 9)},
            {
                "sequence_bias": {(9,): 3.0, (31,): 2.0},
                "repetition_penalty": 1.6,
                "min_new_tokens": 9,
                "eos_token_id": [31, 9],
            },
        ),
        ({"min_p": 0.3}, {"min_p": 0.3}),
    ],
)
def test_greedy_tokens_are_those_of_transformers(kangaroo, hf, settings, other):
    wanted = theirs(hf, **other)
    assert kangaroo.generate(PROMPT, max_new_tokens=COUNT, **settings).tokens == wanted
    changed = wanted != kangaroo.generate(PROMPT, max_new_tokens=COUNT).tokens
    assert changed == ("min_p" not in settings)  # what samples nothing filters nothing


@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("others", [{}, {"temperature": 0.6}, {"top_k": 12, "top_p": 0.8}])
def test_min_p_keeps_what_transformers_keeps(min_p, others):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(9, 67, generator=torch.Generator().manual_seed(1))
    scores = logits / others.get("temperature", 1.0)
    if "top_k" in others:
        scores = TopPLogitsWarper(others["top_p"])(None, TopKLogitsWarper(others["top_k"])(None, scores))
    wanted = MinPLogitsWarper(min_p)(None, scores)
    sampling = Sampling(**{"temperature": 1.0, **others}, min_p=min_p)
    assert torch.equal(sampling.filter(logits), wanted)


def test_a_row_is_shaped_by_the_text_alone():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    shaping = Shaping({2: 0.5}, 2.0, frozenset({3}), ends_from=4)
    assert shaping(logits, [0, 1, 0]).tolist() == [[1.0, -4.0, 1.5, -torch.inf]]
    assert shaping(logits, [2, 2, 2, 2]).tolist() == [[2.0, -2.0, 0.75, 0.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.0]]


# --- log-probabilities


def exact_logprobs(kangaroo: Kangaroo, tokens: Sequence[int]) -> torch.Tensor:
    """Of every new token's place: ``[T, V]``."""
    whole = [*PROMPT, *tokens]
    return torch.log_softmax(kangaroo.logits(whole), dim=-1)[len(PROMPT) - 1 : -1]


@pytest.mark.parametrize("shaping", [{}, {"temperature": 0.7, "seed": 3, "top_k": 9, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("plain", [True, False])
def test_logprobs_are_those_of_the_models_own_distribution(kangaroo, shaping, plain):
    result = kangaroo.generate(PROMPT, max_new_tokens=COUNT, logprobs=4, plain=plain, **shaping)
    wanted = exact_logprobs(kangaroo, result.tokens)
    assert [entry.token for entry in result.logprobs] == result.tokens
    for entry, row in zip(result.logprobs, wanted, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        values, indices = row.topk(4)
        assert list(entry.top) == indices.tolist()
        assert list(entry.top.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_end_where_the_text_ends(kangaroo):
    text = kangaroo.generate("ABC", max_new_tokens=COUNT, plain=True).text
    for stop in text[3:20]:  # some of them in the middle of a step
        result = kangaroo.generate("ABC", max_new_tokens=COUNT, stop=stop, logprobs=1, draft_confidence_threshold=0.0)
        assert [entry.token for entry in result.logprobs] == result.tokens
    assert kangaroo.generate("ABC", max_new_tokens=3).logprobs is None
    steps = list(kangaroo.progress("ABC", max_new_tokens=COUNT, logprobs=1))
    assert [entry for step in steps for entry in step.commit.logprobs] == steps[-1].generation.logprobs


# --- ends


def test_ignore_eos(tmp_path):
    free = Kangaroo.from_pretrained(make_target(tmp_path / "a"), device="cpu")
    text = free.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    ending = Kangaroo.from_pretrained(make_target(tmp_path / "b", eos_token_id=text[4]), device="cpu")
    assert ending.generate(PROMPT, max_new_tokens=20, plain=True).finish_reason == "stop"
    assert ending.generate(PROMPT, max_new_tokens=20, plain=True, ignore_eos=True).tokens == text
    stopped = ending.generate(PROMPT, max_new_tokens=20, plain=True, ignore_eos=True, stop=(text[9],))
    assert stopped.tokens == text[: text.index(text[9]) + 1]


@pytest.mark.parametrize("least", [0, 4, 5, 12])
def test_no_stop_string_is_looked_for_too_early(kangaroo, least):
    text = kangaroo.generate("ABC", max_new_tokens=COUNT).text
    stop = text[3:5]
    result = kangaroo.generate("ABC", max_new_tokens=COUNT, stop=stop, min_new_tokens=least)
    place = text.find(stop, least)
    assert result.text == (text if place < 0 else text[:place])


def test_a_random_seed_is_told(kangaroo):
    settings = {"max_new_tokens": COUNT, "temperature": 2.0}
    first, second = (kangaroo.generate(PROMPT, seed=None, **settings) for _ in range(2))
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    for result in (first, second):
        assert kangaroo.generate(PROMPT, seed=result.seed, plain=True, **settings).tokens == result.tokens
    assert kangaroo.generate(PROMPT, max_new_tokens=1, seed=5).as_dict()["seed"] == 5


def test_a_timeout_ends_the_text_behind_a_step(kangaroo):
    text = kangaroo.generate("ABC", max_new_tokens=COUNT)
    cut = kangaroo.generate("ABC", max_new_tokens=COUNT, timeout=1e-9)
    assert cut.finish_reason == "timeout"
    assert cut.stats.verification_steps == 1
    assert cut.tokens == text.tokens[: len(cut.tokens)]
    assert cut.text == text.text[: len(cut.tokens)]
    assert kangaroo.generate("ABC", max_new_tokens=COUNT, timeout=1e9).finish_reason == "length"


# --- mistakes


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"min_p": -0.1}, "min_p is -0.1; it must be a number from 0 to 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; it must be a mapping"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias has '3': 1.0"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias has 3: nan"),
        ({"logit_bias": {3: 1e31}}, r"logit_bias has 3: 1e\+31; .* from -1e\+30 to 1e\+30"),
        ({"logit_bias": {67: 1.0}}, "logit_bias's token 67 is not a whole number from 0 to 66"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
        ({"plain": "no"}, "plain is 'no'; it must be True or False"),
        ({"min_new_tokens": 31}, "min_new_tokens is 31; it must be a whole number from 0 to max_new_tokens, 30"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0"),
        ({"timeout": "3"}, "timeout is '3'"),
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs is True"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [67]}, "stop's token 67 is not a whole number from 0 to 66"),
    ],
)
def test_mistakes(kangaroo, setting, words):
    with pytest.raises(KangarooError, match=words):
        kangaroo.generate(PROMPT, max_new_tokens=COUNT, **setting)


def test_settings_are_values():
    """They can be compared and kept in sets, and a caller's mapping that changes later changes nothing."""
    bias = {3: 1}
    made = Settings(max_new_tokens=3, logit_bias=bias)
    bias[4] = 2
    assert made == Settings(max_new_tokens=3, logit_bias={3: 1.0})
    assert len({made, Settings(max_new_tokens=3, logit_bias={3: 1.0})}) == 1
