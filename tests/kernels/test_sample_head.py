import pytest
import torch
from budget import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kangaroo_kernels.gumbel_ref import gumbel
from kangaroo_kernels.packed_weight import PackedWeight
from kangaroo_kernels.sample_head_ref import filter_logits, sample_head
from kangaroo_kernels.top1_head_ref import confidence_of, lm_head, top1_head


def warped(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """transformers' own, in the order of its ``generate``."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits)


def draw_logits(rows: int, vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    return spread * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 5),
    vocab_size=st.integers(1, 200),
    spread=st.floats(0.1, 10),
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 250),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_filter_is_transformers_own(rows, vocab_size, spread, seed, temperature, top_k, top_p):
    logits = draw_logits(rows, vocab_size, spread, seed)
    before = logits.clone()
    ours = filter_logits(logits, temperature, top_k, top_p)
    theirs = warped(logits, temperature, top_k, top_p)
    assert torch.equal(logits, before)
    kept = torch.isfinite(ours) & torch.isfinite(theirs)
    assert torch.equal(ours[kept], theirs[kept])
    # the sets may differ by a token on the very edge of top_p, where the order of summation decides
    edge = torch.isfinite(ours) != torch.isfinite(theirs)
    if edge.any():
        probabilities = torch.softmax(warped(logits, temperature, top_k, None), dim=-1).double()
        for row, token in edge.nonzero().tolist():
            above = probabilities[row][probabilities[row] > probabilities[row, token]].sum()
            assert abs(float(above) - top_p) < 1e-6
    assert torch.isfinite(ours).any(dim=-1).all()


@pytest.mark.parametrize("top_k", [1, 2, 5, 66, 67, 68, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_top_k(top_k, temperature):
    logits = draw_logits(9, 67, 2.0, 0)
    ours = filter_logits(logits, temperature, top_k, None)
    assert (torch.isfinite(ours).sum(dim=-1) == min(top_k, 67)).all()
    assert torch.equal(ours, warped(logits, temperature, top_k, None))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 10])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, top_k):
    logits = draw_logits(9, 67, 2.0, 1)
    ours = filter_logits(logits, 0.8, top_k, top_p)
    assert torch.equal(ours, warped(logits, 0.8, top_k, top_p))
    probabilities = torch.softmax(filter_logits(logits, 0.8, top_k, None).double(), dim=-1)
    for row, finite in zip(probabilities, torch.isfinite(ours), strict=True):
        kept = row[finite]
        assert kept.sum() >= top_p - 1e-6
        assert kept.sum() - kept.min() < top_p + 1e-6
        assert kept.min() >= row[~finite].max()


def test_ties():
    """All that tie with the k-th stay; at the edge of top_p the lowest index stays."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(filter_logits(logits, 1.0, 2, None)).tolist() == [[True, True, True, True, False]]
    alike = torch.zeros(1, 8)
    kept = torch.isfinite(filter_logits(alike, 1.0, None, 0.25))
    assert kept.tolist() == [[True, True] + [False] * 6]


def test_no_filter_is_the_tempered_logits():
    logits = draw_logits(3, 50, 1.0, 2)
    for top_k, top_p in ((None, None), (50, None), (None, 1.0), (50, 1.0)):
        ours = filter_logits(logits, 0.7, top_k, top_p)
        assert torch.equal(ours, logits / 0.7)
        assert ours.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_token_is_the_largest_of_filtered_logits_and_noise(rows, settings):
    torch.manual_seed(0)
    x, norm, head = torch.randn(rows, 48), 1 + 0.1 * torch.randn(48), torch.randn(67, 48)
    noise = gumbel(0, 0, torch.arange(rows), 67)
    before = noise.clone()
    packed = PackedWeight(head)
    top = sample_head(x, norm, packed, noise, eps=1e-5, temperature=1.3, **settings)
    logits = lm_head(x, norm, packed, eps=1e-5)
    filtered = warped(logits, 1.3, settings.get("top_k"), settings.get("top_p"))
    assert torch.equal(top.token, (filtered + noise).argmax(dim=-1))
    assert torch.equal(noise, before)  # a block of it serves many steps
    # the confidence is that of the head itself, whatever the temperature and the filters
    assert_within_budget(
        top.confidence, torch.softmax(logits.double(), dim=-1).amax(dim=-1), confidence_of(logits), slack=2
    )
    assert torch.equal(top.confidence, top1_head(x, norm, packed, eps=1e-5).confidence)


def test_without_noise_it_is_the_top1():
    torch.manual_seed(1)
    x, norm, head = torch.randn(7, 48), torch.ones(48), torch.randn(67, 48)
    sampled = sample_head(x, norm, head, torch.zeros(7, 67), eps=1e-5, temperature=0.8, top_k=9, top_p=0.4)
    assert torch.equal(sampled.token, top1_head(x, norm, head, eps=1e-5).token)
