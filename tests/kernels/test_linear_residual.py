import pytest
import torch
from budget import assert_within_budget

from kangaroo_kernels.linear_residual_ref import linear_residual
from kangaroo_kernels.packed_weight import PackedWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 70])
@pytest.mark.parametrize("shape", [(48, 48), (48, 80), (33, 7)])
def test_formula(shape, rows, packed, dtype):
    torch.manual_seed(0)
    weight, x, residual = (torch.randn(size).to(dtype) for size in (shape, (rows, shape[1]), (rows, shape[0])))
    truth = residual.double() + x.double() @ weight.double().t()
    straightforward = residual + x @ weight.t()
    ours = linear_residual(x, PackedWeight(weight) if packed else weight, residual)
    assert_within_budget(ours, truth, straightforward, slack=8 if dtype == torch.float32 else 2)


def test_bias_comes_once():
    weight, bias, x, residual = torch.randn(9, 8), torch.randn(9), torch.randn(3, 8), torch.randn(3, 9)
    truth = residual.double() + bias.double() + x.double() @ weight.double().t()
    assert_within_budget(
        linear_residual(x, PackedWeight(weight, bias), residual), truth, residual + bias + x @ weight.t()
    )


def test_the_residual_is_left_alone():
    """The drafter keeps it: it is the exit hidden state that verification goes on from."""
    weight, x, residual = torch.randn(9, 8), torch.randn(3, 8), torch.randn(3, 9)
    before = residual.clone()
    out = linear_residual(x, PackedWeight(weight), residual)
    assert torch.equal(residual, before)
    assert out.data_ptr() != residual.data_ptr()
