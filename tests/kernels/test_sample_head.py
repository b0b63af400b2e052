import re
from itertools import permutations

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from chi_square import REJECTED, p_value
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import poisoned_top1, same_top1
from recorded import Recorded
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kangaroo_kernels.contract import Top1
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.noise import gumbel, gumbel_rows
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.reference.sample_head import sample_head as reference
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head, top1_head
from kangaroo_kernels.sample_head import filtered_sample_kernel, sample_head_kernel
from kangaroo_kernels.sample_head import lm_head as lm_head_kernel
from kangaroo_kernels.sample_head import sample_head as kernel
from kangaroo_kernels.shared.filters import group, group_kernel
from kangaroo_kernels.shared.head import merge_tiles_kernel
from kangaroo_kernels.shared.launch import device_number, device_seed

NAN, INFINITY = float("nan"), float("inf")
NANS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
HALF = torch.float16
DTYPES = [torch.float32, HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter has no bf16 dot
EITHER = pytest.mark.parametrize("sample_head", [reference, kernel], ids=["reference", "kernel"])


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


def test_all_that_tie_with_the_last_stay():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for top_k, top_p in ((2, None), (4, None), (None, 0.75), (2, 0.8), (None, 0.9)):
        kept = torch.isfinite(filter_logits(logits, 1.0, top_k, top_p))
        assert kept.tolist() == [[True, True, True, True, False]]
    for top_k, top_p in ((1, None), (None, 0.6), (4, 0.1), (1, 0.99)):
        kept = torch.isfinite(filter_logits(logits, 1.0, top_k, top_p))
        assert kept.tolist() == [[False, True, False, False, False]]
    assert torch.isfinite(filter_logits(torch.zeros(1, 8), 1.0, None, 0.25)).all()


def test_no_filter_is_the_tempered_logits():
    logits = draw_logits(3, 50, 1.0, 2)
    for top_k, top_p in ((None, None), (50, None), (None, 1.0), (50, 1.0)):
        ours = filter_logits(logits, 0.7, top_k, top_p)
        assert torch.equal(ours, logits / 0.7)
        assert ours.data_ptr() != logits.data_ptr()


SETTINGS = [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}]
PATHS = SETTINGS[:2]
"""One for each way through the kernels: without a filter, with one."""


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("seed", "stream", "position"), [(0, 0, 0), (2**64 - 1, 2, 25)])
def test_the_token_is_the_largest_of_filtered_logits_and_noise(seed, stream, position, rows, settings):
    torch.manual_seed(0)
    x, norm, head = torch.randn(rows, 48), 1 + 0.1 * torch.randn(48), torch.randn(67, 48)
    noise = gumbel(seed, stream, position + torch.arange(rows), 67)
    packed = PackedWeight(head)
    for _ in range(2):  # a block of the noise serves many steps
        top = reference(x, norm, packed, position, eps=1e-5, temperature=1.3, seed=seed, stream=stream, **settings)
        logits = lm_head(x, norm, packed, eps=1e-5)
        filtered = warped(logits, 1.3, settings.get("top_k"), settings.get("top_p"))
        assert torch.equal(top.token, (filtered + noise).argmax(dim=-1))
        # the confidence is that of the head itself, whatever the temperature and the filters
        assert_within_budget(
            top.confidence, torch.softmax(logits.double(), dim=-1).amax(dim=-1), confidence_of(logits), slack=2
        )
        assert torch.equal(top.confidence, top1_head(x, norm, packed, eps=1e-5).confidence)
    kept = gumbel_rows(seed, stream, position, rows, 67, x.device)
    assert torch.equal(kept, noise)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-6}, {"temperature": 0.8, "top_k": 1}, {"temperature": 0.8, "top_p": 1e-9}]
)
def test_where_one_token_is_left_it_is_the_top1(settings):
    torch.manual_seed(1)
    x, norm, head = torch.randn(7, 48), torch.ones(48), torch.randn(67, 48)
    sampled = reference(x, norm, head, 5, eps=1e-5, seed=3, **settings)
    assert torch.equal(sampled.token, top1_head(x, norm, head, eps=1e-5).token)


# ---- the kernel


def problem(
    device: torch.device, rows: int, vocab_size: int, inner: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, norm and head; logits that leave a choice."""
    generator = torch.Generator().manual_seed(seed)
    x, head = (torch.randn(count, inner, generator=generator) for count in (rows, vocab_size))
    norm = 1 + 0.1 * torch.randn(inner, generator=generator)
    return x.to(device, dtype), norm.to(device, dtype), (2 * inner**-0.5 * head).to(device, dtype)


def with_logits(logits: Tensor, device: torch.device, rows: int = 1) -> tuple[Tensor, Tensor, PackedWeight]:
    """Arguments of a head that says so in every row, bit for bit: all of it is bias."""
    zeros = torch.zeros(len(logits), 4, device=device)
    weight = PackedWeight(zeros, logits.float().to(device), Layout.ROWS)
    return torch.ones(rows, 4, device=device), torch.ones(4, device=device), weight


def hold(x: Tensor, norm: Tensor, head: Tensor | PackedWeight, position: int, **settings: object) -> Top1:
    """The reference's tokens, and the confidence of the float64 logits."""
    out = poisoned_top1(len(x), x.device)
    assert kernel(x, norm, head, position, eps=1e-5, out=out, **settings) is out
    x, norm, bias = x.cpu(), norm.cpu(), isinstance(head, PackedWeight)
    head = PackedWeight(head.rows.cpu(), head.bias.cpu(), Layout.ROWS) if bias else head.cpu()
    assert out.token.tolist() == reference(x, norm, head, position, eps=1e-5, **settings).token.tolist()
    logits = lm_head(x, norm, head, eps=1e-5)
    wanted = torch.softmax(logits.double(), dim=-1).amax(dim=-1)
    torch.testing.assert_close(out.confidence.cpu().double(), wanted, rtol=2e-5, atol=0)
    return out


@pytest.mark.parametrize("seeds", [(0, 2**63), (7, 2**32 + 1, 2**64 - 1)])
@pytest.mark.parametrize(
    ("stream", "position", "temperature"),
    [(0, 0, 1.0), (1, 25, 0.3), (2, 31, 2.5), (0, 2**16 - 5, 0.9), (3, 2**16 + 9, 5.0), (1, 2**20 + 30, 0.05)],
)
def test_kernel_samples_the_same_tokens(device, seeds, stream, position, temperature):
    """Sixteen rows, the positions of which cross the reference's blocks of noise."""
    seed = seeds[position % len(seeds)]
    hold(*problem(device, 16, 67), position, temperature=temperature, seed=seed, stream=stream)


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("vocab_size", "inner"), [(1, 48), (2, 48), (31, 48), (33, 1), (128, 300), (301, 48)])
def test_kernel_shapes(device, vocab_size, inner, rows):
    hold(*problem(device, rows, vocab_size, inner), 100, temperature=1.2, seed=5)


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("vocab_size", "inner"), [(1, 48), (33, 130), (200, 1)])
def test_the_kernels_own_logits(device, rows, vocab_size, inner):
    x, norm, head = problem(device, rows, vocab_size, inner)
    bias = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).to(device)
    for weight in (head, PackedWeight(head, bias, Layout.ROWS)):
        truth = lm_head(x.double(), norm.double(), head.double(), eps=1e-5).double()
        if weight is not head:
            truth = truth + bias.double()
        logits = lm_head_kernel(x, norm, weight, eps=1e-5)
        torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        *({"top_k": top_k} for top_k in (1, 3, 66, 67, 500)),
        *({"top_p": top_p} for top_p in (1e-46, 1e-9, 0.3, 0.5, 0.9, 0.999, 1.0)),
        {"top_k": 3, "top_p": 0.5},
        {"top_k": 1, "top_p": 0.9},
        {"top_k": 30, "top_p": 0.9},
        {"top_k": 500, "top_p": 0.7},
        {"top_k": 20, "top_p": 1.0},
    ],
)
def test_kernel_filters(device, settings):
    hold(*problem(device, 2, 67), 2**16 - 1, temperature=1.3, seed=11, stream=1, **settings)


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("settings", SETTINGS[1:3])
@pytest.mark.parametrize(("vocab_size", "inner"), [(1, 48), (33, 130), (200, 1)])
def test_kernel_filters_in_odd_shapes(device, settings, vocab_size, inner):
    hold(*problem(device, 2, vocab_size, inner), 9, temperature=1.5, seed=2, **settings)


@pytest.mark.parametrize("inner", [48, 37])
def test_one_binary_serves_any_number_of_rows(device, monkeypatch, inner):
    """Wherever in a buffer they and the numbers begin, whatever their positions, their stream and the k of a filter."""
    recorded = [Recorded(sample_head_kernel), Recorded(filtered_sample_kernel), Recorded(group_kernel)]
    monkeypatch.setattr("kangaroo_kernels.sample_head.sample_head_kernel", recorded[0])
    monkeypatch.setattr("kangaroo_kernels.sample_head.filtered_sample_kernel", recorded[1])
    monkeypatch.setattr("kangaroo_kernels.shared.filters.group_kernel", recorded[2])
    monkeypatch.setattr("kangaroo_kernels.shared.head.merge_tiles_kernel", Recorded(merge_tiles_kernel))
    x, norm, head = problem(device, 20, 9, inner, HALF)
    draw = {"eps": 1e-5, "temperature": 1.0, "seed": 1}
    for first, rows in enumerate((1, 2, 3, 7, 16)):
        kernel(x[first : first + rows], norm, head, first, stream=first, **draw)
    kernel(x[:1], norm, head, 1, **(draw | {"temperature": on_device(1.0, device)}))
    assert len(recorded[0].binaries()) == 1
    assert recorded[1].launches == []
    for first, top_k in enumerate((1, 2, 8)):
        kernel(x[first : first + 1], norm, head, first, stream=first, top_k=top_k, **draw)
    kernel(x[:1], norm, head, 1, top_k=on_device(3, device), **(draw | {"temperature": on_device(1.0, device)}))
    assert len(recorded[1].binaries()) == len(recorded[2].binaries()) == 1


@pytest.mark.parametrize("settings", [{"top_k": 9}, {"top_k": 10}, {"top_p": 1.0}, {"top_k": 9, "top_p": 1.0}])
def test_a_filter_that_keeps_all_is_none(device, monkeypatch, settings):
    recorded = Recorded(filtered_sample_kernel)
    monkeypatch.setattr("kangaroo_kernels.sample_head.filtered_sample_kernel", recorded)
    hold(*problem(device, 2, 9), 3, temperature=1.0, seed=1, **settings)
    assert recorded.launches == []


@pytest.mark.parametrize("settings", PATHS)
def test_kernel_bias(device, settings):
    x, norm, head = problem(device, 3, 67)
    bias = 2 * torch.randn(67, generator=torch.Generator().manual_seed(1)).to(device)
    hold(x, norm, PackedWeight(head, bias, Layout.ROWS), 4, temperature=1.0, seed=3, **settings)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("settings", PATHS)
def test_kernel_low_precision(device, settings, dtype):
    """As far as the logits' own rounding allows: no token scores more, and none is far below the k-th."""
    x, norm, head = problem(device, 4, 67, dtype=dtype)
    top = kernel(x, norm, head, 40, eps=1e-5, temperature=1.0, seed=1, **settings)
    x, norm, head = x.cpu(), norm.cpu(), head.cpu()
    truth = torch.nn.functional.rms_norm(x.double(), (48,), norm.double(), 1e-5) @ head.double().t()
    budget = (lm_head(x, norm, head, eps=1e-5) - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert budget < (0.1 if dtype == HALF else 0.5)
    scores = truth + gumbel(1, 0, 40 + torch.arange(4), 67)
    token = top.token.cpu()[:, None]
    least = torch.topk(truth, settings.get("top_k", 67)).values[:, -1:]
    assert (truth.gather(1, token) >= least - 2 * budget).all()
    best = scores.masked_fill(truth < least + 2 * budget, -INFINITY).amax(dim=1, keepdim=True)
    assert (scores.gather(1, token) >= best - 2 * budget).all()
    wanted = torch.softmax(truth, dim=-1).amax(dim=-1)
    assert ((top.confidence.cpu() - wanted).abs() <= wanted * (2 * budget + 1e-6)).all()


# ---- rows of many groups


def on_device(value: float, device: torch.device) -> Tensor:
    """A number as an iteration on the device has it, in the middle of a buffer."""
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    return torch.tensor([99, value, 99], dtype=dtype, device=device)[1:2]


def filtered(
    logits: Tensor, device: torch.device, position: int, seed: int, temperature: float, **filters: float
) -> Top1:
    """The kernels behind the head alone, on logits ``[M, V]``."""
    rows, vocab_size = logits.shape
    out, logits = poisoned_top1(rows, device), logits.to(device)
    degrees = device_number(temperature, device)
    groups = group(logits, None, degrees, with_sums=True, with_masses="top_k" not in filters)
    given = {
        "logits_ptr": logits,
        "largest_ptr": groups.largest,
        "sum_ptr": groups.sums,
        "mass_ptr": groups.masses,
        "listed_ptr": groups.listed,
        "position_ptr": torch.tensor([position], device=device),
        "seed_ptr": device_seed(seed, device),
        "token_ptr": out.token,
        "confidence_ptr": out.confidence,
        "V": vocab_size,
        "stream": 0,
        "temperature_ptr": degrees,
        **{f"{name}_ptr": on_device(value, device) for name, value in filters.items()},
    }
    numbers = {"embedding_row_stride", "embedded_row_stride", "K"}
    rest = {name: 0 if name in numbers else None for name in filtered_sample_kernel.arg_names}
    filtered_sample_kernel[(rows,)](**(rest | given), num_warps=8)
    return Top1(*(part.cpu() for part in out))


@pytest.mark.parametrize("filters", [{"top_k": 4000}, {"top_p": 0.97}, {"top_k": 3000, "top_p": 0.999}])
@pytest.mark.parametrize("vocab_size", [4096, 9001])
def test_rows_of_many_chunks(device, vocab_size, filters):
    """Winners of any chunk; each row has its own position."""
    logits = draw_logits(3, vocab_size, 1.0, 4)
    top = filtered(logits, device, 77, 8, 2.0, **filters)
    scores = filter_logits(logits, 2.0, filters.get("top_k"), filters.get("top_p"))
    scores += gumbel(8, 0, torch.arange(77, 80), vocab_size)
    assert torch.equal(top.token, scores.argmax(dim=-1))
    if vocab_size == 9001:
        assert int(top.token.max()) >= 4096
    torch.testing.assert_close(top.confidence, confidence_of(logits.double()).float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("filters", [{"top_k": 8000}, {"top_p": 0.9999}])
def test_the_best_may_lie_in_any_chunk(device, filters):
    """High, low and middle in every order: a later chunk's best counts against that of all before it."""
    orders = list(permutations((40.0, 0.0, 20.0)))
    logits = torch.zeros(len(orders), 9000)
    for row, levels in enumerate(orders):
        logits[row, [100, 5000, 8999]] = torch.tensor(levels)
    top = filtered(logits, device, 5, 1, 0.5, **filters)
    assert top.token.tolist() == [(100, 5000, 8999)[levels.index(40.0)] for levels in orders]
    torch.testing.assert_close(top.confidence, confidence_of(logits.double()).float(), rtol=2e-5, atol=0)


@NANS
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}])
@pytest.mark.parametrize("places", [[0], [5, 40, 66], list(range(67))])
def test_kernel_nan_logits(device, settings, places):
    """The first NaN's token, a confidence that is NaN, and a flag that is lowered."""
    logits = draw_logits(1, 67, 2.0, 3)[0]
    logits[places] = NAN
    arguments = with_logits(logits, device)
    for sample_head in (reference, kernel):
        flag = torch.ones(1, dtype=torch.int32, device=device)
        drafting = {"threshold": 0.0, "active": flag}
        top = sample_head(*arguments, 3, eps=1e-5, temperature=0.8, seed=1, **drafting, **settings)
        assert top.token.tolist() == [places[0]]
        assert top.confidence.isnan().all()
        assert flag.tolist() == [0]


@NANS
@pytest.mark.parametrize("settings", PATHS)
def test_kernel_a_nan_makes_its_row_unsure_and_no_other(device, settings):
    x, norm, head = problem(device, 3, 67)
    clean = kernel(x, norm, head, 8, eps=1e-5, temperature=1.0, seed=1, **settings)
    x[1, 7] = NAN
    top = kernel(x, norm, head, 8, eps=1e-5, temperature=1.0, seed=1, **settings)
    assert top.confidence.isnan().tolist() == [False, True, False]
    assert int(top.token[1]) == 0
    for row in (0, 2):
        assert same_top1(Top1(*(part[row : row + 1] for part in top)), Top1(*(part[row : row + 1] for part in clean)))


@NANS
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.6}])
@pytest.mark.parametrize(
    ("places", "level", "confidence"), [([], 0.0, NAN), ([4], INFINITY, NAN), ([40], -5.0, 1.0), ([0, 66], 1.0, 0.5)]
)
def test_kernel_infinite_logits(device, places, level, confidence, settings):
    """-inf but for a few: these alone are drawn; with none of them nothing is sure."""
    logits = torch.full((67,), -INFINITY)
    logits[places] = level
    for sample_head in (reference, kernel):
        top = sample_head(*with_logits(logits, device), 3, eps=1e-5, temperature=0.8, seed=1, **settings)
        assert int(top.token) in (places or [0])
        assert float(top.confidence) == pytest.approx(confidence, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-6}, {"temperature": 0.8, "top_k": 1}, {"temperature": 0.8, "top_p": 1e-9}]
)
def test_kernel_where_one_token_is_left_it_is_the_top1(device, settings):
    x, norm, head = problem(device, 4, 67)
    sampled = kernel(x, norm, head, 5, eps=1e-5, seed=3, **settings)
    assert torch.equal(sampled.token, top1_head(x, norm, head, eps=1e-5).token)


def counts_of(device: torch.device, logits: Tensor, launches: int, temperature: float, **settings: float) -> Tensor:
    """How often each token comes, sixteen positions a launch."""
    tokens = [
        kernel(
            *with_logits(logits, device, rows=16), 16 * launch, eps=1e-5, temperature=temperature, seed=9, **settings
        ).token
        for launch in range(launches)
    ]
    return torch.cat(tokens).cpu().bincount(minlength=len(logits))


def test_distribution(device):
    """Tokens come as often as the tempered softmax says; the test would see another temperature, or other logits."""
    logits = torch.tensor([0.0, 1.0, -0.5, 0.3, 1.7, -2.0, 0.9])
    counts = counts_of(device, logits, 32, temperature=1.5)
    assert p_value(counts, torch.softmax(logits / 1.5, dim=0)) > REJECTED
    assert p_value(counts, torch.softmax(logits / 1.0, dim=0)) < REJECTED
    assert p_value(counts, torch.softmax(logits.roll(1) / 1.5, dim=0)) < REJECTED


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_distribution_on_a_gpu(device, settings):
    logits = draw_logits(1, 300, 1.5, 2)[0]
    counts = counts_of(device, logits, 4000, temperature=1.2, **settings)
    wanted = filter_logits(logits[None], 1.2, settings.get("top_k"), settings.get("top_p"))[0]
    assert p_value(counts, torch.softmax(wanted, dim=0)) > REJECTED
    assert p_value(counts, torch.softmax(logits / 1.0, dim=0)) < REJECTED


# ---- a drafting step


@EITHER
@pytest.mark.parametrize("settings", PATHS)
def test_position_and_seed_may_lie_on_the_device(device, sample_head, settings):
    """Wherever in a buffer; a seed from 2^63 on is a negative number of the same bits."""
    x, norm, head = problem(device, 2, 67)
    for seed, position in ((5, 3), (2**63 + 5, 2**17)):
        wanted = sample_head(x, norm, head, position, eps=1e-5, temperature=1.0, seed=seed, **settings)
        numbers = torch.tensor([99, position, seed - 2**64 if seed >= 2**63 else seed, 99], device=device)
        drawn = sample_head(x, norm, head, numbers[1:2], eps=1e-5, temperature=1.0, seed=numbers[2:3], **settings)
        assert same_top1(drawn, wanted)


@EITHER
@pytest.mark.parametrize("settings", PATHS)
@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_settings_may_lie_on_the_device(device, sample_head, settings, temperature):
    """The bits that the numbers give by value; the threshold is met or missed by one bit."""
    x, norm, head = problem(device, 1, 67)
    draw = {"eps": 1e-5, "seed": 5}
    wanted = sample_head(x, norm, head, 3, temperature=temperature, **settings, **draw)
    draw["temperature"] = on_device(temperature, device)
    draw |= {name: on_device(value, device) for name, value in settings.items()}
    confidence = float(wanted.confidence)
    for threshold, up in ((confidence, 1), (np.nextafter(np.float32(confidence), np.float32(2)), 0)):
        flag = torch.ones(1, dtype=torch.int32, device=device)
        where = on_device(float(threshold), device)
        assert same_top1(sample_head(x, norm, head, 3, threshold=where, active=flag, **draw), wanted)
        assert flag.tolist() == [up]


@EITHER
def test_filters_on_the_device_may_keep_all(device, sample_head):
    """A k of the whole vocabulary and beyond; a share too small for any token still keeps the likeliest."""
    x, norm, head = problem(device, 1, 67)
    draw = {"eps": 1e-5, "seed": 5, "temperature": 1.3}
    wanted = sample_head(x, norm, head, 3, **draw)
    for top_k in (67, 1000):
        assert torch.equal(sample_head(x, norm, head, 3, top_k=on_device(top_k, device), **draw).token, wanted.token)
    likeliest = sample_head(x, norm, head, 3, top_k=1, **draw)
    assert not torch.equal(likeliest.token, wanted.token)
    for top_p in (0.0, 1e-40):
        assert same_top1(sample_head(x, norm, head, 3, top_p=on_device(top_p, device), **draw), likeliest)


@EITHER
@pytest.mark.parametrize("settings", PATHS)
def test_a_flag_that_is_down(device, sample_head, settings):
    """Nothing is written, and the flag stays down."""
    x, norm, head = problem(device, 1, 67)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    out, embedded = poisoned_top1(1, device), torch.full((1, 48), NAN, device=device)
    step = {"threshold": 0.0, "active": flag, "embedding": head, "embedded": embedded, "seed": 1, "temperature": 1.0}
    assert sample_head(x, norm, head, 4, eps=1e-5, out=out, **step, **settings) is out
    assert same_top1(out, poisoned_top1(1, device))
    assert embedded.isnan().all()
    assert flag.tolist() == [0]
    made = sample_head(x, norm, head, 4, eps=1e-5, **step, **settings)
    assert [part.shape for part in made] == [(1,), (1,)]


@EITHER
@pytest.mark.parametrize("settings", PATHS)
def test_a_flag_that_is_up(device, sample_head, settings):
    """The bits of a call without one, lowered below the threshold alone; the token's embedding is fetched."""
    x, norm, head = problem(device, 1, 67)
    draw = {"eps": 1e-5, "temperature": 1.0, "seed": 1, **settings}
    wanted = sample_head(x, norm, head, 4, **draw)
    sure = float(wanted.confidence)
    above = float(torch.nextafter(wanted.confidence.cpu(), torch.tensor(INFINITY)))
    for threshold, up in ((None, 1), (sure, 1), (above, 0)):
        flag = torch.tensor([9, 1, 9], dtype=torch.int32, device=device)
        out, buffer = poisoned_top1(1, device), torch.full((3, 60), NAN, device=device)
        embedded = buffer[1:2, 5:53]
        step = {"threshold": threshold, "active": flag[1:2], "embedding": head, "embedded": embedded, "out": out}
        sample_head(x, norm, head, 4, **draw, **step)
        assert flag.tolist() == [9, up, 9]
        assert same_top1(out, wanted)
        assert torch.equal(embedded, head[wanted.token])
        embedded.fill_(NAN)
        assert buffer.isnan().all()


@EITHER
@pytest.mark.parametrize("settings", PATHS)
def test_the_verdict_may_have_a_flag_of_its_own(device, sample_head, settings):
    """It says whether this step is sure, whatever it said before; the other flag stays, and rules alone."""
    x, norm, head = problem(device, 1, 67)
    draw = {"eps": 1e-5, "temperature": 1.0, "seed": 1, **settings}
    sure = float(sample_head(x, norm, head, 4, **draw).confidence)
    for active, threshold, before in ((1, sure, 0), (1, sure + 1e-3, 1), (0, sure, 7), (None, sure, 0)):
        flag = None if active is None else torch.tensor([active], dtype=torch.int32, device=device)
        verdict = torch.tensor([9, before, 9], dtype=torch.int32, device=device)
        sample_head(x, norm, head, 4, threshold=threshold, active=flag, sure=verdict[1:2], **draw)
        assert verdict.tolist() == [9, before if active == 0 else int(threshold <= sure), 9]
        assert flag is None or flag.tolist() == [active]


@EITHER
@pytest.mark.parametrize("settings", PATHS)
def test_embeddings_of_many_rows(device, sample_head, settings):
    """More of each than a chunk."""
    x, norm, head = problem(device, 2, 9, 1030)
    embedded = torch.full((2, 1100), NAN, device=device)
    step = {"embedding": head, "embedded": embedded[:, :1030], "temperature": 1.0, "seed": 1}
    top = sample_head(x, norm, head, 4, eps=1e-5, **step, **settings)
    assert torch.equal(embedded[:, :1030], head[top.token])
    assert embedded[:, 1030:].isnan().all()


@pytest.mark.parametrize("settings", SETTINGS[::3])
def test_kernel_rows_are_rows_one_by_one(device, settings):
    """The same bits for a row of a pass as for the row alone at its own position."""
    x, norm, head = problem(device, 3, 67)
    draw = {"eps": 1e-5, "temperature": 1.0, "seed": 1, **settings}
    whole = kernel(x, norm, head, 30, **draw)
    for row in range(3):
        alone = kernel(x[row : row + 1], norm, head, 30 + row, **draw)
        assert same_top1(alone, Top1(*(part[row : row + 1] for part in whole)))


@pytest.mark.parametrize("settings", PATHS)
@pytest.mark.parametrize("inner", [48, 37])
def test_kernel_strides(device, settings, inner):
    x, norm, head = problem(device, 3, 67, inner)
    wanted = hold(x, norm, head, 5, temperature=1.0, seed=1, **settings)
    rows = torch.full((5, inner + 9), NAN, device=device)
    rows[1:4, 5 : 5 + inner] = x
    wide = torch.full((67, inner + 9), NAN, device=device)
    wide[:, :inner] = head
    found = hold(rows[1:4, 5 : 5 + inner], norm, wide[:, :inner], 5, temperature=1.0, seed=1, **settings)
    assert same_top1(found, wanted)


def test_arguments_that_do_not_fit(device):
    """The rest is ``top1_head``'s, and held there."""
    x, norm, head = problem(device, 2, 67)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    for message, arguments, settings in [
        ("sample_head takes 1 to 16 rows, got 17", (x.repeat(9, 1)[:17], norm, head), {}),
        ("sample_head: x is", (x[:, :40], norm, head), {}),
        ("sample_head: a threshold sets the flag", (x, norm, head), {"threshold": 0.5, "active": flag}),
        ("sample_head: give both embedding and embedded", (x, norm, head), {"embedding": head}),
        ("sample_head: out must be Top1", (x[:1], norm, head), {"out": poisoned_top1(2, device)}),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel(*arguments, 3, eps=1e-5, temperature=1.0, seed=1, **settings)


NO_NUMBERS = [
    *(
        ("temperature", value, "above 0 and finite, as a float32")
        for value in (0, 0.0, -1.0, NAN, INFINITY, 1e-46, 1e39)
    ),
    *(("top_k", value, "a whole number of at least 1, or None to keep all") for value in (0, -3, 2.5)),
    *(("top_p", value, "above 0, or None to keep all") for value in (0, 0.0, -0.5, NAN)),
    *(("seed", value, r"a whole number from 0 to 2\^64 - 1, or \[1\] int64") for value in (-1, 2**64, 1.5)),
    *(("position", value, r"a whole number from 0 to 2\^63 - 1, or \[1\] int64") for value in (-1, 2**63, 1.5)),
]


@EITHER
@pytest.mark.parametrize(("name", "value", "right"), NO_NUMBERS, ids=[f"{case[0]}={case[1]}" for case in NO_NUMBERS])
def test_numbers_that_draw_no_token(device, sample_head, name, value, right):
    """A temperature of 0 or infinity, for one, gave a token outside of the vocabulary."""
    x, norm, head = problem(device, 2, 67)
    settings = {"position": 3, "temperature": 1.0, "seed": 1, name: value}
    with pytest.raises(ValueError, match=rf"^sample_head: {name} is {re.escape(str(value))}; it must be {right}\.$"):
        sample_head(x, norm, head, eps=1e-5, **settings)


@EITHER
def test_numbers_at_their_bounds(device, sample_head):
    x, norm, head = problem(device, 2, 67)
    draw = {"eps": 1e-5, "temperature": 1.0, "seed": 1}
    for settings in ({"seed": 0}, {"seed": 2**64 - 1}, {"top_k": 1}, {"top_p": 1e-40}, {"temperature": 1e30}):
        token = sample_head(x, norm, head, 0, **draw | settings).token
        assert ((token >= 0) & (token < 67)).all()
    wanted = sample_head(x, norm, head, 0, **draw)
    for settings in ({"top_k": 67}, {"top_k": 2**62}, {"top_p": 1.0}, {"top_p": INFINITY}):
        assert same_top1(sample_head(x, norm, head, 0, **draw | settings), wanted)


@EITHER
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "seed", "position"])
def test_numbers_on_the_device_of_another_kind(device, sample_head, name):
    """They are not read; what can be told without is."""
    x, norm, head = problem(device, 2, 67)
    settings = {"position": 3, "temperature": 1.0, "seed": 1, "eps": 1e-5}
    right = on_device({"temperature": 1.0, "top_p": 0.9}.get(name, 3), device)
    sample_head(x, norm, head, **settings | {name: right})
    for fault in (right.double() if right.is_floating_point() else right.int(), right.expand(2), right.to("meta")):
        with pytest.raises(TypeError, match=rf"^sample_head: {name} is \[.\] .*; it must be \[1\] {right.dtype} on "):
            sample_head(x, norm, head, **settings | {name: fault})


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.8}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize(("vocab_size", "inner"), [(32_000, 4096), (128_256, 2048), (32_003, 2050)])
def test_a_rows_bits_on_a_gpu(device, vocab_size, inner, dtype, settings):
    """In a pass of any number of rows, at any place, beside random rows: token and confidence of the row alone."""
    x, norm, head = problem(device, 1, vocab_size, inner, dtype)
    generator = torch.Generator().manual_seed(1)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    for position in (20, 2**16 + 5):
        where = torch.tensor([position], device=device)
        draw = {"eps": 1e-5, "temperature": 0.9, "seed": 2**63 + 1, "stream": 1, **settings}
        alone = kernel(x, norm, head, position, **draw)
        assert same_top1(kernel(x, norm, head, where, threshold=0.0, active=flag, **draw), alone)
        for rows in range(1, 17):
            for place in range(rows):
                many = torch.randn(rows, inner, generator=generator).to(device, dtype)
                many[place] = x[0]
                found = kernel(many, norm, head, position - place, active=flag if place % 2 else None, **draw)
                assert same_top1(Top1(*(part[place : place + 1] for part in found)), alone), (rows, place)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}])
@pytest.mark.parametrize(("vocab_size", "inner"), [(32_000, 4096), (128_256, 2048)])
def test_real_shapes(device, vocab_size, inner, settings):
    for position in (0, 1000):
        hold(*problem(device, 16, vocab_size, inner), position, temperature=0.8, seed=4, **settings)
