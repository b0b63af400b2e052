import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from kangaroo_kernels.gate_up_ref import gate_up
from kangaroo_kernels.packed_weight import Layout, PackedWeight


def formula(x: Tensor, norm: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """As transformers' ``LlamaRMSNorm`` and ``LlamaMLP`` have it, without the down projection."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    inner = weight.shape[0] // 2
    gate, up = normed @ weight[:inner].t(), normed @ weight[inner:].t()
    if bias is not None:
        gate, up = gate + bias[:inner], up + bias[inner:]
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 70])
@pytest.mark.parametrize(("hidden", "inner"), [(48, 80), (33, 7), (64, 256)])
def test_formula(hidden, inner, rows, dtype):
    torch.manual_seed(0)
    x, norm = torch.randn(rows, hidden).to(dtype), (1 + 0.2 * torch.randn(hidden)).to(dtype)
    weight = (0.3 * torch.randn(2 * inner, hidden)).to(dtype)
    truth = formula(x.double(), norm.double(), weight.double(), 1e-5)
    ours = gate_up(x, norm, PackedWeight(weight), eps=1e-5)
    assert ours.shape == (rows, inner)
    assert_within_budget(ours, truth, formula(x, norm, weight, 1e-5), slack=8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("layout", [Layout.ROWS, Layout.TRANSPOSED])
def test_bias(layout):
    torch.manual_seed(1)
    x, norm, weight, bias = torch.randn(3, 48), torch.ones(48), 0.3 * torch.randn(160, 48), torch.randn(160)
    truth = formula(x.double(), norm.double(), weight.double(), 1e-6, bias.double())
    ours = gate_up(x, norm, PackedWeight(weight, bias, layout), eps=1e-6)
    assert_within_budget(ours, truth, formula(x, norm, weight, 1e-6, bias))


def test_the_gate_comes_first():
    """silu(gate) * up with gate = -20 is next to nothing, the other way round it is -20 * silu(1)."""
    weight = torch.tensor([[-20.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 1.0]])
    out = gate_up(x, torch.ones(2), weight, eps=0.0)
    assert abs(float(out)) < 1e-6


def test_the_input_is_left_alone():
    x = torch.randn(3, 48)
    before = x.clone()
    gate_up(x, torch.ones(48), PackedWeight(torch.randn(160, 48)), eps=1e-6)
    assert torch.equal(x, before)
