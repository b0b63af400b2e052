from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from budget import assert_within_budget
from kernel_inputs import (
    HALF_DTYPES,
    KERNEL_DTYPES,
    ROW_STRIDES,
    Framed,
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
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.qkv_rope import qkv_rope as launch
from kangaroo_kernels.reference.qkv_rope import interleave_rope, qkv_rope, rope_table

EPS = 1e-5
NAN = float("nan")
BOTH = pytest.mark.parametrize("operation", [qkv_rope, launch], ids=["reference", "kernel"])


def inv_freq(head_dim: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)


def rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """transformers' ``apply_rotary_pos_emb`` on ``[M, H, D]`` in half-split order."""
    positions = torch.arange(position, position + len(x), dtype=frequencies.dtype, device=x.device)
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def formula(x: Tensor, norm: Tensor, parts: list[Tensor], biases: list[Tensor], position: int) -> list[Tensor]:
    """Queries, keys, values ``[M, heads, D]`` in the checkpoint's own order of rows; in float64 the truth."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    head_dim = 8
    out = [(normed @ part.t() + bias).view(len(x), -1, head_dim) for part, bias in zip(parts, biases, strict=True)]
    frequencies = inv_freq(head_dim).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return [rotate(out[0], position, frequencies), rotate(out[1], position, frequencies), out[2]]


def reorder(x: Tensor) -> Tensor:
    """``[M, H, D]`` from the checkpoint's order of a head's elements to ours."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def inputs(rows: int, heads: int, kv_heads: int, biased: bool, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(rows)
    hidden, head_dim = 24, 8

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    parts = [draw(count * head_dim, hidden) for count in (heads, kv_heads, kv_heads)]
    biases = [draw(len(part)) if biased else torch.zeros(len(part), dtype=dtype) for part in parts]
    packed = PackedWeight(
        torch.cat((interleave_rope(parts[0], head_dim), interleave_rope(parts[1], head_dim), parts[2])),
        torch.cat((interleave_rope(biases[0], head_dim), interleave_rope(biases[1], head_dim), biases[2]))
        if biased
        else None,
    )
    return draw(rows, hidden), 1 + draw(hidden) / 5, parts, biases, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 70])
@pytest.mark.parametrize("position", [0, 1, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_formula(heads, kv_heads, position, rows, biased, dtype):
    x, norm, parts, biases, packed = inputs(rows, heads, kv_heads, biased, dtype)
    capacity = position + rows + 3
    k_cache, v_cache = (torch.full((kv_heads, capacity, 8), float("nan"), dtype=dtype) for _ in range(2))
    before = x.clone()
    q = qkv_rope(x, norm, packed, rope_table(inv_freq(8), capacity), k_cache, v_cache, position, eps=EPS)
    truth = formula(x.double(), norm.double(), [p.double() for p in parts], [b.double() for b in biases], position)
    plain = formula(x, norm, parts, biases, position)
    written = slice(position, position + rows)
    slack = 32 if dtype == torch.float32 else 2  # angles: a float32 position times a float32 frequency
    assert_within_budget(q, reorder(truth[0]), reorder(plain[0]), slack)
    assert_within_budget(k_cache[:, written].transpose(0, 1), reorder(truth[1]), reorder(plain[1]), slack)
    assert_within_budget(v_cache[:, written].transpose(0, 1), truth[2], plain[2], slack)
    for cache in (k_cache, v_cache):  # nothing else is written
        assert cache[:, :position].isnan().all()
        assert cache[:, position + rows :].isnan().all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_cache_of_other_strides(rows):
    x, norm, _, _, packed = inputs(rows, 4, 2, False, torch.float32)
    table = rope_table(inv_freq(8), 40)
    ours = [torch.zeros(2, 30, 8) for _ in range(2)]
    q = qkv_rope(x, norm, packed, table, *ours, 7, eps=EPS)
    theirs = [torch.zeros(30, 2, 8).transpose(0, 1), torch.zeros(2, 30, 2, 8)[:, :, 1]]
    assert torch.equal(qkv_rope(x, norm, packed, table, *theirs, 7, eps=EPS), q)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_cache_in_float16(rows):
    """Rounded; what overflows is NaN and not infinite, since a score of minus infinity would pass in silence."""
    x, norm, _, _, packed = inputs(rows, 4, 2, False, torch.float32)
    norm = 1e4 * norm
    exact, halves = ([torch.zeros(2, 30, 8, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, torch.float16))
    for caches in (exact, halves):
        qkv_rope(x, norm, packed, rope_table(inv_freq(8), 40), *caches, 7, eps=EPS)
    for whole, half in zip(exact, halves, strict=True):
        rounded = whole.half()
        assert rounded.isinf().any() and rounded.isfinite().any()
        torch.testing.assert_close(half, rounded.where(rounded.isfinite(), torch.nan), equal_nan=True, rtol=0, atol=0)


@BOTH
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_overflows_float16_is_no_number(operation):
    """Whether a query, a key or a value: an infinite score would be a weight of 0, and a position pass in silence."""
    x, norm, parts, _, _ = inputs(3, 4, 2, False, torch.float16)
    matrix = 8e3 * torch.cat((*(interleave_rope(part, 8) for part in parts[:2]), parts[2]))
    exact, rounded = ([torch.zeros(2, 30, 8, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, torch.half))
    table = rope_table(inv_freq(8), 40)
    wide = qkv_rope(x.float(), norm.float(), matrix.float(), table, *exact, 7, eps=EPS)
    q = operation(x, norm, matrix, table, *rounded, 7, eps=EPS)
    for ours, truth in zip((q, *rounded), (wide, *exact), strict=True):
        assert not ours.isinf().any()
        pairs = truth.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)  # turning keeps their length
        over, under = truth.abs() > 7e4, pairs < 6e4
        assert over.any() and under.any()
        assert ours[over].isnan().all()
        assert ours[under].isfinite().all()


def test_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 4, 2, generator=generator).double() for _ in range(2))
    table = torch.polar(
        torch.ones(200, 1, 4).double(), torch.arange(200).double()[:, None, None] * inv_freq(8).double()
    )

    def score(query_position: int, key_position: int) -> float:
        turned = [
            torch.view_as_real(torch.view_as_complex(part) * table[at : at + 1])
            for part, at in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(19, 7) == pytest.approx(score(119, 107), abs=1e-10)
    ours = rope_table(inv_freq(8), 200)
    torch.testing.assert_close(ours.to(torch.complex128), table, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_table(scaling):
    table = rope_table(inv_freq(16), 50, scaling)
    assert table.shape == (50, 1, 8)
    assert table.dtype == torch.complex64
    angle = 49 * float(inv_freq(16)[3])
    wanted = torch.polar(torch.tensor(scaling).double(), torch.tensor(angle).double())
    assert abs(complex(table[49, 0, 3]) - complex(wanted)) < 1e-5
    assert torch.equal(table[:10], rope_table(inv_freq(16), 10, scaling))  # a longer table has the same phases


@pytest.mark.parametrize("head_dim", [2, 4, 6, 64])
def test_interleaving_puts_each_pair_side_by_side(head_dim):
    rows = torch.arange(3 * head_dim)
    mixed = interleave_rope(rows, head_dim).view(3, head_dim // 2, 2)
    assert torch.equal(mixed[..., 1] - mixed[..., 0], torch.full((3, head_dim // 2), head_dim // 2))
    assert torch.equal(mixed.flatten().sort().values, rows)
    matrix = torch.randn(3 * head_dim, 5)
    assert torch.equal(interleave_rope(matrix, head_dim), matrix[interleave_rope(rows, head_dim)])


# ---- the kernel


class Sizes(NamedTuple):
    """Of a projection."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


SMALL = Sizes(72, 3, 1, 16)


class Projection(NamedTuple):
    """The operands of an operation, and what its result is checked with."""

    sizes: Sizes
    x: Tensor
    norm: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.weight, self.bias, Layout.ROWS)

    def run(
        self, operation: Callable[..., Tensor], caches: list[Tensor], position: int | Tensor, **settings: object
    ) -> Tensor:
        """The operation on these operands, with a table that has no phases but those of the rows in flight."""
        table = phases(self.sizes.head_dim, int(position), len(self.x), self.x.device)
        return operation(self.x, self.norm, self.packed, table, *caches, position, eps=EPS, **settings)


def projection(rows: int, sizes: Sizes, dtype: torch.dtype, device: torch.device, biased: bool = True) -> Projection:
    """Random operands; the products come out at about 1."""
    draw = drawer(rows, dtype, device)
    count = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    x, norm = draw(rows, sizes.hidden), 1 + draw(sizes.hidden, scale=0.2)
    weight = draw(count, sizes.hidden, scale=sizes.hidden**-0.5)
    return Projection(sizes, x, norm, weight, draw(count) if biased else None)


def phases(head_dim: int, position: int, rows: int, device: torch.device) -> Tensor:
    """The table for positions below ``position + rows``, of angles in float64; NaN where no row is in flight."""
    angles = torch.arange(position, position + rows).double()[:, None, None] * inv_freq(head_dim).double()
    table = torch.full((position + rows, 1, head_dim // 2), complex(NAN, NAN), dtype=torch.complex64)
    table[position:] = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return table.to(device)


def turn(x: Tensor, position: int) -> Tensor:
    """RoPE on ``[M, H, D]`` with adjacent pairs, angles in float64: the two lines of the rotation, written down."""
    positions = torch.arange(position, position + len(x), device=x.device).double()
    angles = (positions[:, None] * inv_freq(x.shape[-1]).double().to(x.device))[:, None]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)


def results(case: Projection, position: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values ``[M, heads, D]`` in ``dtype``; in float64 the truth."""
    x, norm, weight, bias = (None if part is None else part.to(dtype) for part in case[1:])
    wide = x if dtype == torch.float64 else x.float()
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)
    _, heads, kv_heads, head_dim = case.sizes
    packed = (normed @ weight.t() if bias is None else normed @ weight.t() + bias).view(len(x), -1, head_dim)
    queries, keys, values = packed.split((heads, kv_heads, kv_heads), dim=1)
    return [turn(queries, position), turn(keys, position), values]


def check(case: Projection, position: int, *ours: Tensor) -> None:
    """Hold queries, keys and values against the truth."""
    truth, plain = results(case, position, torch.float64), results(case, position, case.x.dtype)
    for found, wanted, straightforward in zip(ours, truth, plain, strict=True):
        assert_within_budget(found, wanted, straightforward, slack(case.x.dtype))


def fresh(case: Projection, capacity: int) -> list[Tensor]:
    """Two contiguous caches of NaN."""
    return [case.x.new_full((case.sizes.kv_heads, capacity, case.sizes.head_dim), NAN) for _ in range(2)]


def rows_of(cache: Tensor, position: int, rows: int, blocks: list[int] | None = None) -> Tensor:
    """``[M, H_kv, D]`` of a cache, contiguous or paged, one position at a time."""
    if blocks is None:
        return torch.stack([cache[:, place] for place in range(position, position + rows)])
    size = cache.shape[2]
    return torch.stack([cache[blocks[place // size], :, place % size] for place in range(position, position + rows)])


def only_those_rows_are_written(cache: Framed, position: int, rows: int, blocks: list[int] | None = None) -> bool:
    """Whether the buffer behind a cache of NaN holds its NaN bit for bit wherever no position in flight is."""
    buffer = cache.buffer.clone()
    view = buffer.as_strided(cache.inner.shape, cache.inner.stride(), cache.inner.storage_offset())
    for place in range(position, position + rows):
        if blocks is None:
            view[:, place] = NAN
        else:
            view[blocks[place // view.shape[2]], :, place % view.shape[2]] = NAN
    return same_bits(buffer, torch.full_like(buffer, NAN))


def out_for(case: Projection) -> tuple[Framed, Tensor]:
    """An output of NaN in a frame of NaN, and its ``[M, H, D]``."""
    _, heads, _, head_dim = case.sizes
    out = poisoned(len(case.x), heads * head_dim, case.x)
    return out, out.inner.unflatten(1, (heads, head_dim))


def roomy(case: Projection, capacity: int) -> Framed:
    """A contiguous cache of NaN, between others: who misses a head by a few writes to those."""
    _, heads, kv_heads, head_dim = case.sizes
    buffer = case.x.new_full((2 * heads + kv_heads, capacity, head_dim), NAN)
    return Framed(buffer[heads : heads + kv_heads], buffer)


def check_everything(case: Projection, position: int, capacity: int) -> None:
    """One launch on poisoned caches and a poisoned output."""
    rows, caches, (out, view) = len(case.x), [roomy(case, capacity) for _ in range(2)], out_for(case)
    assert case.run(launch, [cache.inner for cache in caches], position, out=view) is view
    check(case, position, view, *(rows_of(cache.inner, position, rows) for cache in caches))
    assert out.frame_is_untouched()
    assert all(only_those_rows_are_written(cache, position, rows) for cache in caches)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_kernel_at_every_number_of_rows(rows, dtype, device):
    check_everything(projection(rows, SMALL, dtype, device, biased=False), position=5, capacity=5 + rows + 2)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("head_dim", [2, 4, 6, 8, 16, 40, 64, 80, 96, 128, 256])
def test_kernel_at_head_sizes(head_dim, dtype, device):
    check_everything(projection(3, Sizes(33, 3, 1, head_dim), dtype, device), position=7, capacity=10)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("hidden", [1, 2, 80, 128, 257, 300, 520])
def test_kernel_at_odd_sizes(hidden, dtype, device):
    check_everything(projection(5, Sizes(hidden, 5, 3, 10), dtype, device), position=0, capacity=6)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", range(1, 9))
def test_kernel_at_grouped_queries(group, kv_heads, dtype, device):
    check_everything(projection(2, Sizes(40, group * kv_heads, kv_heads, 8), dtype, device), position=3, capacity=7)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_kernel_with_and_without_bias(biased, dtype, device):
    check_everything(projection(4, Sizes(80, 3, 2, 12), dtype, device, biased), position=1, capacity=9)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_sums_in_float32(dtype, device):
    """The sum of 300 times 3000 / 8 is past fp16, and is divided by 3000 before it is rounded."""
    case = projection(2, Sizes(300, 2, 1, 6), dtype, device)
    case.x.fill_(3000)
    case.weight.fill_(0.125)
    check_everything(case, position=1, capacity=4)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("position", [0, 1, 31, 4095, 65535, 65536, 131000])
def test_kernel_turns_by_the_right_angle_at_far_positions(position, dtype, device):
    """The table's angles and the truth's are float64's, so nothing is forgiven for a long way."""
    case = projection(3, Sizes(24, 2, 1, 8), dtype, device)
    caches = fresh(case, position + 3)
    q = case.run(launch, caches, position)
    check(case, position, q, *(rows_of(cache, position, 3) for cache in caches))


@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_the_tables_scaling_reaches_queries_and_keys(factor, device):
    case = projection(3, SMALL, torch.float32, device)
    caches = fresh(case, 9)
    table = phases(SMALL.head_dim, 4, 3, device) * factor
    q = launch(case.x, case.norm, case.packed, table, *caches, 4, eps=EPS)
    keys, values = (rows_of(cache, 4, 3) for cache in caches)
    check(case, 4, q / factor, keys / factor, values)


def test_a_table_of_pairs_is_one_of_complex_numbers(device):
    case = projection(3, SMALL, torch.float32, device)
    ours, theirs = fresh(case, 9), fresh(case, 9)
    table = phases(SMALL.head_dim, 4, 3, device)
    q = launch(case.x, case.norm, case.packed, table, *ours, 4, eps=EPS)
    assert same_bits(q, launch(case.x, case.norm, case.packed, torch.view_as_real(table), *theirs, 4, eps=EPS))
    assert all(same_bits(mine, other) for mine, other in zip(ours, theirs, strict=True))


# ---- strides


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("hidden", [80, 257])
@pytest.mark.parametrize("layout", ROW_STRIDES)
def test_kernel_takes_rows_of_any_stride(layout, hidden, dtype, device):
    case = projection(4, Sizes(hidden, 3, 1, 8), dtype, device)
    ours, theirs = fresh(case, 9), fresh(case, 9)
    strided = ROW_STRIDES[layout](case.x)
    before = strided.clone()
    assert same_bits(case.run(launch, ours, 4), case._replace(x=strided).run(launch, theirs, 4))
    assert all(same_bits(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert torch.equal(strided, before)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_takes_a_weight_of_longer_rows(dtype, device):
    case = projection(4, Sizes(300, 3, 1, 14), dtype, device)
    strided = case._replace(
        norm=framed(case.norm[None]).inner[0],
        weight=framed(case.weight, left=3, right=10).inner,
        bias=framed(case.bias[None]).inner[0],
    )
    caches = fresh(case, 9)
    q = strided.run(launch, caches, 4)
    check(case, 4, q, *(rows_of(cache, 4, 4) for cache in caches))


def plain_cache(kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((kv_heads, capacity, head_dim), NAN)
    return Framed(buffer, buffer)


def token_major_cache(kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((capacity, kv_heads, head_dim), NAN)
    return Framed(buffer.transpose(0, 1), buffer)


def half_of_a_cache(kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((kv_heads, capacity, 2, head_dim), NAN)
    return Framed(buffer[:, :, 1], buffer)


def padded_cache(kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((kv_heads + 2, capacity + 3, head_dim + 5), NAN)
    return Framed(buffer[1 : 1 + kv_heads, 2 : 2 + capacity, 3 : 3 + head_dim], buffer)


CONTIGUOUS = [plain_cache, token_major_cache, half_of_a_cache, padded_cache]


@BOTH
@pytest.mark.parametrize("values_in", CONTIGUOUS)
@pytest.mark.parametrize("keys_in", CONTIGUOUS)
def test_caches_of_the_callers_own_strides(keys_in, values_in, operation, device):
    case = projection(5, Sizes(40, 4, 2, 8), torch.float32, device)
    caches = [make(2, 20, 8, case.x) for make in (keys_in, values_in)]
    wanted = fresh(case, 20)
    q = case.run(operation, [cache.inner for cache in caches], 6)
    assert same_bits(q, case.run(operation, wanted, 6))
    for cache, other in zip(caches, wanted, strict=True):
        assert same_bits(cache.inner, other)
        assert only_those_rows_are_written(cache, 6, 5)
    check(case, 6, q, *(rows_of(cache.inner, 6, 5) for cache in caches))


def plain_blocks(blocks: int, kv_heads: int, size: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((blocks, kv_heads, size, head_dim), NAN)
    return Framed(buffer, buffer)


def token_major_blocks(blocks: int, kv_heads: int, size: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((blocks, size, kv_heads, head_dim), NAN)
    return Framed(buffer.transpose(1, 2), buffer)


def half_of_the_blocks(blocks: int, kv_heads: int, size: int, head_dim: int, like: Tensor) -> Framed:
    buffer = like.new_full((blocks, 2, kv_heads, size, head_dim), NAN)
    return Framed(buffer[:, 1], buffer)


PAGED = [plain_blocks, token_major_blocks, half_of_the_blocks]


def shuffled(capacity: int, size: int, position: int, rows: int, device: torch.device) -> tuple[list[int], Tensor]:
    """A block table; where no row is in flight it points at block 0, which nobody may write to."""
    blocks = (1 + torch.randperm(capacity // size, generator=torch.Generator().manual_seed(size))).tolist()
    for block in range(len(blocks)):
        if not position // size <= block <= (position + rows - 1) // size:
            blocks[block] = 0
    return blocks, torch.tensor(blocks, dtype=torch.int32, device=device)


@BOTH
@pytest.mark.parametrize(("keys_in", "values_in"), [(one, other) for one in PAGED for other in PAGED])
def test_paged_caches_of_the_callers_own_strides(keys_in, values_in, operation, device):
    case = projection(6, Sizes(40, 4, 2, 8), torch.float32, device)
    blocks, table = shuffled(20, 4, 7, 6, device)
    caches = [make(6, 2, 4, 8, case.x) for make in (keys_in, values_in)]
    wanted = fresh(case, 20)
    q = case.run(operation, [cache.inner for cache in caches], 7, block_table=table)
    assert same_bits(q, case.run(operation, wanted, 7))
    for cache, other in zip(caches, wanted, strict=True):
        assert same_bits(rows_of(cache.inner, 7, 6, blocks), rows_of(other, 7, 6))
        assert only_those_rows_are_written(cache, 7, 6, blocks)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize("position", [0, 4, 15, 29])
def test_paged_caches_hold_the_bits_of_contiguous_ones(position, size, dtype, device):
    case = projection(MAX_ROWS, Sizes(40, 3, 1, 8), dtype, device)
    blocks, table = shuffled(48, size, position, MAX_ROWS, device)
    caches = [plain_blocks(1 + len(blocks), 1, size, 8, case.x) for _ in range(2)]
    wanted = fresh(case, 48)
    q = case.run(launch, [cache.inner for cache in caches], position, block_table=table)
    assert same_bits(q, case.run(launch, wanted, position))
    for cache, other in zip(caches, wanted, strict=True):
        assert same_bits(rows_of(cache.inner, position, MAX_ROWS, blocks), rows_of(other, position, MAX_ROWS))
        assert only_those_rows_are_written(cache, position, MAX_ROWS, blocks)
    check(case, position, q, *(rows_of(cache, position, MAX_ROWS) for cache in wanted))


# ---- what the device is told


@BOTH
@pytest.mark.parametrize("position", [0, 9, 65536])
def test_a_position_is_an_int_or_a_tensor(position, operation, device):
    case = projection(3, Sizes(24, 2, 1, 8), torch.float32, device)
    ours = fresh(case, position + 4)
    q = case.run(operation, ours, position)
    for offset in (0, 1):  # a tensor's address decides nothing
        theirs = fresh(case, position + 4)
        numbers = torch.full((3,), -1, device=device)
        numbers[offset] = position
        assert same_bits(q, case.run(operation, theirs, numbers[offset : offset + 1]))
        assert all(same_bits(mine, other) for mine, other in zip(ours, theirs, strict=True))


@BOTH
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("position", [-1, -2])
def test_rows_before_the_first_position_are_left_out(position, paged, operation, device):
    """The adapter's first pass has such a row where the text is one token long; the others are as they are alone."""
    case = projection(3, SMALL, torch.float32, device)
    alone = case._replace(x=case.x[-position:])
    settings = {"block_table": torch.tensor([2, 1, 0], dtype=torch.int32, device=device)} if paged else {}
    ours, theirs = ([case.x.new_full((3, 1, 4, 16) if paged else (1, 12, 16), NAN) for _ in range(2)] for _ in "ab")
    table = phases(SMALL.head_dim, 0, 12, device)
    operands = case.norm, case.packed, table
    where = torch.tensor([position], device=device)
    for out in (None, case.x.new_full((3, SMALL.heads, SMALL.head_dim), NAN)):
        q = operation(case.x, *operands, *ours, where, eps=EPS, out=out, **settings)
        wanted = operation(alone.x, *operands, *theirs, 0, eps=EPS, **settings)
        torch.testing.assert_close(q[-position:], wanted, rtol=1e-5, atol=1e-5)
        assert q.isfinite().all()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@BOTH
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("raised", [False, True])
def test_nothing_is_done_where_the_flag_is_down(raised, paged, operation, device):
    case = projection(3, SMALL, torch.float32, device)
    flag = torch.tensor([int(raised)], dtype=torch.int32, device=device)
    draw = drawer(9, case.x.dtype, device)
    settings = {"block_table": torch.tensor([2, 0], dtype=torch.int32, device=device)} if paged else {}
    before = [draw(*((3, 1, 4, 16) if paged else (1, 8, 16))) for _ in range(2)] + [draw(3, 3, 16)]
    ours, theirs = ([part.clone() for part in before] for _ in range(2))
    assert case.run(operation, ours[:2], 3, active=flag, out=ours[2], **settings) is ours[2]
    if raised:
        case.run(operation, theirs[:2], 3, out=theirs[2], **settings)
        assert not any(same_bits(mine, old) for mine, old in zip(ours, before, strict=True))
    assert all(same_bits(mine, other) for mine, other in zip(ours, theirs, strict=True))
    made = case.run(operation, ours[:2], 3, active=flag, **settings)
    assert (made.shape, made.dtype, made.device.type) == ((3, 3, 16), case.x.dtype, device.type)
    assert int(flag) == raised


@BOTH
def test_out_is_filled_and_the_operands_are_left_alone(operation, device):
    case = projection(3, SMALL, torch.float32, device)
    before = [part.clone() for part in case[1:]]
    table = phases(SMALL.head_dim, 4, 3, device)
    phases_before = table.clone()
    (out, view), caches = out_for(case), fresh(case, 8)
    assert operation(case.x, case.norm, case.packed, table, *caches, 4, eps=EPS, out=view) is view
    check(case, 4, view, *(rows_of(cache, 4, 3) for cache in caches))
    assert out.frame_is_untouched()
    assert all(same_bits(part, old) for part, old in zip(case[1:], before, strict=True))
    assert same_bits(torch.view_as_real(table), torch.view_as_real(phases_before))


# ---- rows do not see each other


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_gives_a_row_the_same_bits_with_any_rows_after_it(dtype, device):
    case = projection(MAX_ROWS, SMALL, dtype, device)
    whole = fresh(case, 20)
    q = case.run(launch, whole, 4)
    for rows in range(1, MAX_ROWS):
        caches = fresh(case, 20)
        assert same_bits(case._replace(x=case.x[:rows]).run(launch, caches, 4), q[:rows]), rows
        for cache, other in zip(caches, whole, strict=True):
            assert same_bits(cache[:, : 4 + rows], other[:, : 4 + rows]), rows


def test_kernel_gives_a_row_the_same_values_wherever_it_stands(device):
    """The interpreter's product is a BLAS's, so this is a budget here; bits are the GPU's, below."""
    case = projection(1, SMALL, torch.float32, device)
    for x, place in placements(case.x, drawer(3, case.x.dtype, device), (2, 5, MAX_ROWS)):
        caches = fresh(case, 40)
        q = case._replace(x=x).run(launch, caches, 20 - place)
        check(case, 20, q[place : place + 1], *(rows_of(cache, 20, 1) for cache in caches))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spoiled", [NAN, float("inf")])
def test_kernel_keeps_a_spoiled_row_to_itself(spoiled, device):
    case = projection(5, SMALL, torch.float32, device)
    ours, theirs = fresh(case, 12), fresh(case, 12)
    wanted = case.run(launch, theirs, 4)
    x = case.x.clone()
    x[3, 40] = spoiled
    q = case._replace(x=x).run(launch, ours, 4)
    others = [0, 1, 2, 4]
    assert same_bits(q[others], wanted[others])
    assert q[3].isnan().all()
    for mine, other in zip(ours, theirs, strict=True):
        assert same_bits(rows_of(mine, 4, 5)[others], rows_of(other, 4, 5)[others])
        assert rows_of(mine, 4, 5)[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(Sizes(4096, 16, 8, 128), dtype) for dtype in HALF_DTYPES]
    + [(Sizes(hidden, 5, 3, 10), dtype) for hidden in (257, 520, 1000) for dtype in (torch.float32, *HALF_DTYPES)],
)
def test_kernel_gives_a_row_the_same_bits_wherever_it_stands(sizes, dtype, paged, device):
    case = projection(1, sizes, dtype, device)
    table = phases(sizes.head_dim, 0, 64, device)
    blocks = torch.randperm(4, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    shape = (4, sizes.kv_heads, 16, sizes.head_dim) if paged else (sizes.kv_heads, 64, sizes.head_dim)

    def run(x: Tensor, position: int) -> list[Tensor]:
        caches = [case.x.new_full(shape, NAN) for _ in range(2)]
        settings = {"eps": EPS, "block_table": blocks if paged else None}
        q = launch(x, case.norm, case.packed, table, *caches, position, **settings)
        order = blocks.tolist() if paged else None
        return [q, *(rows_of(cache, position, len(x), order) for cache in caches)]

    alone = [run(case.x, 20 + place) for place in range(MAX_ROWS)]
    draw = drawer(5, dtype, device)
    for x, place in placements(case.x, draw, range(1, MAX_ROWS + 1)):
        buffer = draw(place + 3 + len(x), sizes.hidden)
        buffer[place : place + len(x)] = x  # out of the middle of a buffer, at any alignment
        for rows in (x, buffer[place : place + len(x)]):
            for mine, other in zip(run(rows, 20), alone[place], strict=True):
                assert torch.equal(mine[place], other[0]), (len(x), place)


@pytest.mark.parametrize("block_n", [16, 64])
def test_settings_change_nothing(block_n, device):
    """On a GPU not a bit; in the interpreter tiles of another size are other calls of a BLAS."""
    case = projection(5, Sizes(300, 5, 3, 10), torch.float32, device)
    ours, theirs = fresh(case, 9), fresh(case, 9)
    wanted = case.run(launch, theirs, 4)
    with configured_by(lambda *_: LaunchConfig(8, 2, block_n)):
        q = case.run(launch, ours, 4)
    check(case, 4, q, *(rows_of(cache, 4, 5) for cache in ours))
    if device.type == "cuda":
        assert same_bits(q, wanted)
        assert all(same_bits(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
def test_launching_does_not_wait_for_the_device(device):
    case = projection(3, Sizes(256, 4, 2, 64), torch.float16, device)
    caches, table = fresh(case, 9), phases(64, 4, 3, device)
    one, position = (
        torch.full((1,), value, dtype=kind, device=device) for value, kind in ((1, torch.int32), (4, None))
    )
    launch(case.x, case.norm, case.packed, table, *caches, position, eps=EPS, active=one)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(case.x, case.norm, case.packed, table, *caches, position, eps=EPS, active=one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
