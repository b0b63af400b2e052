"""Plain and coupled sampling: a pure function of seed and position that follows the target's distribution."""

from typing import Any

import pytest
import torch
from chi_square import REJECTED, p_value, transform, uniform_p_value
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import DRAFT_STREAM, TARGET_STREAM
from kangaroo_kernels.model.head import Head
from kangaroo_kernels.model.sampling import Chooser, Sampling
from kangaroo_kernels.reference.noise import BLOCK, gumbel_rows

CPU = torch.device("cpu")
SIZE = 7
DRAWS = 40_000
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
)
IDS = [",".join(f"{name}={value}" for name, value in settings.items()) for settings in SETTINGS]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Kangaroo:
    folder = tmp_path_factory.mktemp("small")
    shape = {"vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2}
    target = make_target(folder / "target", seed=3, **shape)
    return Kangaroo.from_pretrained(target, make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1))


def exact(logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None):
    """The distribution in float64 from its definition, one row after the other: ``[N, V]``."""
    rows = torch.softmax(logits.double() / temperature, dim=-1)
    for row in rows:  # a view: written in place
        descending = row.argsort(descending=True).tolist()
        total = float(row[descending[:top_k]].sum())
        before = 0.0
        for rank, token in enumerate(descending):
            probability = float(row[token]) / total
            if (top_k is not None and rank >= top_k) or (top_p is not None and before >= top_p):
                row[token] = 0
            before += probability
    return rows / rows.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("seed", [0, 2**63])
def test_the_chooser_follows_the_distribution(settings, seed):
    torch.manual_seed(seed % 1000)
    hidden, head = torch.randn(1, 12), Head(1 + 0.1 * torch.randn(12), 0.4 * torch.randn(SIZE, 12), 1e-6)
    chooser = Chooser(Sampling(**settings, seed=seed))
    tokens = chooser.target(hidden.expand(DRAWS, -1), head, position=9).token
    wanted = exact(head.logits(hidden), **settings)[0]
    assert p_value(tokens.bincount(minlength=SIZE), wanted) > REJECTED
    neighbours = (tokens[0::2] * SIZE + tokens[1::2]).bincount(minlength=SIZE**2)
    assert p_value(neighbours, torch.outer(wanted, wanted)) > REJECTED


def test_another_temperature_is_noticed():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 12), Head(torch.ones(12), 0.4 * torch.randn(SIZE, 12), 1e-6)
    chooser = Chooser(Sampling(temperature=1.05))
    tokens = chooser.target(hidden.expand(DRAWS, -1), head, position=0).token
    wanted = exact(head.logits(hidden), 1.0)[0]
    assert p_value(tokens.bincount(minlength=SIZE), wanted) < REJECTED


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_every_decoded_token_follows_the_target(small, settings, plain):
    parts = []
    for seed in range(3):
        prompt = [seed]
        tokens = small.generate(prompt, max_new_tokens=400, seed=seed, plain=plain, **settings).tokens
        p = exact(small.logits(prompt + tokens)[:-1], **settings)
        parts.append(transform(torch.tensor(tokens), p, p.argsort(dim=-1), seed))
    assert uniform_p_value(torch.cat(parts)) > REJECTED


def test_the_first_token_over_many_seeds(small):
    """Neighbouring seeds are as good as any."""
    counts = torch.zeros(SIZE)
    for seed in range(1500):
        counts[small.generate([2, 5], max_new_tokens=1, temperature=1.0, seed=seed, plain=True).tokens[0]] += 1
    assert p_value(counts, exact(small.logits([2, 5])[-1:], 1.0)[0]) > REJECTED


def test_the_seed_decides(small):
    for plain in (True, False):
        settings = {"max_new_tokens": 80, "temperature": 1.0, "plain": plain}
        texts = [small.generate([1], seed=seed, **settings).tokens for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**64 - 1)]
        assert len({tuple(text) for text in texts}) == len(texts)
        assert texts[0] == small.generate([1], seed=0, **settings).tokens
        assert texts[0] == small.generate([1], **settings).tokens  # 0 is the default


def test_narrow_settings_are_greedy(small):
    wanted = small.generate([1], max_new_tokens=40, plain=True).tokens
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}):
        for plain in (True, False):
            tokens = small.generate([1], max_new_tokens=40, temperature=1.0, plain=plain, **settings).tokens
            assert tokens == wanted
    assert small.generate([1], max_new_tokens=40, temperature=1e-3).tokens == wanted


def test_wide_settings_change_nothing(small):
    wanted = small.generate([1], max_new_tokens=40, temperature=1.0, plain=True).tokens
    for settings in ({"top_k": SIZE}, {"top_k": 10**6}, {"top_p": 1.0}):
        assert small.generate([1], max_new_tokens=40, temperature=1.0, **settings).tokens == wanted


def test_a_token_depends_on_its_position_and_not_on_how_it_was_reached():
    """Rows of one call, single calls, blocks of noise made anew: always the same token."""
    torch.manual_seed(1)
    hidden, head = torch.randn(150, 12), Head(torch.ones(12), torch.randn(33, 12), 1e-6)
    sampling = Sampling(temperature=1.0, top_k=20, seed=5)
    whole = Chooser(sampling).target(hidden, head, position=3).token
    single, stepping, backwards = (Chooser(sampling) for _ in range(3))
    for row in range(150):
        assert int(single.target(hidden[row : row + 1], head, 3 + row).token) == int(whole[row])
    for row in range(0, 140, 7):
        assert torch.equal(stepping.target(hidden[row : row + 10], head, 3 + row).token, whole[row : row + 10])
    for row in reversed(range(0, 140, 9)):
        assert torch.equal(backwards.target(hidden[row : row + 9], head, 3 + row).token, whole[row : row + 9])


def test_the_drafter_draws_with_the_targets_noise_when_coupled():
    torch.manual_seed(2)
    hidden, head = torch.randn(1, 12), Head(torch.ones(12), 0.3 * torch.randn(33, 12), 1e-6)
    same = {}
    for acceptance in ("coupled", "rejection"):
        chooser = Chooser(Sampling(temperature=1.0, acceptance=acceptance))
        same[acceptance] = sum(
            int(chooser.draft(hidden, head, position).token) == int(chooser.target(hidden, head, position).token)
            for position in range(200)
        )
    assert same["coupled"] == 200
    assert same["rejection"] < 100


def test_the_streams_of_one_position_are_unrelated():
    target, draft = (gumbel_rows(0, stream, 0, 400, 50, CPU) for stream in (TARGET_STREAM, DRAFT_STREAM))
    assert abs(float(torch.corrcoef(torch.stack((target.flatten(), draft.flatten())))[0, 1])) < 0.03


@pytest.mark.parametrize("vocab_size", [1, 5, 67, 1000, 1003])
def test_noise_is_the_same_however_its_blocks_fall(vocab_size):
    reference = torch.cat([gumbel_rows(7, TARGET_STREAM, p, 1, vocab_size, CPU) for p in range(12 * BLOCK)])
    for start in (0, 1, 30, 31, 32, 33, 63, 64, 5, 0, 79):
        for rows in (1, 2, 16):
            noise = gumbel_rows(7, TARGET_STREAM, start, rows, vocab_size, CPU)
            assert torch.equal(noise, reference[start : start + rows]), (start, rows)
    assert torch.equal(gumbel_rows(7, TARGET_STREAM, 0, 12 * BLOCK, vocab_size, CPU), reference)


@pytest.mark.parametrize(("position", "token"), [(1229, 2648), (5043, 2766), (6880, 2054)])
def test_the_largest_noise_does_not_beat_a_filter(position, token):
    """At these positions of seed 0 the generator gives the largest number it has: one in 2^24."""
    size = 4096
    hidden, head = torch.tensor([[1.0, 0.0]]), Head(torch.ones(2), torch.zeros(size, 2), 1e-6)
    head.weight[100, 0] = 30.0  # softmax: one to within 1e-14
    for settings in ({}, {"top_k": 1}, {"top_p": 0.9}):
        chooser = Chooser(Sampling(temperature=1.0, **settings))
        assert int(chooser.target(hidden, head, position).token) == 100, (token, settings)
