import pytest
import torch
from budget import assert_within_budget

from kangaroo_kernels.packed_weight import PackedWeight
from kangaroo_kernels.top1_head_ref import confidence_of, lm_head, top1_head

NAN = float("nan")


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
    top = top1_head(x, norm, packed, eps=1e-5)
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
        assert int(top1_head(hidden, norm, weight, eps=0.0).token) == places[0]


def test_all_alike():
    hidden, norm, head = spread([[1.5] * 300])
    top = top1_head(hidden, norm, head, eps=0.0)
    assert int(top.token) == 0
    assert float(top.confidence) == pytest.approx(1 / 300, rel=1e-6)


def test_rows_are_decided_one_by_one():
    hidden, norm, head = spread([[0.0, 5.0, 1.0], [4.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    top = top1_head(hidden, norm, head, eps=0.0)
    assert top.token.tolist() == [1, 0, 2]
    for row in range(3):
        single = top1_head(hidden[row : row + 1], norm, head, eps=0.0)
        assert int(single.token) == int(top.token[row])
        assert float(single.confidence) == pytest.approx(float(top.confidence[row]), rel=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1e6, 1e30])
def test_large_logits_do_not_overflow(scale):
    hidden, norm, head = spread([[0.0, scale, scale / 2]])
    top = top1_head(hidden, norm, head, eps=0.0)
    assert int(top.token) == 1
    assert float(top.confidence) == 1.0


def test_a_nan_makes_its_row_unsure_and_no_other():
    torch.manual_seed(0)
    x, norm, head = torch.randn(3, 48), torch.ones(48), torch.randn(67, 48)
    clean = top1_head(x, norm, head, eps=1e-5)
    x[1, 7] = NAN
    top = top1_head(x, norm, head, eps=1e-5)
    assert top.confidence.isnan().tolist() == [False, True, False]
    assert 0 <= int(top.token[1]) < 67
    for row in (0, 2):
        assert int(top.token[row]) == int(clean.token[row])
    assert not bool(top.confidence[1] >= 0.0)  # so that no threshold is reached


@pytest.mark.parametrize("column", [[NAN, 1.0, 2.0], [0.0, 1.0, NAN], [NAN, NAN, NAN], [float("inf")] * 3])
def test_logits_that_are_none(column):
    assert confidence_of(torch.tensor([column])).isnan().all()
