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
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.linear_residual import linear_residual as launch
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.linear_residual import linear_residual

BOTH = pytest.mark.parametrize("operation", [linear_residual, launch], ids=["reference", "kernel"])


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


@BOTH
@pytest.mark.parametrize("outputs", [1, 33])
def test_without_a_residual_the_projection_stays(outputs, operation, device):
    x, weight, residual, bias = inputs(5, 72, outputs, torch.float32, device)
    packed, nothing = PackedWeight(weight, bias, Layout.ROWS), torch.zeros_like(residual)
    out = poisoned(5, outputs, x)
    assert operation(x, packed, None, out=out.inner) is out.inner
    check(out.inner, x, weight, nothing, bias)
    assert out.frame_is_untouched()
    assert same_bits(operation(x, packed, None), operation(x, packed, nothing))
    skipped = operation(x, packed, None, active=torch.zeros(1, dtype=torch.int32, device=device))
    assert (skipped.shape, skipped.dtype) == (residual.shape, x.dtype)


# ---- the kernel


def inputs(rows: int, hidden: int, outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Rows, the matrix, the residual and a bias; the products come out at about 1."""
    draw = drawer(rows, dtype, device)
    return draw(rows, hidden), draw(outputs, hidden, scale=hidden**-0.5), draw(rows, outputs), draw(outputs)


def check(ours: Tensor, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> None:
    straightforward = residual + x @ weight.t()
    truth = residual.double() + x.double() @ weight.double().t()
    if bias is not None:
        straightforward, truth = straightforward + bias, truth + bias.double()
    assert_within_budget(ours, truth, straightforward, slack(x.dtype))
    if x.dtype != torch.float32:  # float32 up to the end, and one rounding there
        assert_within_budget(ours, truth, truth.to(x.dtype), slack=0.05)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_kernel_at_every_number_of_rows(rows, dtype, device):
    x, weight, residual, _ = inputs(rows, 72, 33, dtype, device)
    out = poisoned(rows, 33, x)
    assert launch(x, weight, residual, out=out.inner) is out.inner
    check(out.inner, x, weight, residual)
    assert out.frame_is_untouched()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "outputs"), [(1, 5), (2, 1), (80, 17), (128, 16), (256, 32), (257, 1), (300, 100), (520, 33), (64, 2050)]
)
def test_kernel_at_odd_sizes(hidden, outputs, dtype, device):
    x, weight, residual, _ = inputs(5, hidden, outputs, dtype, device)
    out = poisoned(5, outputs, x)
    launch(x, weight, residual, out=out.inner)
    check(out.inner, x, weight, residual)
    assert out.frame_is_untouched()
    assert same_bits(launch(x, weight, residual), out.inner)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("outputs", [1, 16, 33])
def test_kernel_with_bias(outputs, dtype, device):
    x, weight, residual, bias = inputs(3, 80, outputs, dtype, device)
    check(launch(x, PackedWeight(weight, bias, Layout.ROWS), residual), x, weight, residual, bias)
    unbiased = launch(x, PackedWeight(weight, None, Layout.ROWS), residual)
    assert same_bits(unbiased, launch(x, weight, residual))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("hidden", [80, 257])
@pytest.mark.parametrize("layout", ROW_STRIDES)
def test_kernel_takes_rows_of_any_stride(layout, hidden, dtype, device):
    x, weight, residual, _ = inputs(4, hidden, 17, dtype, device)
    strided = ROW_STRIDES[layout](x)
    before = strided.clone()
    wanted = launch(x, weight, residual)
    assert same_bits(launch(strided, weight, residual), wanted)
    one = slice(2, 3)
    assert same_bits(launch(strided[one], weight, residual[one]), launch(x[one].clone(), weight, residual[one]))
    assert torch.equal(strided, before)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_takes_a_weight_and_a_residual_of_longer_rows(dtype, device):
    x, weight, residual, bias = inputs(4, 300, 17, dtype, device)
    wide, added = framed(weight, left=3, right=10), framed(residual)
    packed = PackedWeight(wide.inner, framed(bias[None]).inner[0], Layout.ROWS)
    check(launch(x, packed, added.inner), x, weight, residual, bias)
    assert added.frame_is_untouched()
    assert same_bits(added.inner, residual)


@BOTH
@pytest.mark.parametrize("wide", [False, True])
def test_out_may_be_the_residual(wide, operation, device):
    x, weight, residual, bias = inputs(6, 72, 33, torch.float32, device)
    packed = PackedWeight(weight, bias, Layout.ROWS)
    stream = framed(residual)
    place = stream.inner if wide else residual.clone()
    assert operation(x, packed, place, out=place) is place
    check(place, x, weight, residual, bias)
    assert stream.frame_is_untouched()


@BOTH
@pytest.mark.parametrize("raised", [False, True])
def test_nothing_is_done_where_the_flag_is_down(raised, operation, device):
    x, weight, residual, _ = inputs(3, 72, 33, torch.float32, device)
    flag = torch.tensor([int(raised)], dtype=torch.int32, device=device)
    out = drawer(9, x.dtype, device)(3, 33)
    before = out.clone()
    assert operation(x, weight, residual, active=flag, out=out) is out
    assert same_bits(out, operation(x, weight, residual) if raised else before)
    made = operation(x, weight, residual, active=flag)
    assert (made.shape, made.dtype, made.device.type) == ((3, 33), x.dtype, device.type)
    stream = residual.clone()  # in place, a step that is not active must not add anything
    operation(x, weight, stream, active=flag, out=stream)
    assert same_bits(stream, residual) != raised
    assert int(flag) == raised


@BOTH
def test_out_is_filled_and_the_operands_are_left_alone(operation, device):
    x, weight, residual, bias = inputs(3, 72, 33, torch.float32, device)
    before = [part.clone() for part in (x, weight, residual, bias)]
    out = poisoned(3, 33, x)
    assert operation(x, PackedWeight(weight, bias, Layout.ROWS), residual, out=out.inner) is out.inner
    check(out.inner, x, weight, residual, bias)
    assert out.frame_is_untouched()
    assert all(same_bits(part, old) for part, old in zip((x, weight, residual, bias), before, strict=True))


# ---- rows do not see each other


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_gives_a_row_the_same_bits_with_any_rows_after_it(dtype, device):
    x, weight, residual, _ = inputs(MAX_ROWS, 72, 33, dtype, device)
    whole = launch(x, weight, residual)
    for rows in range(1, MAX_ROWS):
        assert same_bits(launch(x[:rows], weight, residual[:rows]), whole[:rows]), rows


def test_kernel_gives_a_row_the_same_value_wherever_it_stands(device):
    """The interpreter's product is a BLAS's, so this is a budget here; bits are the GPU's, below."""
    x, weight, residual, _ = inputs(1, 72, 33, torch.float32, device)
    draw = drawer(3, x.dtype, device)
    for among, place in placements(x, draw, (2, 5, MAX_ROWS)):
        added = draw(len(among), 33)
        added[place] = residual[0]
        check(launch(among, weight, added)[place : place + 1], x, weight, residual)


@pytest.mark.parametrize("spoiled", ["x", "residual"])
def test_kernel_keeps_a_spoiled_row_to_itself(spoiled, device):
    x, weight, residual, _ = inputs(5, 72, 33, torch.float32, device)
    wanted = launch(x, weight, residual)
    (x if spoiled == "x" else residual)[3] = float("nan")
    ours = launch(x, weight, residual)
    others = [0, 1, 2, 4]
    assert same_bits(ours[others], wanted[others])
    assert ours[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "outputs", "dtype"),
    [(4096, 4096, dtype) for dtype in HALF_DTYPES]
    + [(size, 333, dtype) for size in (257, 520, 1000) for dtype in (torch.float32, *HALF_DTYPES)],
)
def test_kernel_gives_a_row_the_same_bits_wherever_it_stands(hidden, outputs, dtype, device):
    row, weight, residual, bias = inputs(1, hidden, outputs, dtype, device)
    packed = PackedWeight(weight, bias, Layout.ROWS)
    alone = launch(row, packed, residual)
    draw = drawer(5, dtype, device)
    for x, place in placements(row, draw, range(1, MAX_ROWS + 1)):
        added = draw(len(x), outputs)
        added[place] = residual[0]
        assert torch.equal(launch(x, packed, added)[place], alone[0]), (len(x), place)
        buffer = draw(place + 3 + len(x), hidden)
        buffer[place : place + len(x)] = x  # out of the middle of a buffer, at any alignment
        assert torch.equal(launch(buffer[place : place + len(x)], packed, added, out=added)[place], alone[0])


@pytest.mark.parametrize("block_n", [16, 64])
def test_settings_change_nothing(block_n, device):
    """On a GPU not a bit; in the interpreter tiles of another size are other calls of a BLAS."""
    x, weight, residual, _ = inputs(5, 300, 100, torch.float32, device)
    wanted = launch(x, weight, residual)
    with configured_by(lambda *_: LaunchConfig(8, 2, block_n)):
        ours = launch(x, weight, residual)
    check(ours, x, weight, residual)
    assert device.type == "cpu" or same_bits(ours, wanted)


@pytest.mark.gpu
def test_launching_does_not_wait_for_the_device(device):
    x, weight, residual, _ = inputs(3, 256, 64, torch.float16, device)
    active = torch.ones(1, dtype=torch.int32, device=device)
    launch(x, weight, residual, active=active)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(x, weight, residual, active=active)
    finally:
        torch.cuda.set_sync_debug_mode("default")
