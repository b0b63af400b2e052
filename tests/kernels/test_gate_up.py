import math

import pytest
import torch
from budget import assert_within_budget
from kernel_inputs import (
    HALF_DTYPES,
    KERNEL_DTYPES,
    ROW_STRIDES,
    drawer,
    framed,
    placements,
    poisoned,
    same_bits,
    slack,
)
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.gate_up import gate_up as launch
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.gate_up import gate_up

EPS = 1e-5
BOTH = pytest.mark.parametrize("operation", [gate_up, launch], ids=["reference", "kernel"])


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


# ---- the kernel


def inputs(rows: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Rows, the norm's weight, the matrix and a bias; the products come out at about 1."""
    draw = drawer(rows, dtype, device)
    norm = 1 + draw(hidden, scale=0.2)
    return draw(rows, hidden), norm, draw(2 * inner, hidden, scale=hidden**-0.5), draw(2 * inner)


def check(ours: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS) -> None:
    wide = [None if part is None else part.double() for part in (x, norm, weight, bias)]
    truth = formula(*wide[:3], eps, wide[3])
    assert_within_budget(ours, truth, formula(x, norm, weight, eps, bias), slack(x.dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_kernel_at_every_number_of_rows(rows, dtype, device):
    x, norm, weight, _ = inputs(rows, 72, 33, dtype, device)
    out = poisoned(rows, 33, x)
    assert launch(x, norm, weight, eps=EPS, out=out.inner) is out.inner
    check(out.inner, x, norm, weight)
    assert out.frame_is_untouched()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "inner"), [(1, 5), (2, 1), (80, 17), (128, 16), (256, 48), (257, 1), (300, 100), (520, 33)]
)
def test_kernel_at_odd_sizes(hidden, inner, dtype, device):
    x, norm, weight, _ = inputs(5, hidden, inner, dtype, device)
    out = poisoned(5, inner, x)
    launch(x, norm, weight, eps=EPS, out=out.inner)
    check(out.inner, x, norm, weight)
    assert out.frame_is_untouched()
    assert same_bits(launch(x, norm, weight, eps=EPS), out.inner)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("inner", [1, 16, 33])
def test_kernel_with_bias(inner, dtype, device):
    x, norm, weight, bias = inputs(3, 80, inner, dtype, device)
    ours = launch(x, norm, PackedWeight(weight, bias, Layout.ROWS), eps=EPS)
    check(ours, x, norm, weight, bias)
    assert same_bits(
        launch(x, norm, PackedWeight(weight, None, Layout.ROWS), eps=EPS), launch(x, norm, weight, eps=EPS)
    )


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kernel_adds_eps_to_the_mean_square(scale, eps, device):
    x, norm, weight, _ = inputs(4, 72, 20, torch.float32, device)
    x *= scale
    check(launch(x, norm, weight, eps=eps), x, norm, weight, eps=eps)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_sums_in_float32(dtype, device):
    """The sum of 300 times 3000 / 8 is past fp16, and is divided by 3000 before it is rounded."""
    x, norm = torch.full((2, 300), 3000.0, dtype=dtype, device=device), torch.ones(300, dtype=dtype, device=device)
    weight = torch.full((8, 300), 0.125, dtype=dtype, device=device)
    check(launch(x, norm, weight, eps=EPS), x, norm, weight)


def test_kernel_of_a_row_of_zeros(device):
    x, norm, weight, bias = inputs(3, 72, 20, torch.float32, device)
    x[1] = 0
    check(launch(x, norm, PackedWeight(weight, bias, Layout.ROWS), eps=EPS), x, norm, weight, bias)
    assert not launch(x, norm, weight, eps=EPS)[1].any()


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's exp(300) is an infinity, as the GPU's is
def test_kernel_of_extreme_gates(device):
    """silu(-300) is 0 and silu(300) is 300; neither is NaN."""
    x = torch.ones(1, 16, device=device)
    weight = torch.zeros(8, 16, device=device)
    weight[:4, 0] = torch.tensor([-300.0, 300.0, -20.0, 0.0])
    weight[4:, 0] = torch.tensor([2.0, 3.0, 5.0, 7.0])
    out = launch(x, torch.ones(16, device=device), weight, eps=1e-12)[0]
    tiny = -100 / (1 + math.exp(20))
    torch.testing.assert_close(out, torch.tensor([0.0, 900.0, tiny, 0.0], device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("hidden", [80, 257])
@pytest.mark.parametrize("layout", ROW_STRIDES)
def test_kernel_takes_rows_of_any_stride(layout, hidden, dtype, device):
    x, norm, weight, _ = inputs(4, hidden, 17, dtype, device)
    strided = ROW_STRIDES[layout](x)
    before = strided.clone()
    wanted = launch(x, norm, weight, eps=EPS)
    assert same_bits(launch(strided, norm, weight, eps=EPS), wanted)
    assert same_bits(launch(strided[2:3], norm, weight, eps=EPS), launch(x[2:3].clone(), norm, weight, eps=EPS))
    assert torch.equal(strided, before)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_takes_a_weight_of_longer_rows(dtype, device):
    x, norm, weight, bias = inputs(4, 300, 17, dtype, device)
    wide = framed(weight, left=3, right=10)
    bias_in_nan = framed(bias[None]).inner[0]
    ours = launch(x, framed(norm[None]).inner[0], PackedWeight(wide.inner, bias_in_nan, Layout.ROWS), eps=EPS)
    check(ours, x, norm, weight, bias)


@BOTH
@pytest.mark.parametrize("raised", [False, True])
def test_nothing_is_done_where_the_flag_is_down(raised, operation, device):
    x, norm, weight, _ = inputs(3, 72, 33, torch.float32, device)
    flag = torch.tensor([int(raised)], dtype=torch.int32, device=device)
    out = drawer(9, x.dtype, device)(3, 33)
    before = out.clone()
    assert operation(x, norm, weight, eps=EPS, active=flag, out=out) is out
    assert same_bits(out, operation(x, norm, weight, eps=EPS) if raised else before)
    made = operation(x, norm, weight, eps=EPS, active=flag)
    assert (made.shape, made.dtype, made.device.type) == ((3, 33), x.dtype, device.type)
    assert int(flag) == raised


@BOTH
def test_out_is_filled_and_the_operands_are_left_alone(operation, device):
    x, norm, weight, bias = inputs(3, 72, 33, torch.float32, device)
    before = [part.clone() for part in (x, norm, weight, bias)]
    out = poisoned(3, 33, x)
    packed = PackedWeight(weight, bias, Layout.ROWS)
    assert operation(x, norm, packed, eps=EPS, out=out.inner) is out.inner
    check(out.inner, x, norm, weight, bias)
    assert out.frame_is_untouched()
    assert all(same_bits(part, old) for part, old in zip((x, norm, weight, bias), before, strict=True))


# ---- rows do not see each other


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_gives_a_row_the_same_bits_with_any_rows_after_it(dtype, device):
    x, norm, weight, _ = inputs(MAX_ROWS, 72, 33, dtype, device)
    whole = launch(x, norm, weight, eps=EPS)
    for rows in range(1, MAX_ROWS):
        assert same_bits(launch(x[:rows], norm, weight, eps=EPS), whole[:rows]), rows


def test_kernel_gives_a_row_the_same_value_wherever_it_stands(device):
    """The interpreter's product is a BLAS's, so this is a budget here; bits are the GPU's, below."""
    x, norm, weight, _ = inputs(1, 72, 33, torch.float32, device)
    draw = drawer(3, x.dtype, device)
    for among, place in placements(x, draw, (2, 5, MAX_ROWS)):
        check(launch(among, norm, weight, eps=EPS)[place : place + 1], x, norm, weight)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_kernel_keeps_a_spoiled_row_to_itself(spoiled, device):
    x, norm, weight, _ = inputs(5, 72, 33, torch.float32, device)
    wanted = launch(x, norm, weight, eps=EPS)
    x[3, 40] = spoiled
    ours = launch(x, norm, weight, eps=EPS)
    others = [0, 1, 2, 4]
    assert same_bits(ours[others], wanted[others])
    assert ours[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "inner", "dtype"),
    [(4096, 4096, dtype) for dtype in HALF_DTYPES]
    + [(size, 333, dtype) for size in (257, 520, 1000) for dtype in (torch.float32, *HALF_DTYPES)],
)
def test_kernel_gives_a_row_the_same_bits_wherever_it_stands(hidden, inner, dtype, device):
    row, norm, weight, bias = inputs(1, hidden, inner, dtype, device)
    packed = PackedWeight(weight, bias, Layout.ROWS)
    alone = launch(row, norm, packed, eps=EPS)
    draw = drawer(5, dtype, device)
    for x, place in placements(row, draw, range(1, MAX_ROWS + 1)):
        assert torch.equal(launch(x, norm, packed, eps=EPS)[place], alone[0]), (len(x), place)
        buffer = draw(place + 3 + len(x), hidden)
        buffer[place : place + len(x)] = x  # out of the middle of a buffer, at any alignment
        assert torch.equal(launch(buffer[place : place + len(x)], norm, packed, eps=EPS)[place], alone[0])


@pytest.mark.parametrize("block_n", [16, 64])
def test_settings_change_nothing(block_n, device):
    """On a GPU not a bit; in the interpreter tiles of another size are other calls of a BLAS."""
    x, norm, weight, _ = inputs(5, 300, 100, torch.float32, device)
    wanted = launch(x, norm, weight, eps=EPS)
    with configured_by(lambda *_: LaunchConfig(8, 2, block_n)):
        ours = launch(x, norm, weight, eps=EPS)
    check(ours, x, norm, weight)
    assert device.type == "cpu" or same_bits(ours, wanted)


@pytest.mark.gpu
def test_launching_does_not_wait_for_the_device(device):
    x, norm, weight, _ = inputs(3, 256, 64, torch.float16, device)
    active = torch.ones(1, dtype=torch.int32, device=device)
    launch(x, norm, weight, eps=EPS, active=active)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(x, norm, weight, eps=EPS, active=active)
    finally:
        torch.cuda.set_sync_debug_mode("default")
