"""Kangaroo's tokens are plain decoding's tokens, whatever the drafter does and wherever the text ends."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from drafters import NotANumber, Scripted, oracle, right_until, with_drafter
from pairs import make_adapter, make_target

from kangaroo_kernels import Generation, Kangaroo
from kangaroo_kernels.contract import TARGET_STREAM
from kangaroo_kernels.reference.noise import gumbel

VOCAB = 67
PROMPTS = (
    [7],
    [3, 5, 9],
    [0, 0, 0, 0],
    random.Random(1).choices(range(VOCAB), k=33),
    random.Random(2).choices(range(VOCAB), k=80),  # long enough for the prefill's own attention
)
THRESHOLDS = (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 1.0},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.99},
)
IDS = [",".join(f"{name}={value}" for name, value in sampling.items()) for sampling in SAMPLINGS]


@pytest.fixture(scope="module")
def kangaroo(pair) -> Kangaroo:
    """The shared pair: exit layer 2, right about every other time."""
    return pair.load()


@pytest.fixture(scope="module")
def kangaroos(pair, tmp_path_factory) -> dict[tuple[str, int], Kangaroo]:
    """Random and copied adapters, and a copied one with an MLP, at every exit layer of one target."""
    random_adapter = make_adapter(tmp_path_factory.mktemp("random"), pair.target, exit_layer=1)
    with_mlp = make_adapter(tmp_path_factory.mktemp("mlp"), pair.target, exit_layer=1, copy_layer=3, mlp=True)
    adapters = {"random": random_adapter, "copied": pair.adapter, "with an MLP": with_mlp}
    return {
        (kind, exit_layer): Kangaroo.from_pretrained(pair.target, folder, exit_layer=exit_layer)
        for kind, folder in adapters.items()
        for exit_layer in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def plain(kangaroo: Kangaroo) -> Callable[..., list[int]]:
    """Plain decoding's new tokens, remembered."""
    known: dict[Any, list[int]] = {}

    def decode(prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
        key = (tuple(prompt), tuple(sorted(settings.items())))
        if len(known.get(key, ())) < count:
            known[key] = kangaroo.generate(prompt, max_new_tokens=count, plain=True, **settings).tokens
        return known[key][:count]

    return decode


def decode_scripted(
    kangaroo: Kangaroo, say: Any, prompt: Sequence[int], **settings: Any
) -> tuple[Generation, Scripted]:
    drafter = Scripted(kangaroo.drafter, say)
    return with_drafter(kangaroo, drafter).generate(prompt, **settings), drafter


def check_counts(generation: Generation, gamma: int) -> None:
    """What must hold of the counts of every Kangaroo decode that ran to its length."""
    stats = generation.stats
    assert stats.new_tokens == len(generation.tokens)
    assert 0 <= stats.accepted <= stats.drafted <= gamma * stats.verification_steps
    assert stats.new_tokens == stats.accepted + stats.verification_steps  # each step adds a token of the target's own
    assert sum(stats.accepted_at) == stats.accepted
    assert stats.accepted_at == sorted(stats.accepted_at, reverse=True)
    assert len(stats.accepted_at) <= gamma
    assert stats.mean_acceptance_length == stats.new_tokens / stats.verification_steps


# --- draft lengths, thresholds, exit layers, prompts, sampling


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("gamma", range(1, 16))
def test_greedy_tokens_are_plain_tokens(kangaroos, plain, gamma, threshold):
    half = (gamma + THRESHOLDS.index(threshold)) % 2  # of the pairs, in turns
    for index, (kind, exit_layer) in list(enumerate(kangaroos))[half::2]:
        kangaroo = kangaroos[kind, exit_layer]
        prompt = PROMPTS[(gamma + index) % len(PROMPTS)]
        generation = kangaroo.generate(
            prompt, max_new_tokens=30, num_speculative_tokens=gamma, draft_confidence_threshold=threshold
        )
        assert generation.tokens == plain(prompt, 30), (kind, exit_layer, prompt)
        assert generation.finish_reason == "length"
        check_counts(generation, gamma)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_sampled_tokens_are_plain_tokens(kangaroos, plain, sampling, seed):
    for index, kangaroo in list(enumerate(kangaroos.values()))[seed % 2 :: 2]:
        prompt = PROMPTS[(seed + index) % len(PROMPTS)]
        generation = kangaroo.generate(
            prompt,
            max_new_tokens=30,
            num_speculative_tokens=(1, 3, 8, 15)[index % 4],
            draft_confidence_threshold=THRESHOLDS[index % 3],
            seed=seed,
            **sampling,
        )
        assert generation.tokens == plain(prompt, 30, seed=seed, **sampling)
        check_counts(generation, 15)


def test_the_copied_adapter_is_often_right(kangaroo):
    """Otherwise the tests above would say little about acceptance."""
    stats = kangaroo.generate(PROMPTS[1], max_new_tokens=100, draft_confidence_threshold=0.0).stats
    assert 0.3 < stats.draft_acceptance_rate < 0.9
    assert len(stats.accepted_at) == 6


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampling_is_coupled_to_the_drafter(kangaroo, temperature):
    """The drafter uses the target's noise: it is right far more often than a draw of its own would be."""
    generation = kangaroo.generate(
        PROMPTS[1],
        max_new_tokens=400,
        temperature=temperature,
        num_speculative_tokens=1,
        draft_confidence_threshold=0.0,
    )
    text = PROMPTS[1] + generation.tokens
    p, q = (torch.softmax(logits(text) / temperature, dim=-1) for logits in (kangaroo.logits, kangaroo.draft_logits))
    assert generation.stats.draft_acceptance_rate > 1.7 * float((p * q).sum(dim=-1).mean())
    assert generation.stats.draft_acceptance_rate < 1.2 * float(torch.minimum(p, q).sum(dim=-1).mean())


def test_the_paper_defaults_serve_when_nothing_is_given(kangaroo, plain):
    generation = kangaroo.generate(PROMPTS[1], max_new_tokens=40)
    explicit = kangaroo.generate(
        PROMPTS[1], max_new_tokens=40, num_speculative_tokens=6, draft_confidence_threshold=0.6
    )
    assert generation.tokens == explicit.tokens == plain(PROMPTS[1], 40)
    assert generation.stats.drafted == explicit.stats.drafted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights(pair, dtype):
    kangaroo = pair.load(device="cpu", dtype=dtype, kernels="reference")
    for prompt in PROMPTS:
        plain, drafted = (
            kangaroo.generate(prompt, max_new_tokens=30, plain=plain, draft_confidence_threshold=0.0).tokens
            for plain in (True, False)
        )
        assert plain == drafted


# --- adversarial drafters


@pytest.mark.parametrize("sampling", SAMPLINGS[::3], ids=IDS[::3])
@pytest.mark.parametrize("gamma", [1, 2, 5, 15])
def test_always_right(kangaroo, plain, gamma, sampling):
    for prompt in PROMPTS:
        count = 50
        wanted = plain(prompt, count, **sampling)
        generation, _ = decode_scripted(
            kangaroo,
            oracle(prompt + wanted),
            prompt,
            max_new_tokens=count,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=1.0,
            **sampling,
        )
        assert generation.tokens == wanted
        check_counts(generation, gamma)
        stats = generation.stats
        steps = math.ceil(count / (gamma + 1))
        assert stats.verification_steps == steps
        assert stats.accepted == stats.drafted == count - steps
        assert stats.draft_acceptance_rate == 1.0
        assert stats.mean_acceptance_length == count / steps


@pytest.mark.parametrize("sampling", SAMPLINGS[::3], ids=IDS[::3])
@pytest.mark.parametrize("gamma", [1, 5, 15])
def test_always_wrong(kangaroo, plain, gamma, sampling):
    for prompt in PROMPTS:
        wanted = plain(prompt, 30, **sampling)
        generation, _ = decode_scripted(
            kangaroo,
            right_until(prompt + wanted, 0, VOCAB),
            prompt,
            max_new_tokens=30,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.0,
            **sampling,
        )
        assert generation.tokens == wanted
        check_counts(generation, gamma)
        assert generation.stats.mean_acceptance_length == 1.0
        assert generation.stats.accepted == 0
        assert generation.stats.drafted == sum(min(gamma, 29 - step) for step in range(30))


@pytest.mark.parametrize("gamma", [1, 4, 15])
@pytest.mark.parametrize("right", [1, 2, 3, 7, 14])
def test_right_at_first_then_wrong(kangaroo, plain, gamma, right):
    count = 47
    for prompt in PROMPTS[:3]:
        wanted = plain(prompt, count)
        generation, _ = decode_scripted(
            kangaroo,
            right_until(prompt + wanted, right, VOCAB),
            prompt,
            max_new_tokens=count,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.5,
        )
        assert generation.tokens == wanted
        check_counts(generation, gamma)
        assert generation.stats.verification_steps == math.ceil(count / (min(right, gamma) + 1))


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_an_adapter_that_yields_nan(kangaroo, plain, threshold, temperature, acceptance):
    generation = with_drafter(kangaroo, NotANumber(kangaroo.drafter.target, kangaroo.drafter.adapter)).generate(
        PROMPTS[1],
        max_new_tokens=30,
        num_speculative_tokens=5,
        draft_confidence_threshold=threshold,
        temperature=temperature,
        acceptance=acceptance,
    )
    assert len(generation.tokens) == 30
    if acceptance == "coupled" or temperature == 0:
        assert generation.tokens == plain(PROMPTS[1], 30, temperature=temperature)
    check_counts(generation, 5)
    assert generation.stats.drafted <= generation.stats.verification_steps  # a NaN is unsure at every threshold


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -float("inf"), -1.0, 2.0])
def test_confidences_that_are_none(kangaroo, plain, confidence):
    prompt, wanted = PROMPTS[1], plain(PROMPTS[1], 40)
    generation, _ = decode_scripted(
        kangaroo,
        oracle(prompt + wanted, confidence),
        prompt,
        max_new_tokens=40,
        num_speculative_tokens=7,
        draft_confidence_threshold=0.5,
    )
    assert generation.tokens == wanted
    assert generation.stats.verification_steps == (40 // 8 if confidence > 0.5 else 40 // 2)


@pytest.mark.parametrize("seed", range(8))
def test_erratic_drafters(kangaroo, plain, seed):
    """Now right, now wrong, with confidences from nowhere: draft lengths and rollbacks of every kind."""
    dice = random.Random(seed)
    prompt = PROMPTS[seed % len(PROMPTS)]
    sampling = SAMPLINGS[seed % len(SAMPLINGS)]
    wanted = plain(prompt, 120, **sampling)
    text = prompt + wanted
    odds = dice.choice((0.5, 0.8, 0.95))

    def say(position: int, place: int, token: int, sure: float) -> tuple[int, float]:
        right = text[position] if position < len(text) else 0
        said = right if dice.random() < odds else dice.choice((token, dice.randrange(VOCAB)))
        return said, dice.choice((0.0, 0.2, 0.7, 0.9, 1.0, 1.0, 1.0, float("nan")))

    generation, _ = decode_scripted(
        kangaroo,
        say,
        prompt,
        max_new_tokens=120,
        num_speculative_tokens=dice.randint(1, 15),
        draft_confidence_threshold=dice.random(),
        **sampling,
    )
    assert generation.tokens == wanted
    check_counts(generation, 15)


@pytest.mark.parametrize("confidence", [0.25, 0.5, 0.75])
def test_the_token_that_falls_below_the_threshold_is_the_last(kangaroo, plain, confidence):
    """It is still verified; a confidence equal to the threshold goes on."""
    prompt, wanted = PROMPTS[1], plain(PROMPTS[1], 48)
    generation, drafter = decode_scripted(
        kangaroo,
        oracle(prompt + wanted, confidence),
        prompt,
        max_new_tokens=48,
        num_speculative_tokens=5,
        draft_confidence_threshold=0.5,
    )
    assert generation.tokens == wanted
    lengths = {len(tokens) for _, tokens in drafter.drafts}
    assert lengths == ({1} if confidence < 0.5 else {5})


# --- the end of a text


@pytest.mark.parametrize("gamma", [1, 6, 15])
@pytest.mark.parametrize("count", [*range(1, 19), 31, 32, 33])
def test_never_more_tokens_than_asked_for_and_never_fewer(kangaroo, plain, count, gamma):
    prompt = PROMPTS[count % len(PROMPTS)]
    wanted = plain(prompt, 40)
    for say in (None, oracle(prompt + wanted)):
        generation, drafter = decode_scripted(
            kangaroo,
            say,
            prompt,
            max_new_tokens=count,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.0,
        )
        assert generation.tokens == wanted[:count]
        assert generation.finish_reason == "length"
        # a draft beyond the limit could not be committed: it is not made
        assert all(length + len(tokens) < len(prompt) + count for length, tokens in drafter.drafts)
        check_counts(generation, gamma)


@pytest.mark.parametrize("gamma", [1, 4, 15])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_token_in_mid_draft(kangaroo, plain, gamma, temperature):
    prompt = PROMPTS[1]
    wanted = plain(prompt, 48, temperature=temperature)
    inside = 0
    for index in sorted({wanted.index(token) for token in wanted}):
        settings = {"max_new_tokens": 48, "stop": [wanted[index]], "temperature": temperature}
        stopped_plain = kangaroo.generate(prompt, plain=True, **settings)
        generation, drafter = decode_scripted(
            kangaroo,
            oracle(prompt + wanted),
            prompt,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.0,
            **settings,
        )
        assert generation.tokens == stopped_plain.tokens == wanted[: index + 1]
        assert generation.text == stopped_plain.text
        assert generation.finish_reason == stopped_plain.finish_reason == "stop"
        assert generation.stats.new_tokens == index + 1
        assert generation.stats.verification_steps == index // (gamma + 1) + 1
        length, drafted = drafter.drafts[-1]
        inside += len(prompt) + index < length + len(drafted) - 1
    assert inside or gamma == 1, "no stop token fell inside a draft; choose another prompt"


@pytest.mark.parametrize("gamma", [1, 5, 15])
def test_a_stop_token_that_was_drafted_but_refused_does_not_stop(kangaroo, plain, gamma):
    prompt = PROMPTS[1]
    wanted = plain(prompt, 30)
    stop = next(token for token in range(VOCAB) if token not in wanted)
    generation, _ = decode_scripted(
        kangaroo,
        lambda position, place, token, sure: (stop, 1.0),
        prompt,
        max_new_tokens=30,
        num_speculative_tokens=gamma,
        stop=[stop],
    )
    assert generation.tokens == wanted
    assert generation.finish_reason == "length"


def test_a_stop_token_after_a_refused_draft_does_not_stop(kangaroo, plain):
    """The target's token of a row behind the first disagreement belongs to a text that is not."""
    prompt = PROMPTS[1]
    wanted = plain(prompt, 30)
    say = right_until(prompt + wanted, 1, VOCAB)
    settings = {"max_new_tokens": 30, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.0}
    for stop in range(VOCAB):
        generation, _ = decode_scripted(kangaroo, say, prompt, stop=[stop], **settings)
        end = wanted.index(stop) + 1 if stop in wanted else 30
        assert generation.tokens == wanted[:end]


@pytest.mark.parametrize("many", [False, True])
def test_the_models_own_end_of_text(pair, kangaroo, plain, tmp_path, many):
    prompt = PROMPTS[1]
    wanted = plain(prompt, 48)
    first = sorted({wanted.index(token) for token in wanted})[-1]  # the token that comes up last
    eos = [wanted[first], next(token for token in range(VOCAB) if token not in wanted)] if many else wanted[first]
    target = make_target(tmp_path, quiet_from=2, quiet=0.2, eos_token_id=eos)
    ending = Kangaroo.from_pretrained(target, pair.adapter)
    for settings in ({"plain": True}, {}, {"num_speculative_tokens": 15, "draft_confidence_threshold": 0.0}):
        generation = ending.generate(prompt, max_new_tokens=48, **settings)
        assert generation.tokens == wanted[: first + 1]
        assert generation.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("gamma", [1, 15])
def test_stop_strings(kangaroo, plain, gamma, size):
    prompt = PROMPTS[1]
    wanted = plain(prompt, 48)
    text = kangaroo.generate(prompt, max_new_tokens=48, plain=True).text
    assert len(text) > 40
    for start in range(0, len(text) - size, 5):
        stop = text[start : start + size]
        settings = {"max_new_tokens": 48, "stop": ["~not in it~", stop]}
        stopped_plain = kangaroo.generate(prompt, plain=True, **settings)
        generation, _ = decode_scripted(
            kangaroo,
            oracle(prompt + wanted),
            prompt,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.0,
            **settings,
        )
        assert generation.tokens == stopped_plain.tokens == wanted[: len(stopped_plain.tokens)]
        assert generation.text == stopped_plain.text == text[: text.index(stop)]
        assert generation.finish_reason == stopped_plain.finish_reason == "stop"


def test_streamed_text_is_the_text(kangaroo):
    for settings in ({"plain": True}, {"num_speculative_tokens": 9, "draft_confidence_threshold": 0.0}):
        for stop in ((), ("h",), ("4=",)):
            generation = kangaroo.generate("abc", max_new_tokens=48, stop=stop, **settings)
            pieces = list(kangaroo.stream("abc", max_new_tokens=48, stop=stop, **settings))
            assert "".join(pieces) == generation.text
            steps = list(kangaroo.progress("abc", max_new_tokens=48, stop=stop, **settings))
            assert [token for step in steps for token in step.commit.tokens] == generation.tokens
            assert all(0 <= step.commit.accepted <= len(step.commit.tokens) for step in steps)


@pytest.fixture(scope="module")
def short_context(tmp_path_factory) -> Kangaroo:
    folder = tmp_path_factory.mktemp("short")
    target = make_target(folder / "target", quiet_from=2, quiet=0.2, max_position_embeddings=32)
    return Kangaroo.from_pretrained(
        target, make_adapter(folder / "adapter", target, exit_layer=2, copy_layer=2, max_position_embeddings=32)
    )


@pytest.mark.parametrize("size", [1, 5, 16, 29, 30, 31, 32])
@pytest.mark.parametrize("gamma", [1, 6, 15])
def test_the_contexts_end(short_context, plain, size, gamma):
    prompt = PROMPTS[3][:size]
    wanted = short_context.generate(prompt, max_new_tokens=100, plain=True)
    assert wanted.finish_reason == "context"
    assert len(wanted.tokens) == 32 - size
    assert wanted.tokens == plain(prompt, 32)[: 32 - size]
    for say in (None, oracle(prompt + wanted.tokens)):
        generation, _ = decode_scripted(
            short_context,
            say,
            prompt,
            max_new_tokens=100,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=0.0,
        )
        assert generation.tokens == wanted.tokens
        assert generation.finish_reason == "context"
    exact = short_context.generate(prompt, max_new_tokens=max(1, 32 - size), num_speculative_tokens=gamma)
    assert exact.tokens == wanted.tokens
    assert exact.finish_reason == ("context" if size == 32 else "length")


def test_stretched_positions(tmp_path):
    """RoPE that depends on the text's length (dynamic NTK), beyond the length the model was made for."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    target = make_target(tmp_path / "t", quiet_from=2, quiet=0.2, max_position_embeddings=32, rope_parameters=rope)
    kangaroo = Kangaroo.from_pretrained(target, make_adapter(tmp_path / "a", target, exit_layer=2, copy_layer=2))
    for count in (10, 60, 20, 110):
        wanted = kangaroo.generate(PROMPTS[1], max_new_tokens=count, plain=True).tokens
        for gamma in (1, 6, 15):
            generation = kangaroo.generate(
                PROMPTS[1], max_new_tokens=count, num_speculative_tokens=gamma, draft_confidence_threshold=0.1
            )
            assert generation.tokens == wanted


def test_logits_in_the_middle_of_a_text(tmp_path):
    """They have positions of their own, which dynamic RoPE stretches for another length."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    target = make_target(tmp_path / "t", quiet_from=2, quiet=0.2, max_position_embeddings=32, rope_parameters=rope)
    kangaroo = Kangaroo.from_pretrained(target, make_adapter(tmp_path / "a", target, exit_layer=2, copy_layer=2))
    other = Kangaroo(kangaroo.target, kangaroo.drafter)
    wanted = kangaroo.generate(PROMPTS[1], max_new_tokens=60, plain=True).tokens
    for plain in (True, False):
        got: list[int] = []
        for step in kangaroo.progress(PROMPTS[1], max_new_tokens=60, plain=plain):
            got += step.commit.tokens
            kangaroo.logits([1, 2])
            kangaroo.draft_logits([3] * 90)
            other.generate([5] * 40, max_new_tokens=2)
        assert got == wanted


# --- the state between steps


def poison(state: Any, kind: str) -> None:
    """Overwrite everything that the state says is not valid."""

    def spoil(rows: torch.Tensor) -> None:
        if kind == "nan":
            rows.fill_(float("nan"))
        else:
            rows.copy_(100 * torch.randn(rows.shape))

    with torch.inference_mode():
        for rows in state.cache.keys + state.cache.values:
            spoil(rows[:, state.newest :])
        for rows in state.memory.cache.keys + state.memory.cache.values:
            spoil(rows[:, state.memory.length :])
        spoil(state.memory.exit_hidden[1:])
        if state.memory.length == state.newest:
            spoil(state.memory.exit_hidden[:1])


@pytest.mark.parametrize("kind", ["nan", "noise"])
@pytest.mark.parametrize("gamma", [1, 3, 15])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_beyond_the_length_is_read(kangaroo, plain, kind, gamma, temperature):
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[4]):
        wanted = plain(prompt, 60, temperature=temperature)
        text = prompt + wanted
        for say in (None, oracle(text), right_until(text, 2, VOCAB)):
            drafter = Scripted(kangaroo.drafter, say)
            tokens: list[int] = []
            for step in with_drafter(kangaroo, drafter).progress(
                prompt,
                max_new_tokens=60,
                num_speculative_tokens=gamma,
                draft_confidence_threshold=0.0,
                temperature=temperature,
            ):
                tokens += step.commit.tokens
                state = drafter.states[-1]
                assert state.tokens == prompt + tokens
                if len(tokens) < 60:  # a last step with room for one token drafts nothing
                    assert state.newest - 1 <= state.memory.length <= state.newest
                poison(state, kind)
            assert tokens == wanted
            if say is None:  # drafts must not change either: a poisoned adapter would still be lossless
                quiet = Scripted(kangaroo.drafter)
                with_drafter(kangaroo, quiet).generate(
                    prompt,
                    max_new_tokens=60,
                    num_speculative_tokens=gamma,
                    draft_confidence_threshold=0.0,
                    temperature=temperature,
                )
                assert drafter.drafts == quiet.drafts


def test_one_instance_for_many_texts(pair, plain):
    """Long, short, plain and abandoned texts in a row, the caches full of NaN from one to the next."""
    kangaroo = pair.load()
    kangaroo.drafter = Scripted(kangaroo.drafter)
    dice = random.Random(5)
    for count in (200, 3, 1, 90, 260, 5, 40):
        for prompt in dice.sample(PROMPTS, 3):
            settings: dict[str, Any] = {"num_speculative_tokens": dice.randint(1, 15)}
            generation = kangaroo.generate(prompt, max_new_tokens=count, draft_confidence_threshold=0.1, **settings)
            assert generation.tokens == plain(prompt, count)
            abandoned = kangaroo.progress(PROMPTS[3], max_new_tokens=50, temperature=1.0, **settings)
            for _ in range(dice.randint(1, 4)):
                next(abandoned)
            abandoned.close()
            state = kangaroo.drafter.states[-1]
            with torch.inference_mode():
                for cache in (state.cache, state.memory.cache):
                    for rows in cache.keys + cache.values:
                        rows.fill_(float("nan"))
            assert kangaroo.generate(prompt, max_new_tokens=count, plain=True).tokens == plain(prompt, count)


@pytest.mark.parametrize("gamma", [1, 5, 15])
def test_the_cache_holds_what_one_pass_over_the_text_would_put_there(kangaroo, plain, gamma):
    prompt = PROMPTS[1]
    wanted = plain(prompt, 60)
    text = prompt + wanted
    target = kangaroo.target
    with torch.inference_mode():
        cache = target.new_cache()
        cache.reserve(len(text))
        target.run(target.embed(text), cache, 0, 0, target.config.num_hidden_layers)
    for say in (None, oracle(text), right_until(text, 1, VOCAB)):
        _, drafter = decode_scripted(
            kangaroo, say, prompt, max_new_tokens=60, num_speculative_tokens=gamma, draft_confidence_threshold=0.0
        )
        state = drafter.states[-1]
        for ours, wanted_rows in zip(state.cache.keys + state.cache.values, cache.keys + cache.values, strict=True):
            valid = slice(0, state.newest)
            torch.testing.assert_close(ours[:, valid], wanted_rows[:, valid], rtol=1e-4, atol=1e-4)


# --- the adapter sees the right positions


def check_guesses(kangaroo: Kangaroo, drafter: Scripted, text: list[int], temperature: float = 0.0) -> int:
    """Hold the adapter's own guesses against one teacher-forced pass, wherever their context is the text."""
    logits = kangaroo.draft_logits(text)
    confidence = torch.softmax(logits, dim=-1).amax(dim=-1)
    if temperature:  # the noise is that of the position that the token will have
        logits = logits / temperature + gumbel(0, TARGET_STREAM, torch.arange(1, len(text) + 1), VOCAB)
    token = logits.argmax(dim=-1)
    guesses = iter(drafter.own)
    checked = 0
    for length, drafted in drafter.drafts:
        for place, _ in enumerate(drafted):
            position, said, sure = next(guesses)
            assert position == length + place
            if drafted[:place] == text[length:position] and position < len(text):
                assert said == int(token[position - 1]), position
                assert sure == pytest.approx(float(confidence[position - 1]), abs=2e-5), position
                checked += 1
    return checked


@pytest.mark.parametrize("gamma", [1, 2, 3, 6, 15])
@pytest.mark.parametrize(("exit_layer", "temperature"), [(1, 0.0), (2, 0.0), (3, 0.0), (2, 0.9)])
def test_drafts_are_the_teacher_forced_drafter(kangaroos, plain, exit_layer, temperature, gamma):
    """An adapter whose keys lag, or lie at another position, drafts something else from the next step on.

    The oracle forces full acceptance, after which nobody has run the adapter on the last draft; the others mix full
    and partial acceptance.
    """
    kangaroo = kangaroos["copied", exit_layer]
    dice = random.Random(gamma)
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[4]):
        text = prompt + plain(prompt, 60, temperature=temperature)

        def erratic(position: int, place: int, token: int, sure: float, text: list[int] = text) -> tuple[int, float]:
            right = text[position] if position < len(text) else 0
            return (right if dice.random() < 0.8 else (right + 1) % VOCAB), dice.random()

        for say in (None, oracle(text), right_until(text, 1, VOCAB), erratic):
            generation, drafter = decode_scripted(
                kangaroo,
                say,
                prompt,
                max_new_tokens=60,
                num_speculative_tokens=gamma,
                draft_confidence_threshold=0.2,
                temperature=temperature,
            )
            assert prompt + generation.tokens == text
            assert len(drafter.own) == generation.stats.drafted
            checked = check_guesses(kangaroo, drafter, text, temperature)
            assert checked >= generation.stats.accepted
