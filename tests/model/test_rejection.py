"""Rejection sampling keeps the target's distribution, and the tests of that notice when it does not."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chi_square import REJECTED, p_value, transform, uniform_p_value
from drafters import NotANumber, Scripted, oracle, with_drafter
from pairs import make_adapter, make_target
from torch import Tensor

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import ACCEPT_STREAM, DRAFT_STREAM, TARGET_STREAM, DraftVocabulary
from kangaroo_kernels.model.drafters.adapter import Adapter
from kangaroo_kernels.model.drafters.adapter_weights import AdapterWeights
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.head import Head
from kangaroo_kernels.model.rejection import reject
from kangaroo_kernels.model.sampling import Chooser, Sampling
from kangaroo_kernels.reference.noise import gumbel_rows, uniform

CPU = torch.device("cpu")
DRAWS = 60_000
CASES = {  # probabilities of target and drafter
    "alike": ([0.4, 0.3, 0.2, 0.1], [0.35, 0.35, 0.15, 0.15]),
    "same": ([0.5, 0.25, 0.15, 0.1], [0.5, 0.25, 0.15, 0.1]),
    "opposite": ([0.7, 0.2, 0.05, 0.05], [0.05, 0.05, 0.2, 0.7]),
    "drafter sure": ([0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]),
    "target sure": ([0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]),
    "disjoint": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),
    "drafter narrow": ([0.2, 0.3, 0.1, 0.4], [0.0, 1.0, 0.0, 0.0]),
    "target narrow": ([0.0, 0.6, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25]),
    "eight": ([0.05, 0.2, 0.1, 0.15, 0.05, 0.2, 0.05, 0.2], [0.3, 0.02, 0.2, 0.08, 0.2, 0.1, 0.05, 0.05]),
}
Reject = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def wrong_reject(residual: Callable[[Tensor, Tensor], Tensor], accept: float | None = None) -> Reject:
    """``reject`` with another residual distribution or another odds of acceptance, all else the same."""

    def wrong(draft: Tensor, q: Tensor, target_logits: Tensor, position: int, seed: int) -> Tensor:
        count = len(draft)
        noise = gumbel_rows(seed, TARGET_STREAM, position, *target_logits.shape, CPU)
        tokens = (target_logits + noise).argmax(dim=-1)
        if count == 0:
            return tokens
        p = torch.softmax(target_logits[:count], dim=-1)
        replaced = (residual(p, q).log() + noise[:count]).argmax(dim=-1)
        u = uniform(seed, ACCEPT_STREAM, torch.arange(position, position + count), 1)[:, 0]
        ratio = p.gather(1, draft[:, None])[:, 0] / q.gather(1, draft[:, None])[:, 0]
        odds = ratio if accept is None else torch.full_like(ratio, accept)
        tokens[:count] = torch.where(u < odds, draft, replaced)
        return tokens

    return wrong


RIGHT_ANEW = wrong_reject(lambda p, q: (p - q).clamp(min=0))
WRONG = {
    "resampled from p": wrong_reject(lambda p, q: p),
    "resampled from q": wrong_reject(lambda p, q: q),
    "residual not clamped": wrong_reject(lambda p, q: (p - q).abs()),
    "residual the wrong way": wrong_reject(lambda p, q: (q - p).clamp(min=0)),
    "always accepted": wrong_reject(lambda p, q: p, accept=2.0),
}


def draw(case: str, seed: int, rule: Reject = reject) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drafts from q, and what rejection makes of them, each at its own position; with p and q."""
    p, q = (torch.tensor(values) for values in CASES[case])
    position = 17
    drafts = (q.log() + gumbel_rows(seed, DRAFT_STREAM, position, DRAWS, len(q), CPU)).argmax(dim=-1)
    tokens = rule(drafts, q.expand(DRAWS, -1), p.log().expand(DRAWS + 1, -1), position, seed)
    return drafts, tokens[:DRAWS], p, q


# --- the rule itself


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_committed_token_follows_the_target(case, seed):
    drafts, tokens, p, q = draw(case, seed)
    size = len(p)
    assert p_value(drafts.bincount(minlength=size), q) > REJECTED
    assert p_value(tokens.bincount(minlength=size), p) > REJECTED
    neighbours = (tokens[0::2] * size + tokens[1::2]).bincount(minlength=size * size)
    assert p_value(neighbours, torch.outer(p, p)) > REJECTED


@pytest.mark.parametrize("case", CASES)
def test_drafts_stand_as_often_as_the_distributions_overlap(case):
    drafts, tokens, p, q = draw(case, seed=2)
    overlap = torch.minimum(p, q).sum()
    stood = (drafts == tokens).sum()
    counts = torch.stack((stood, DRAWS - stood))
    if case == "same":
        assert stood == DRAWS
    else:
        assert p_value(counts, torch.stack((overlap, 1 - overlap))) > REJECTED


@pytest.mark.parametrize("case", ["alike", "opposite", "target sure", "eight"])
def test_drafts_and_tokens_have_the_joint_distribution_of_the_paper(case):
    """q(d) min(1, p(d) / q(d)) on the diagonal, the residual elsewhere."""
    drafts, tokens, p, q = draw(case, seed=3)
    stood = torch.minimum(p, q)
    residual = (p - q).clamp(min=0)
    joint = torch.diag(stood) + torch.outer(q - stood, residual / residual.sum())
    counts = (drafts * len(p) + tokens).bincount(minlength=joint.numel())
    assert p_value(counts, joint) > REJECTED


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", ["alike", "opposite", "drafter sure", "eight"])
def test_a_wrong_rule_is_noticed(case, wrong):
    _, tokens, p, _ = draw(case, seed=0, rule=WRONG[wrong])
    assert p_value(tokens.bincount(minlength=len(p)), p) < REJECTED


@pytest.mark.parametrize("case", [case for case in CASES if case != "same"])
def test_the_control_with_the_right_residual_is_the_rule(case):
    """So the controls above differ from the rule in what they say they do, and in nothing else."""
    assert torch.equal(draw(case, seed=4)[1], draw(case, seed=4, rule=RIGHT_ANEW)[1])


def test_the_bonus_token_follows_the_target():
    p = torch.tensor(CASES["eight"][0])
    counts = torch.zeros(len(p))
    none, nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, len(p))
    draft, q = torch.tensor([1]), p[None]
    for position in range(0, 8000, 2):
        if position % 4:
            counts[reject(none, nothing, p.log()[None], position, 0)[-1]] += 1
        else:
            counts[reject(draft, q, p.log().expand(2, -1), position, 0)[-1]] += 1
    assert p_value(counts, p) > REJECTED


@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.6}])
def test_filters_apply_to_the_target(settings):
    sampling = Sampling(**({"temperature": 1.0} | settings), acceptance="rejection")
    p, q = (torch.tensor(values) for values in CASES["eight"])
    logits = p.log() + torch.linspace(0, 0.1, len(p))
    wanted = torch.softmax(sampling.filter(logits[None]), dim=-1)[0]
    chooser, draws = Chooser(sampling), q.expand(DRAWS, -1)
    drafts = (q.log() + chooser.noise(DRAFT_STREAM, 0, draws)).argmax(dim=-1)
    chooser.logits = lambda hidden, head: logits.expand(DRAWS + 1, -1)
    tokens = chooser.target_or_draft(None, None, 0, drafts, draws).token[:DRAWS]
    assert p_value(tokens.bincount(minlength=len(p)), wanted) > REJECTED


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_draft_comes_from_the_distribution_it_names(spoiled, everywhere, temperature):
    """However broken the drafter's logits are: otherwise the target's distribution is lost, too."""
    size = 6
    column = torch.linspace(-1, 1, size)
    column[slice(None) if everywhere else 2] = spoiled
    hidden, head = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), Head(torch.ones(4), torch.zeros(size, 4), 1e-6)
    head.weight[:, 0] = column / 2
    chooser = Chooser(Sampling(temperature=temperature, acceptance="rejection"))
    counts = torch.zeros(size)
    for position in range(1500):
        guess, q = chooser.draft_with_distribution(hidden, head, position)
        counts[guess.token] += 1
    assert q.shape == (1, size)
    assert torch.isfinite(q).all()
    assert p_value(counts, q[0]) > REJECTED


# --- through the whole decode

SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 4, "top_p": 0.9},
)
IDS = [",".join(f"{name}={value}" for name, value in settings.items()) for settings in SETTINGS]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Kangaroo:
    """A target of seven tokens and two layers whose drafter disagrees with it in most contexts."""
    folder = tmp_path_factory.mktemp("small")
    shape = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2}
    target = make_target(folder / "target", std=0.35, **shape)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, std=0.35)  # overlap with the target about 0.64
    return Kangaroo.from_pretrained(target, adapter)


def exact(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """transformers' own distribution for these settings: ``[N, V]``."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p is not None:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return torch.softmax(logits.double(), dim=-1)


def decode_p_value(kangaroo: Kangaroo, settings: dict[str, Any], texts: int = 5) -> float:
    """Decode long texts and hold every token against the target's distribution given the text before it."""
    parts = []
    for seed in range(texts):
        prompt = [seed % 7]
        generation = kangaroo.generate(
            prompt,
            max_new_tokens=400,
            acceptance="rejection",
            seed=seed,
            num_speculative_tokens=1 + seed % 5,
            draft_confidence_threshold=0.3 * (seed % 2),
            **settings,
        )
        text = prompt + generation.tokens
        p = exact(kangaroo.logits(text)[:-1], **settings)
        q = exact(kangaroo.draft_logits(text)[:-1], **settings)
        # what the drafter over-rates comes last: a rule that lets too much of it pass piles up at one end
        order = (p - q).argsort(dim=-1, descending=True)
        parts.append(transform(torch.tensor(generation.tokens), p, order, seed))
    return uniform_p_value(torch.cat(parts))


def test_drafts_of_the_small_pair_stand_now_and_then(small):
    """Otherwise the tests below would say little about either branch of the rule."""
    stats = small.generate([1], max_new_tokens=300, temperature=1.0, acceptance="rejection").stats
    assert 0.2 < stats.draft_acceptance_rate < 0.8


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_every_decoded_token_follows_the_target(small, settings):
    assert decode_p_value(small, settings) > REJECTED


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_is_noticed_in_decoded_text(small, monkeypatch, wrong):
    monkeypatch.setattr("kangaroo_kernels.model.sampling.reject", WRONG[wrong])
    assert decode_p_value(small, {"temperature": 1.0}, texts=4) < REJECTED


def joint_of_three(kangaroo: Kangaroo, prompt: list[int], **settings: Any) -> Tensor:
    """The exact distribution of the first three tokens, ``[V, V, V]``, by enumeration."""
    size = kangaroo.target.config.vocab_size
    joint = torch.empty(size, size, size, dtype=torch.float64)
    for first, second in itertools.product(range(size), repeat=2):
        p = exact(kangaroo.logits([*prompt, first, second])[-3:], **settings)
        joint[first, second] = p[0, first] * p[1, second] * p[2]
    return joint


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.95}],
    ids=["temperature=0.8", "top_k=3,top_p=0.95"],
)
def test_the_first_three_tokens_over_many_seeds(small, settings):
    size, prompt = 7, [2, 5]
    joint = joint_of_three(small, prompt, **settings)
    counts = torch.zeros_like(joint)
    for seed in range(700):
        first, second, third = small.generate(
            prompt,
            max_new_tokens=3,
            seed=seed,
            acceptance="rejection",
            num_speculative_tokens=2,
            draft_confidence_threshold=0.0,
            **settings,
        ).tokens
        counts[first, second, third] += 1
    assert p_value(counts.sum(dim=(1, 2)), joint.sum(dim=(1, 2))) > REJECTED
    assert p_value(counts.sum(dim=2), joint.sum(dim=2)) > REJECTED
    assert p_value(counts, joint) > REJECTED
    assert joint.numel() == size**3


# --- what else must hold of it


def test_without_temperature_it_is_greedy(small):
    wanted = small.generate([1], max_new_tokens=60, plain=True).tokens
    assert small.generate([1], max_new_tokens=60, acceptance="rejection").tokens == wanted


def test_the_seed_decides(small):
    settings = {"max_new_tokens": 60, "temperature": 1.0, "acceptance": "rejection"}
    one, again, other = (small.generate([1], seed=seed, **settings).tokens for seed in (1, 1, 2))
    assert one == again != other


def test_an_adapter_that_yields_nan_keeps_the_distribution(small):
    broken = with_drafter(small, NotANumber(small.drafter.target, small.drafter.adapter))
    parts = []
    for seed in range(5):
        tokens = broken.generate([3], max_new_tokens=300, temperature=1.0, seed=seed, acceptance="rejection").tokens
        p = exact(small.logits([3, *tokens])[:-1], 1.0)
        parts.append(transform(torch.tensor(tokens), p, p.argsort(dim=-1), seed))
    assert uniform_p_value(torch.cat(parts)) > REJECTED


def test_a_drafter_that_always_says_the_same_keeps_the_distribution(small):
    """It names the distribution that it draws from, all mass on one token, so most of its drafts fall."""
    parts = []
    for seed in range(5):
        stubborn = with_drafter(small, Scripted(small.drafter, oracle([4] * 1000)))
        tokens = stubborn.generate([3], max_new_tokens=300, temperature=1.0, seed=seed, acceptance="rejection").tokens
        p = exact(small.logits([3, *tokens])[:-1], 1.0)
        order = torch.arange(7).roll(2).expand(len(tokens), -1)
        parts.append(transform(torch.tensor(tokens), p, order, seed))
    assert uniform_p_value(torch.cat(parts)) > REJECTED


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[-1:], ids=IDS[:1] + IDS[-1:])
def test_a_drafter_of_some_tokens_keeps_the_distribution(small, settings):
    """It never proposes the others, which the residual makes up for."""
    adapter, tokens = small.drafter.adapter, torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    config = replace(adapter.config, vocabulary=DraftVocabulary(tokens, 7))
    weights = AdapterWeights(adapter.layer.weights, adapter.head.norm)
    some = with_drafter(small, KangarooDrafter(small.target, Adapter(config, weights, small.target)))
    assert decode_p_value(some, settings) > REJECTED


@pytest.mark.parametrize("gamma", [1, 4, 15])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_exactly_as_many_tokens_as_asked_for(small, gamma, count):
    generation = small.generate(
        [1], max_new_tokens=count, num_speculative_tokens=gamma, temperature=1.0, acceptance="rejection"
    )
    assert len(generation.tokens) == count
    assert generation.stats.new_tokens == generation.stats.accepted + generation.stats.verification_steps
