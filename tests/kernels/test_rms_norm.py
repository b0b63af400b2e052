import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from kangaroo_kernels.reference.rms_norm import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' ``LlamaRMSNorm`` has it; in float64 the truth."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("shape", [(1, 2), (1, 48), (16, 47), (5, 192), (80, 4096)])
def test_formula(shape, eps, dtype):
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[1]).to(dtype)
    truth = formula(x.double(), weight.double(), eps)
    assert_within_budget(rms_norm(x, weight, eps), truth, formula(x, weight, eps), slack=2)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e15])
def test_small_and_large_rows(scale):
    """``eps`` decides where the row is tiny; squares that leave float32's range do not spoil it."""
    torch.manual_seed(1)
    x, weight = scale * torch.randn(3, 64), torch.randn(64)
    truth = formula(x.double(), weight.double(), 1e-6)
    assert_within_budget(rms_norm(x, weight, 1e-6), truth, truth.float())


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_is_left_alone(dtype):
    x, weight = torch.randn(4, 16).to(dtype), torch.randn(16).to(dtype)
    before = x.clone(), weight.clone()
    out = rms_norm(x, weight, 1e-6)
    assert out.data_ptr() not in (x.data_ptr(), weight.data_ptr())
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_rows_do_not_see_each_other():
    torch.manual_seed(2)
    x, weight = torch.randn(16, 48), torch.randn(48)
    whole = rms_norm(x, weight, 1e-6)
    x[5] = float("nan")
    spoiled = rms_norm(x, weight, 1e-6)
    keep = torch.arange(16) != 5
    assert torch.equal(spoiled[keep], whole[keep])
    assert spoiled[5].isnan().all()


def test_constants_made_in_inference_mode_do_not_reach_autograd():
    """They are kept from call to call, and an adapter may be trained after its target has decoded."""
    with torch.inference_mode():
        rms_norm(torch.randn(1, 22), torch.ones(22), 3e-6)
    x = torch.randn(2, 22, requires_grad=True)
    rms_norm(x, torch.ones(22), 3e-6).sum().backward()
    assert torch.isfinite(x.grad).all()
