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
    fp16_scale,
    linear,
)
from kangaroo_kernels.reference.rms_norm import norm_linear, rms_norm

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


@pytest.mark.parametrize("shape", [(67, 48), (1, 7), (1100, 1000)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
@pytest.mark.parametrize("layout", FLOAT32_LAYOUTS)
def test_the_matrix_comes_back(layout, scale, shape):
    weight = (matrix(shape) * scale).contiguous()
    packed = PackedWeight(weight, layout=layout)
    assert torch.equal(packed.unpacked(), weight)
    rows = torch.tensor([shape[0] - 1, 0, shape[0] // 2], dtype=torch.int32)
    some = packed.select(rows)
    assert torch.equal(some.unpacked(), weight[rows.long()])
    assert some.layout is (Layout.ROWS if layout is Layout.ROWS else choose_layout(weight[rows.long()]))


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
@pytest.mark.parametrize("shift", [0, -30])
@pytest.mark.parametrize("shape", [(67, 48), (192, 192), (704, 192), (129, 33), (1024, 1027)])
def test_fp16_gives_a_row_the_same_bits_among_any_number_of_rows(shape, shift):
    packed = PackedWeight(matrix(shape) * 2.0**shift, torch.randn(shape[0]), Layout.FP16)
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
def test_exact_in_fp16(value, exact):
    weight = torch.ones(32, 32)
    weight[17, 5] = value
    assert exact_in_fp16(weight) is exact
    truth = weight.double().sum(dim=1, keepdim=True).t()
    x = torch.ones(1, 32)
    assert_within_budget(PackedWeight(weight)(x), truth, x @ weight.t())


@needs_fbgemm
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(67, 48), (1024, 1027)])
@pytest.mark.parametrize("shift", [-40, -20, 20, 40, 60])
def test_a_scaled_matrix_gives_the_bits_of_the_unscaled_one(shift, shape, biased):
    """Scaled by a power of two, a weight that fp16 holds as it is gives the same products, the exponents moved."""
    weight, bias = matrix(shape), torch.randn(shape[0]) if biased else None
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    plain = PackedWeight(weight, bias, Layout.FP16)
    scaled = PackedWeight(weight * 2.0**shift, None if bias is None else bias * 2.0**shift)
    assert (plain.scale, scaled.layout) == (1.0, Layout.FP16) and scaled.scale != 1.0
    assert torch.equal(scaled(x), plain(x) * 2.0**shift)
    norm_weight = torch.randn(shape[1], generator=torch.Generator().manual_seed(2))
    assert torch.equal(norm_linear(x, norm_weight, 1e-5, scaled), scaled(rms_norm(x, norm_weight, 1e-5)))


@needs_fbgemm
@pytest.mark.parametrize("size", [1e-12, 1e-5, 0.02, 1.0, 1e4, 1e10])
def test_every_weight_of_a_bf16_matrix_comes_back(size):
    """The smallest of a million normal numbers has twenty binary places more than the largest."""
    weight = (matrix((1000, 1000), exact=False) * size).bfloat16().float()
    weight[7, 7] = 0.0
    packed = PackedWeight(weight)
    assert packed.layout is Layout.FP16
    assert packed.nbytes == 2 * weight.numel()
    assert torch.equal(packed(torch.eye(1000)).t(), weight)


TOP = 2.0**16 - 2.0**5
"""The largest finite fp16 number."""


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((TOP, 2.0**-24), 1.0),
        ((2.0**16,), 2.0),
        ((TOP * 2, 2.0**-23), 2.0),
        ((TOP * 2, 2.0**-24), None),  # what is kept at the upper end is lost at the lower one
        ((TOP * 2.0**-90, 2.0**-114), None),  # beyond MAX_SHIFT
        ((TOP * 2.0**-64, 2.0**-88), 2.0**-64),
        ((TOP * 2.0**64,), 2.0**64),
        ((TOP * 2.0**65,), None),
        ((2.0**-25,), 2.0**-40),
        ((1.0, 2.0**-39), 2.0**-15),
        ((1.0, 2.0**-40), None),
        ((1.0, (1 + 2.0**-7) * 2.0**-32), 2.0**-15),  # eight digits, the last of them at fp16's end
        ((1.0, (1 + 2.0**-7) * 2.0**-33), None),
        ((1 + 2.0**-11, 1.0), None),  # twelve digits
        ((2 - 2.0**-11,), None),  # would be rounded up beyond the upper end
        ((2.0**20, 2.0**-149), None),  # float32's smallest number
        ((-(2.0**-30), 2.0**-31), 2.0**-45),
        ((0.0, -0.0), 1.0),
    ],
)
def test_the_scale_of_a_matrix(values, scale):
    weight = torch.zeros(40, 32)
    weight.view(-1)[: len(values)] = torch.tensor(values)
    assert fp16_scale(weight) == scale
    assert (choose_layout(weight) is Layout.FP16) is (scale is not None and HAS_FBGEMM)
    assert torch.equal(PackedWeight(weight)(torch.eye(32)).t(), weight)
    if scale is None:
        with pytest.raises(ValueError, match="not exact in fp16"):
            PackedWeight(weight, None, Layout.FP16)


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
