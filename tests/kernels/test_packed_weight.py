import pytest
import torch
from budget import SLACK, assert_within_budget

from kangaroo_kernels.packed_weight import (
    ONEDNN_MIN_WEIGHTS,
    THREADED_MIN_WEIGHTS,
    Layout,
    PackedWeight,
    choose_layout,
    exact_in_fp16,
    linear,
)

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
needs_fbgemm = pytest.mark.skipif(not HAS_FBGEMM, reason="FBGEMM has no kernel for this processor")
FLOAT32_LAYOUTS = [
    Layout.ROWS,
    Layout.TRANSPOSED,
    pytest.param(
        Layout.ONEDNN, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
    ),
    pytest.param(Layout.FP16, marks=needs_fbgemm),
]
SHAPES = [(1, 1), (3, 5), (67, 48), (192, 192), (129, 33), (1024, 1027)]


def matrix(shape: tuple[int, int], exact: bool = True, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight.half().float() if exact else weight


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 65])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_every_layout_is_the_same_product(layout, shape, biased, rows):
    weight, bias = matrix(shape), torch.randn(shape[0]) if biased else None
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
    packed = PackedWeight(weight, bias, layout)
    assert packed.layout is layout
    assert (packed.out_features, packed.in_features) == shape
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = packed(x)
    slack = max(SLACK, shape[1] ** 0.5)  # some add up the K products of an element one after the other
    assert_within_budget(ours, truth, torch.nn.functional.linear(x, weight, bias), slack)
    assert torch.equal(linear(x, packed), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_packed_is_a_plain_linear(dtype):
    weight, bias, x = (torch.randn(size).to(dtype) for size in ((9, 8), (9,), (3, 8)))
    packed = PackedWeight(weight, bias, Layout.ROWS)
    assert torch.equal(packed(x), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_input_and_weight_are_left_alone_and_the_output_is_new(layout):
    """Callers add the residual in place."""
    weight, x = matrix((40, 24)), torch.randn(3, 24)
    before = weight.clone(), x.clone()
    packed = PackedWeight(weight, None, layout)
    first = packed(x)
    kept = first.clone()
    first.add_(1.0)
    assert torch.equal(packed(x), kept)
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_rows_with_a_stride(layout):
    weight, wide = matrix((40, 24)), torch.randn(5, 31)
    x = wide[:, 3:27]
    truth = x.double() @ weight.double().t()
    assert_within_budget(PackedWeight(weight, None, layout)(x), truth, x @ weight.t())


@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_a_bad_row_spoils_no_other(layout):
    """Rows past an early end hold anything."""
    weight = matrix((48, 32))
    packed = PackedWeight(weight, None, layout)
    x = torch.randn(6, 32)
    clean = packed(x)
    x[4] = float("nan")
    spoiled = packed(x)
    keep = torch.arange(6) != 4
    assert torch.equal(spoiled[keep], clean[keep])
    assert spoiled[4].isnan().all()


@needs_fbgemm
@pytest.mark.parametrize("shape", [(67, 48), (192, 192), (704, 192), (129, 33), (1024, 1027)])
def test_fp16_gives_a_row_the_same_bits_among_any_number_of_rows(shape):
    packed = PackedWeight(matrix(shape), torch.randn(shape[0]), Layout.FP16)
    x = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(3))
    single = torch.cat([packed(x[row : row + 1]) for row in range(16)])
    for rows in range(1, 17):
        assert torch.equal(packed(x[:rows]), single[:rows])
        assert torch.equal(packed(x[16 - rows :]), single[16 - rows :])


@needs_fbgemm
def test_fp16_is_exact_to_the_last_weight():
    """Every finite fp16 number, subnormal ones and the largest included, comes back as it was."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[torch.isfinite(numbers)].float()
    weight = numbers.view(-1, 64)
    assert choose_layout(weight) is Layout.FP16
    packed = PackedWeight(weight, None, Layout.FP16)
    assert torch.equal(packed(torch.eye(64)).t(), weight)


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (1.0, True),
        (0.1, False),
        (1 + 2**-10, True),
        (1 + 2**-11, False),
        (65504.0, True),
        (65536.0, False),
        (1e9, False),
        (2.0**-24, True),
        (2.0**-25, False),
        (1e-30, False),
        (-0.0, True),
    ],
)
def test_fp16_is_chosen_for_exact_weights_alone(value, exact):
    weight = torch.ones(32, 32)
    weight[17, 5] = value
    assert exact_in_fp16(weight) is exact
    assert (choose_layout(weight) is Layout.FP16) is (exact and HAS_FBGEMM)
    truth = weight.double().sum(dim=1, keepdim=True).t()
    x = torch.ones(1, 32)
    assert_within_budget(PackedWeight(weight)(x), truth, x @ weight.t())


def test_the_choice_depends_on_the_matrix_alone():
    small, large = matrix((64, 64), exact=False), matrix((ONEDNN_MIN_WEIGHTS // 256, 256), exact=False)
    assert choose_layout(small) is Layout.TRANSPOSED
    assert choose_layout(large) is (Layout.ONEDNN if torch.backends.mkldnn.is_available() else Layout.TRANSPOSED)
    assert choose_layout(large[:-1]) is Layout.TRANSPOSED
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert choose_layout(small.to(dtype)) is Layout.ROWS
    assert PackedWeight(small).layout is Layout.TRANSPOSED
    assert not PackedWeight(small).threaded
    assert PackedWeight(torch.zeros(THREADED_MIN_WEIGHTS // 1024, 1024)).threaded
