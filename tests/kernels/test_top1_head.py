import math

import pytest
import torch
from budget import assert_within_budget
from kernel_inputs import poisoned_top1, same_top1
from recorded import Recorded
from torch import Tensor
from triton import knobs

from kangaroo_kernels.contract import Top1
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head
from kangaroo_kernels.reference.top1_head import top1_head as reference
from kangaroo_kernels.shared.head import TileResults, merge_tiles, merge_tiles_kernel
from kangaroo_kernels.top1_head import top1_head as kernel
from kangaroo_kernels.top1_head import top1_head_kernel

NAN, INFINITY = float("nan"), float("inf")
NANS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
HALF = torch.float16
DTYPES = [torch.float32, HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter has no bf16 dot
EITHER = pytest.mark.parametrize("top1_head", [reference, kernel], ids=["reference", "kernel"])


def spread(columns: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, norm and head whose logits are ``columns``: row i of the hidden states picks column i."""
    logits = torch.tensor(columns)
    hidden = torch.eye(4)[: len(columns)]  # normalised: 2 where there is a 1
    head = torch.zeros(logits.shape[1], 4)
    head[:, : len(columns)] = logits.t() / 2
    return hidden, torch.ones(4), head


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("vocab_size", [1, 2, 67, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula(vocab_size, rows, dtype):
    torch.manual_seed(0)
    x, norm, head = (torch.randn(size).to(dtype) for size in ((rows, 48), (48,), (vocab_size, 48)))
    packed = PackedWeight(head)
    logits = lm_head(x, norm, packed, eps=1e-5)
    normed = torch.nn.functional.rms_norm(x.double(), (48,), norm.double(), 1e-5)
    truth = normed @ head.double().t()
    straightforward = torch.nn.functional.rms_norm(x, (48,), norm, 1e-5) @ head.t()
    assert logits.dtype == torch.float32
    assert_within_budget(logits.to(dtype), truth, straightforward, slack=8 if dtype == torch.float32 else 2)
    top = reference(x, norm, packed, eps=1e-5)
    assert top.token.shape == top.confidence.shape == (rows,)
    assert top.token.dtype == torch.int64
    assert top.confidence.dtype == torch.float32
    assert torch.equal(top.token, logits.argmax(dim=-1))
    exact = torch.softmax(logits.double(), dim=-1)
    wanted = exact.gather(1, top.token[:, None])[:, 0]
    assert_within_budget(top.confidence, wanted, torch.softmax(logits, dim=-1).amax(dim=-1), slack=4)


@pytest.mark.parametrize("places", [[0, 1], [3, 900], [511, 512], [0, 999], [7, 8, 9, 640]])
def test_ties_go_to_the_lowest_index(places):
    column = [0.0] * 1000
    for place in places:
        column[place] = 3.0
    hidden, norm, head = spread([column])
    for weight in (head, PackedWeight(head)):
        assert int(reference(hidden, norm, weight, eps=0.0).token) == places[0]


def test_all_alike():
    hidden, norm, head = spread([[1.5] * 300])
    top = reference(hidden, norm, head, eps=0.0)
    assert int(top.token) == 0
    assert float(top.confidence) == pytest.approx(1 / 300, rel=1e-6)


def test_rows_are_decided_one_by_one():
    hidden, norm, head = spread([[0.0, 5.0, 1.0], [4.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    top = reference(hidden, norm, head, eps=0.0)
    assert top.token.tolist() == [1, 0, 2]
    for row in range(3):
        single = reference(hidden[row : row + 1], norm, head, eps=0.0)
        assert int(single.token) == int(top.token[row])
        assert float(single.confidence) == pytest.approx(float(top.confidence[row]), rel=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1e6, 1e30])
def test_large_logits_do_not_overflow(scale):
    hidden, norm, head = spread([[0.0, scale, scale / 2]])
    top = reference(hidden, norm, head, eps=0.0)
    assert int(top.token) == 1
    assert float(top.confidence) == 1.0


def test_a_nan_makes_its_row_unsure_and_no_other():
    torch.manual_seed(0)
    x, norm, head = torch.randn(3, 48), torch.ones(48), torch.randn(67, 48)
    clean = reference(x, norm, head, eps=1e-5)
    x[1, 7] = NAN
    top = reference(x, norm, head, eps=1e-5)
    assert top.confidence.isnan().tolist() == [False, True, False]
    assert 0 <= int(top.token[1]) < 67
    for row in (0, 2):
        assert int(top.token[row]) == int(clean.token[row])
    assert not bool(top.confidence[1] >= 0.0)  # so that no threshold is reached


@pytest.mark.parametrize("column", [[NAN, 1.0, 2.0], [0.0, 1.0, NAN], [NAN, NAN, NAN], [float("inf")] * 3])
def test_logits_that_are_none(column):
    assert confidence_of(torch.tensor([column])).isnan().all()


# ---- the kernel


def problem(
    device: torch.device, rows: int, vocab_size: int, inner: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, norm and head."""
    generator = torch.Generator().manual_seed(seed)
    x, head = (torch.randn(count, inner, generator=generator) for count in (rows, vocab_size))
    norm = 1 + 0.1 * torch.randn(inner, generator=generator)
    return x.to(device, dtype), norm.to(device, dtype), head.to(device, dtype)


def with_logits(logits: list[float], device: torch.device, rows: int = 1) -> tuple[Tensor, Tensor, PackedWeight]:
    """Arguments of a head that says so in every row, bit for bit: all of it is bias."""
    bias = torch.tensor(logits, device=device)
    zeros = torch.zeros(len(logits), 4, device=device)
    return torch.ones(rows, 4, device=device), torch.ones(4, device=device), PackedWeight(zeros, bias, Layout.ROWS)


def hold(x: Tensor, norm: Tensor, head: Tensor, bias: Tensor | None = None) -> Top1:
    """The token is as likely as any, and the confidence its probability, both by float64's measure."""
    weight = head if bias is None else PackedWeight(head, bias, Layout.ROWS)
    out = poisoned_top1(len(x), x.device)
    assert kernel(x, norm, weight, eps=1e-5, out=out) is out
    x, norm, head = x.cpu(), norm.cpu(), head.cpu()
    weight = head if bias is None else PackedWeight(head, bias.cpu(), Layout.ROWS)
    truth = torch.nn.functional.rms_norm(x.double(), x.shape[1:], norm.double(), 1e-5) @ head.double().t()
    truth += 0 if bias is None else bias.cpu().double()
    logits = lm_head(x, norm, weight, eps=1e-5)
    token = out.token.cpu()
    budget = (logits - truth).abs().max() + 4 * torch.finfo(x.dtype).eps * truth.abs().max()
    assert (truth.gather(1, token[:, None])[:, 0] >= truth.amax(dim=1) - 2 * budget).all()
    if x.dtype == torch.float32:
        assert torch.equal(token, truth.argmax(dim=1))
    wanted = torch.softmax(truth, dim=-1).amax(dim=-1)
    # a logit's error is the relative error of its exponential
    assert ((out.confidence.cpu() - wanted).abs() <= wanted * (2 * budget + 1e-6)).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(
    ("vocab_size", "inner"), [(1, 48), (2, 48), (31, 48), (32, 48), (33, 1), (67, 48), (128, 300), (129, 257)]
)
def test_kernel_formula(device, vocab_size, inner, rows, dtype):
    hold(*problem(device, rows, vocab_size, inner, dtype))


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("rows", range(1, 17))
def test_kernel_rows(device, rows):
    """The same bits for a row of a pass as for the row alone, whatever lies beside it."""
    x, norm, head = problem(device, 16, 67)
    whole = hold(x[:rows], norm, head)
    alone = kernel(x[rows - 1 : rows], norm, head, eps=1e-5)
    assert same_top1(alone, Top1(*(part[-1:] for part in whole)))


@pytest.mark.parametrize("inner", [48, 37])
def test_one_binary_serves_any_number_of_rows(device, monkeypatch, inner):
    """Wherever in a buffer they begin."""
    recorded = [Recorded(top1_head_kernel), Recorded(merge_tiles_kernel)]
    monkeypatch.setattr("kangaroo_kernels.top1_head.top1_head_kernel", recorded[0])
    monkeypatch.setattr("kangaroo_kernels.shared.head.merge_tiles_kernel", recorded[1])
    x, norm, head = problem(device, 20, 9, inner, HALF)
    for rows in range(1, 17):
        for first in (0, 1, 4):
            kernel(x[first : first + rows], norm, head, eps=1e-5)
    for each in recorded:
        assert len(each.launches) == 48
        assert len(each.binaries()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 70])
def test_kernel_bias(device, vocab_size, dtype):
    x, norm, head = problem(device, 3, vocab_size, dtype=dtype)
    bias = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    biased = hold(x, norm, head, bias)
    assert not torch.equal(biased.confidence, kernel(x, norm, head, eps=1e-5).confidence)


@pytest.mark.parametrize("places", [[0, 1], [3, 4, 5], [15, 16], [31, 32], [0, 199], [7, 8, 9, 140], [127, 128], [199]])
def test_kernel_ties_go_to_the_lowest_index(device, places):
    """Within a tile of the vocabulary and across tiles."""
    column = [0.0] * 200
    for place in places:
        column[place] = 3.0
    top = kernel(*with_logits(column, device, rows=2), eps=1e-5)
    assert top.token.tolist() == [places[0]] * 2
    assert top.confidence.tolist() == pytest.approx([1 / (len(places) + (200 - len(places)) * math.exp(-3))] * 2)


@pytest.mark.parametrize("vocab_size", [1, 5, 32, 33, 100])
@pytest.mark.parametrize("level", [-1e30, -1.5, 0.0, 1.5, 1e30])
def test_kernel_all_alike(device, vocab_size, level):
    """What pads the last tile is no token, even where every logit lies below 0."""
    top = kernel(*with_logits([level] * vocab_size, device), eps=1e-5)
    assert top.token.tolist() == [0]
    assert top.confidence.tolist() == pytest.approx([1 / vocab_size], rel=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1e6, 1e30])
def test_kernel_large_logits_do_not_overflow(device, scale):
    for columns in ([0.0, scale, scale / 2], [0.0] * 40 + [scale] + [scale / 2] * 40, [-scale, -scale / 2, -scale]):
        top = kernel(*with_logits(columns, device), eps=1e-5)
        assert top.token.tolist() == [columns.index(max(columns))]
        assert top.confidence.tolist() == [1.0]


@pytest.mark.parametrize("norm_of", [1e-3, 1.0, 100.0])
def test_kernel_norm(device, norm_of):
    """Hidden states of any size, and eps where it counts."""
    x, norm, head = problem(device, 3, 40)
    hold(norm_of * x, norm, head)


@NANS
@pytest.mark.parametrize("places", [[0], [2], [5, 40], [40, 66], [66], list(range(67)), list(range(32, 64))])
def test_kernel_nan_logits(device, places):
    """The first NaN's token, as ``torch.argmax`` has it, a confidence that is NaN, and a flag that is lowered."""
    logits = torch.randn(67, generator=torch.Generator().manual_seed(0))
    logits[places] = NAN
    arguments = with_logits(logits.tolist(), device)
    for top1_head in (reference, kernel):
        flag = torch.ones(1, dtype=torch.int32, device=device)
        top = top1_head(*arguments, eps=1e-5, threshold=0.0, active=flag)
        assert top.token.tolist() == [places[0]]
        assert top.confidence.isnan().all()
        assert flag.tolist() == [0]


@NANS
def test_kernel_a_nan_makes_its_row_unsure_and_no_other(device):
    x, norm, head = problem(device, 5, 67)
    clean = kernel(x, norm, head, eps=1e-5)
    x[2, 7] = NAN
    top = kernel(x, norm, head, eps=1e-5)
    assert top.confidence.isnan().tolist() == [False, False, True, False, False]
    assert int(top.token[2]) == 0
    for row in (0, 1, 3, 4):
        assert same_top1(Top1(*(part[row : row + 1] for part in top)), Top1(*(part[row : row + 1] for part in clean)))


@NANS
@pytest.mark.parametrize(
    ("logits", "token", "confidence"),
    [
        ([-INFINITY, 2.0, -INFINITY], 1, 1.0),
        ([-INFINITY] * 40 + [1.0, 1.0], 40, 0.5),
        ([1.0] + [-INFINITY] * 70, 0, 1.0),
        ([-INFINITY] * 32 + [0.0] * 32 + [-INFINITY] * 32, 32, 1 / 32),
        ([1.0, INFINITY, 2.0], 1, NAN),
        ([0.0] * 40 + [INFINITY], 40, NAN),
    ],
)
def test_kernel_infinite_logits(device, logits, token, confidence):
    for top1_head in (reference, kernel):
        top = top1_head(*with_logits(logits, device), eps=1e-5)
        assert top.token.tolist() == [token]
        assert top.confidence.tolist() == pytest.approx([confidence], rel=1e-6, nan_ok=True)


@NANS
@EITHER
@pytest.mark.parametrize("vocab_size", [3, 40])
def test_no_logit_at_all_is_unsure(device, top1_head, vocab_size):
    flag = torch.ones(1, dtype=torch.int32, device=device)
    arguments = with_logits([-INFINITY] * vocab_size, device)
    top = top1_head(*arguments, eps=1e-5, threshold=0.5, active=flag)
    assert top.token.tolist() == [0]
    assert top.confidence.isnan().all()
    assert flag.tolist() == [0]


def by_formula(scores: Tensor, indices: Tensor, largest: Tensor, sums: Tensor) -> Top1:
    """What merged tiles must say, row by row, in float64."""
    best = torch.where(scores.isnan(), INFINITY, scores).amax(dim=1, keepdim=True)
    token = torch.where(scores == best, indices, 2**31 - 1).amin(dim=1)
    tops = largest.double()
    total = (sums.double() * torch.exp(tops - tops.amax(dim=1, keepdim=True))).sum(dim=1)
    return Top1(token.long(), (1 / total).float())


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("count", "winners"),
    [
        (1, [0]),
        (1023, [1022]),
        (1024, [3, 1023]),
        (1025, [1024]),
        (1025, [0, 1024]),
        (2500, [17, 1023, 1024, 2499]),
        (2500, [1024, 2048]),
        (2500, [2048, 2499]),
        (4000, [3999]),
    ],
)
def test_tiles_are_merged(device, count, winners, sampled):
    """More tiles than a chunk of 1024: the winner in any chunk, ties within one and across."""
    generator = torch.Generator().manual_seed(count)
    rows = 2
    tiles = TileResults(rows, count, device, sampled=sampled)
    scores, largest = torch.randn(2, rows, count, generator=generator)
    if not sampled:
        largest = scores
    scores[:, winners] = 9.0
    sums = 1 + torch.rand(rows, count, generator=generator)
    indices = 32 * torch.arange(count, dtype=torch.int32) + torch.randint(0, 32, (rows, count), generator=generator)
    for mine, theirs in (
        (tiles.scores, scores),
        (tiles.largest, largest),
        (tiles.sums, sums),
        (tiles.indices, indices),
    ):
        mine.copy_(theirs)
    out = merge_tiles(tiles, poisoned_top1(rows, device), *[None] * 6, [None] * 6)
    wanted = by_formula(scores, indices, largest, sums)
    assert torch.equal(out.token.cpu(), wanted.token)
    assert out.token.tolist() == indices[:, winners[0]].tolist()
    torch.testing.assert_close(out.confidence.cpu(), wanted.confidence, rtol=2e-6, atol=0)


@NANS
@pytest.mark.parametrize("place", [0, 1023, 1024, 1500])
def test_merged_tiles_may_be_empty_or_nan(device, place):
    """-inf everywhere but in one tile, wherever: sums of nothing count nothing. A NaN's tile makes the row unsure."""
    count = 1600
    tiles = TileResults(1, count, device, sampled=False)
    tiles.largest.fill_(-INFINITY)[:, place] = 2.0
    tiles.sums.zero_()[:, place] = 4.0
    tiles.indices.copy_(torch.arange(count))
    out = merge_tiles(tiles, poisoned_top1(1, device), *[None] * 6, [None] * 6)
    assert (out.token.tolist(), out.confidence.tolist()) == ([place], [0.25])
    tiles.largest[:, place], tiles.sums[:, place] = INFINITY, NAN
    out = merge_tiles(tiles, poisoned_top1(1, device), *[None] * 6, [None] * 6)
    assert out.token.tolist() == [place]
    assert out.confidence.isnan().all()


def neighbours(number: Tensor) -> tuple[float, float, float]:
    """A float32, the next below and the next above."""
    edge = torch.tensor([-INFINITY, INFINITY])
    return (float(number), *torch.nextafter(number.cpu().expand(2), edge).tolist())


@EITHER
def test_the_threshold_lowers_the_flag_below_it_alone(device, top1_head):
    x, norm, head = problem(device, 1, 67)
    confidence, below, above = neighbours(top1_head(x, norm, head, eps=1e-5).confidence)
    for threshold, up in ((confidence, 1), (below, 1), (above, 0), (0.0, 1), (1.0, 0)):
        for value in (1, 5):  # any number but 0 is up
            flag = torch.tensor([9, value, 9], dtype=torch.int32, device=device)
            top1_head(x, norm, head, eps=1e-5, threshold=threshold, active=flag[1:2])
            assert flag.tolist() == [9, up, 9]
        flag, settings = flag.fill_(1), torch.tensor([7.0, threshold, 7.0], device=device)
        top1_head(x, norm, head, eps=1e-5, threshold=settings[1:2], active=flag[1:2])
        assert flag.tolist() == [1, up, 1]


@EITHER
def test_the_verdict_may_have_a_flag_of_its_own(device, top1_head):
    """It says whether this step is sure, whatever it said before; the other flag stays, and rules alone."""
    x, norm, head = problem(device, 1, 67)
    sure = float(top1_head(x, norm, head, eps=1e-5).confidence)
    for active, threshold, before in ((1, sure, 0), (1, sure + 1e-3, 1), (0, sure, 7), (None, sure, 0)):
        flag = None if active is None else torch.tensor([active], dtype=torch.int32, device=device)
        verdict = torch.tensor([9, before, 9], dtype=torch.int32, device=device)
        top1_head(x, norm, head, eps=1e-5, threshold=threshold, active=flag, sure=verdict[1:2])
        assert verdict.tolist() == [9, before if active == 0 else int(threshold <= sure), 9]
        assert flag is None or flag.tolist() == [active]


@EITHER
def test_without_a_threshold_the_flag_stays(device, top1_head):
    x, norm, head = problem(device, 3, 67)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    wanted = top1_head(x, norm, head, eps=1e-5)
    assert same_top1(top1_head(x, norm, head, eps=1e-5, active=flag), wanted)
    assert flag.tolist() == [1]


@EITHER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 48), (3, 5), (2, 1024), (2, 1030), (1, 2050)])
def test_the_tokens_embedding_is_fetched(device, top1_head, rows, inner, dtype):
    """More of it than a chunk, into and out of wider buffers; nothing beside it is written."""
    x, norm, head = problem(device, rows, 9, inner, dtype)
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(9, inner + 3, generator=generator).to(device, dtype)[:, :inner]
    buffer = torch.full((rows + 2, inner + 7), NAN, device=device, dtype=dtype)
    embedded = buffer[1:-1, 2 : inner + 2]
    top = top1_head(x, norm, head, eps=1e-5, embedding=embedding, embedded=embedded)
    assert torch.equal(embedded, embedding[top.token])
    embedded.fill_(NAN)
    assert buffer.isnan().all()
    assert same_top1(top1_head(x, norm, head, eps=1e-5), top)


@EITHER
def test_a_flag_that_is_down(device, top1_head):
    """Nothing is written, and the flag stays down."""
    x, norm, head = problem(device, 1, 67)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    out, embedded = poisoned_top1(1, device), torch.full((1, 48), NAN, device=device)
    settings = {"threshold": 0.0, "active": flag, "embedding": head, "embedded": embedded}
    assert top1_head(x, norm, head, eps=1e-5, out=out, **settings) is out
    assert same_top1(out, poisoned_top1(1, device))
    assert embedded.isnan().all()
    assert flag.tolist() == [0]
    assert [part.shape for part in top1_head(x, norm, head, eps=1e-5, **settings)] == [(1,), (1,)]


@EITHER
def test_a_flag_that_is_up(device, top1_head):
    """The bits of a call without one, and all of a drafting step at once."""
    x, norm, head = problem(device, 1, 67)
    wanted = top1_head(x, norm, head, eps=1e-5)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    out, embedded = poisoned_top1(1, device), torch.full((1, 48), NAN, device=device)
    top1_head(x, norm, head, eps=1e-5, threshold=0.0, active=flag, embedding=head, embedded=embedded, out=out)
    assert same_top1(out, wanted)
    assert torch.equal(embedded, head[wanted.token])
    assert flag.tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["middle of a buffer", "wide rows", "columns", "every other", "wide weight"])
@pytest.mark.parametrize("inner", [48, 37])
def test_kernel_strides(device, layout, inner, dtype):
    """Rows out of the middle of a buffer that is NaN elsewhere, of a weight, too: the same bits."""
    x, norm, head = problem(device, 3, 67, inner, dtype)
    wanted = hold(x, norm, head)
    if layout == "middle of a buffer":
        buffer = torch.full((5, inner), NAN, device=device, dtype=dtype)
        buffer[1:4] = x
        x = buffer[1:4]
    elif layout == "wide rows":
        buffer = torch.full((3, inner + 9), NAN, device=device, dtype=dtype)
        buffer[:, 5 : 5 + inner] = x
        x = buffer[:, 5 : 5 + inner]
    elif layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "every other":
        x = torch.stack((x, torch.full_like(x, NAN)), dim=2).flatten(1)[:, ::2]
    else:
        buffer = torch.full((67, inner + 9), NAN, device=device, dtype=dtype)
        buffer[:, :inner] = head
        head = buffer[:, :inner]
    assert same_top1(kernel(x, norm, head, eps=1e-5), wanted)


def test_arguments_are_left_alone(device):
    parts = problem(device, 3, 67)
    before = [part.clone() for part in parts]
    kernel(*parts, eps=1e-5)
    assert all(torch.equal(part, kept) for part, kept in zip(parts, before, strict=True))


def test_arguments_that_do_not_fit(device):
    x, norm, head = problem(device, 2, 67)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    embedded = torch.zeros(2, 48, device=device)
    token, confidence = poisoned_top1(2, device)
    for error, message, arguments, settings in [
        (ValueError, "1 to 16 rows, got 17", (x.repeat(9, 1)[:17], norm, head), {}),
        (ValueError, "1 to 16 rows, got 0", (x[:0], norm, head), {}),
        (TypeError, "float32, float16 or bfloat16", (x.double(), norm.double(), head.double()), {}),
        (ValueError, r"\[M, K\], \[N, K\]", (x[:, :40], norm, head), {}),
        (ValueError, r"\[M, K\], \[N, K\]", (x, norm, head[0]), {}),
        (ValueError, r"\[M, K\], \[N, K\]", (x[0, :10], norm, head), {}),
        (ValueError, "stride 67 along K", (x, norm, head.t().contiguous().t()), {}),
        (ValueError, "the norm's weight is", (x, norm[:40], head), {}),
        (ValueError, "the norm's weight is", (x, norm.repeat(2)[::2], head), {}),
        (TypeError, "the weight torch.float16", (x, norm, head.half()), {}),
        (TypeError, "the norm's weight torch.float16", (x, norm.half(), head), {}),
        (ValueError, "a threshold sets the flag", (x, norm, head), {"threshold": 0.5, "active": flag}),
        (ValueError, "a threshold sets the flag", (x[:1], norm, head), {"threshold": 0.5}),
        (ValueError, "both embedding and embedded", (x, norm, head), {"embedding": head}),
        (ValueError, "both embedding and embedded", (x, norm, head), {"embedded": embedded}),
        (ValueError, "embedded has 2 rows, x 1", (x[:1], norm, head), {"embedding": head, "embedded": embedded}),
        (ValueError, "embedding has rows of 40", (x, norm, head), {"embedding": head[:, :40], "embedded": embedded}),
        (ValueError, "embedding is", (x, norm, head), {"embedding": head.half(), "embedded": embedded}),
        (ValueError, "embedded of 40", (x, norm, head), {"embedding": head, "embedded": embedded[:, :40]}),
        (ValueError, "embedded is", (x, norm, head), {"embedding": head, "embedded": embedded.t().contiguous().t()}),
        (ValueError, "out must be Top1", (x, norm, head), {"out": Top1(token.int(), confidence)}),
        (ValueError, "out must be Top1", (x, norm, head), {"out": Top1(token, confidence.double())}),
        (ValueError, "out must be Top1", (x, norm, head), {"out": Top1(token[:1], confidence)}),
        (ValueError, "out must be Top1", (x[:1], norm, head), {"out": Top1(token, confidence)}),
        (ValueError, "packed as TRANSPOSED", (x, norm, PackedWeight(head, layout=Layout.TRANSPOSED)), {}),
    ]:
        with pytest.raises(error, match=message):
            kernel(*arguments, eps=1e-5, **settings)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernel(*problem(torch.device("cpu"), 1, 9), eps=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
@pytest.mark.parametrize(("vocab_size", "inner"), [(32_000, 4096), (128_256, 2048), (32_003, 2050)])
def test_a_rows_bits_on_a_gpu(device, vocab_size, inner, dtype):
    """In a pass of any number of rows, at any place, beside random rows: token and confidence of the row alone."""
    x, norm, head = problem(device, 1, vocab_size, inner, dtype)
    alone = kernel(x, norm, head, eps=1e-5)
    generator = torch.Generator().manual_seed(1)
    flag = torch.ones(1, dtype=torch.int32, device=device)
    assert same_top1(kernel(x, norm, head, eps=1e-5, threshold=0.0, active=flag), alone)
    for rows in range(1, 17):
        for place in range(rows):
            many = torch.randn(rows, inner, generator=generator).to(device, dtype)
            many[place] = x[0]
            found = kernel(many, norm, head, eps=1e-5, active=flag if place % 2 else None)
            assert same_top1(Top1(*(part[place : place + 1] for part in found)), alone), (rows, place)


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab_size", "inner"), [(32_000, 4096), (128_256, 2048)])
def test_real_shapes(device, vocab_size, inner):
    """In float32, where the token is decided: the largest of the float64 logits."""
    hold(*problem(device, 4, vocab_size, inner))
