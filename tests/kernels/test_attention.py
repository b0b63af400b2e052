import math
from bisect import bisect_left
from functools import lru_cache
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from budget import assert_within_budget
from recorded import Recorded
from side_by_side import side_by_side
from torch import Tensor
from trees import STAR, masks_of
from triton import knobs

from kangaroo_kernels.attention import attention as kernel
from kangaroo_kernels.attention import attention_kernel
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.reference import attention as attention_module
from kangaroo_kernels.reference.attention import MANY_ROWS, _prefill_on_gpu
from kangaroo_kernels.reference.attention import attention as reference
from kangaroo_kernels.shared.cache_layout import row_offsets
from kangaroo_kernels.shared.merge_splits import attention_merge, attention_merge_kernel, merge_splits, merges_apart
from kangaroo_kernels.shared.operands import Cache, Heads, Parts, Queries, Work
from kangaroo_kernels.shared.splits import count_splits, count_splits_of, first_position

NAN, INFINITY = float("nan"), float("inf")
HALF = torch.float16
NANS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
DTYPES = [torch.float32, HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter has no bf16 dot


def formula(q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float) -> Tensor:
    """One row, one head, one sum at a time; in float64 the truth."""
    rows, heads, head_dim = q.shape
    group = heads // keys.shape[0]
    out = q.new_empty(rows, heads, head_dim)
    for row in range(rows):
        for head in range(heads):
            seen = slice(0, position + row + 1)
            scores = scale * (keys[head // group, seen] @ q[row, head])
            out[row, head] = torch.softmax(scores, dim=0) @ values[head // group, seen]
    return out.flatten(1)


def inputs(
    rows: int, heads: int, kv_heads: int, head_dim: int, position: int, spare: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values; what lies beyond the last row's position is NaN."""
    generator = torch.Generator().manual_seed(seed)
    length = position + rows
    q = torch.randn(rows, heads, head_dim, generator=generator)
    keys, values = (torch.randn(kv_heads, length + spare, head_dim, generator=generator) for _ in range(2))
    keys[:, length:] = values[:, length:] = float("nan")
    return q, keys, values


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("position", [0, 1, 37])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (6, 1), (1, 1), (3, 3)])
def test_formula(heads, kv_heads, position, rows):
    q, keys, values = inputs(rows, heads, kv_heads, 16, position)
    truth = formula(q.double(), keys.double(), values.double(), position, 0.25)
    ours = reference(q, keys, values, position, scale=0.25)
    assert_within_budget(ours, truth, formula(q, keys, values, position, 0.25), slack=4)


@pytest.mark.parametrize("rows", [MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 13])
@pytest.mark.parametrize("position", [0, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_many_rows(heads, kv_heads, position, rows):
    q, keys, values = inputs(rows, heads, kv_heads, 8, position)
    truth = formula(q.double(), keys.double(), values.double(), position, 0.3)
    ours = reference(q, keys, values, position, scale=0.3)
    assert_within_budget(ours, truth, formula(q, keys, values, position, 0.3), slack=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [MAX_ROWS + 1, MANY_ROWS + 13])
@pytest.mark.parametrize("position", [0, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_a_prefill_on_a_gpu(heads, kv_heads, position, rows, dtype, device):
    """On a CPU the same call falls back to a mask of numbers: what is held is that the rows are the text's last."""
    q, keys, values = (part.to(dtype) for part in inputs(rows, heads, kv_heads, 8, position, spare=0))
    truth = formula(q.double(), keys.double(), values.double(), position, 0.3)
    ours = _prefill_on_gpu(q.to(device), keys.to(device), values.to(device), 0.3).cpu()
    assert_within_budget(ours, truth, formula(q, keys, values, position, 0.3), slack=4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("rows", "there"), [(1, 0), (MAX_ROWS, 0), (MAX_ROWS + 1, 1), (MANY_ROWS, 1)])
def test_a_gpu_takes_that_way_for_more_rows_than_the_kernels(rows, there, paged, monkeypatch):
    """A prefill behind a text, too: a mask would cost all scores at once, and bfloat16 ones would be rounded."""
    way = Mock(side_effect=lambda q, *_: q.flatten(1))
    monkeypatch.setattr(attention_module, "_prefill_on_gpu", way)
    monkeypatch.setattr(attention_module, "FUSED_ON", "cpu")
    q = torch.randn(rows, 4, 8)
    caches = torch.randn(2, *((7, 2, 16) if paged else (2, 7 * 16)), 8)
    table = torch.arange(7, dtype=torch.int32) if paged else None
    reference(q, *caches, 30, scale=0.3, block_table=table)
    assert way.call_count == there
    assert all(call.args[1].shape == (2, 30 + rows, 8) for call in way.call_args_list)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_later_turns_scores_are_never_whole(dtype, device):
    rows, heads, kv_heads, length = 2000, 32, 8, 1 << 15
    q = torch.randn(rows, heads, 64, dtype=dtype, device=device)
    caches = torch.randn(2, kv_heads, length, 64, dtype=dtype, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    reference(q, *caches, length - rows, scale=0.125)
    assert torch.cuda.max_memory_allocated(device) - before < rows * heads * length  # a quarter of float32 scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_low_precision(heads, kv_heads, rows, dtype):
    q, keys, values = (part.to(dtype) for part in inputs(rows, heads, kv_heads, 32, 11))
    truth = formula(q.double(), keys.double(), values.double(), 11, 32**-0.5)
    ours = reference(q, keys, values, 11, scale=32**-0.5)
    assert_within_budget(ours, truth, formula(q, keys, values, 11, 32**-0.5), slack=2)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", ["token major", "fused", "wide rows"])
def test_strides(layout, heads, kv_heads, rows):
    """A caller's own cache, queries that are a view of the fused projection: the numbers decide, not where they lie."""
    position, head_dim = 6, 8
    q, keys, values = inputs(rows, heads, kv_heads, head_dim, position)
    wanted = reference(q, keys, values, position, scale=0.4)
    if layout == "token major":
        keys, values = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in (keys, values))
    elif layout == "fused":
        both = torch.stack((keys, values), dim=2)
        keys, values = both[:, :, 0], both[:, :, 1]
        fused = torch.full((rows, heads + 2 * kv_heads, head_dim), float("nan"))
        fused[:, :heads] = q
        q = fused[:, :heads]
    else:
        keys, values = (torch.cat((part, torch.full_like(part, float("nan"))), dim=2) for part in (keys, values))
        keys, values = keys[..., :head_dim], values[..., :head_dim]
    truth = formula(q.double(), keys.double(), values.double(), position, 0.4)
    assert_within_budget(reference(q, keys, values, position, scale=0.4), truth, wanted, slack=4)


@pytest.mark.parametrize("rows", [1, 2, 16, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_nothing_beyond_a_rows_own_position_is_read(heads, kv_heads, rows):
    """Noise of any size there, bit for bit without effect; NaN in the rows in flight reaches none before them."""
    position = 9
    q, keys, values = inputs(rows, heads, kv_heads, 16, position)
    wanted = reference(q, keys, values, position, scale=0.25)
    for spoil in (100 * torch.randn(kv_heads, 5, 16), torch.full((kv_heads, 5, 16), float("inf"))):
        keys[:, position + rows :] = values[:, position + rows :] = spoil
        assert torch.equal(reference(q, keys, values, position, scale=0.25), wanted)
    if rows > 1:
        keys[:, position + rows - 1] = 100 * torch.randn(kv_heads, 16)
        values[:, position + rows - 1] = 100 * torch.randn(kv_heads, 16)
        spoiled = reference(q, keys, values, position, scale=0.25)
        torch.testing.assert_close(spoiled[:-1], wanted[:-1], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(spoiled[-1], wanted[-1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_rows_at_once_are_rows_one_by_one(heads, kv_heads):
    q, keys, values = inputs(16, heads, kv_heads, 16, 5)
    whole = reference(q, keys, values, 5, scale=0.25)
    for row in range(16):
        single = reference(q[row : row + 1], keys, values, 5 + row, scale=0.25)
        torch.testing.assert_close(single[0], whole[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 17, MANY_ROWS])
@pytest.mark.parametrize("position", [0, 9, 250])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_a_cache_in_float16(paged, position, rows):
    """Its numbers, in the arithmetic of the queries; what lies beyond a row is not read."""
    q, *caches = inputs(rows, 6, 2, 16, position, spare=4 + (position + rows) % 2)
    exact = [cache.half().float() for cache in caches]
    halves, settings = [cache.half() for cache in caches], {"scale": 0.25}
    if paged:
        halves = [cache.unflatten(1, (2, -1)).transpose(0, 1).contiguous() for cache in halves]
        settings["block_table"] = torch.arange(2, dtype=torch.int32)
    truth = formula(q.double(), *(cache.double() for cache in exact), position, 0.25)
    ours = reference(q, *halves, position, **settings)
    assert_within_budget(ours, truth, formula(q, *exact, position, 0.25), slack=4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries sum in other orders")
@pytest.mark.parametrize("position", [0, 5, 100, 186, 380, 570, 700, 764, 1148, 2000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (8, 2, 64), (4, 4, 12), (4, 2, 16), (6, 1, 128), (2, 2, 128), (8, 2, 128)],
)
def test_a_cache_in_float16_gives_rows_at_once_their_bits(heads, kv_heads, head_dim, position):
    """Those of each alone, also where a pass goes beyond a block of positions."""
    q, *caches = inputs(40, heads, kv_heads, head_dim, position)
    keys, values = (cache.half() for cache in caches)
    single = [reference(q[row : row + 1], keys, values, position + row, scale=0.25) for row in range(40)]
    for rows, first in ((2, 0), (2, 5), (3, 1), (4, 3), (5, 9), (7, 0), (16, 0), (16, 20), (40, 0)):
        whole = reference(q[first : first + rows], keys, values, position + first, scale=0.25)
        assert torch.equal(whole, torch.cat(single[first : first + rows]))


@pytest.mark.parametrize("rows", [1, 4, 70])
def test_inputs_are_left_alone(rows):
    q, keys, values = inputs(rows, 4, 2, 16, 3, spare=0)
    before = [part.clone() for part in (q, keys, values)]
    for _ in range(2):  # the causal mask is kept from call to call
        reference(q, keys, values, 3, scale=0.25)
    assert all(torch.equal(part, kept) for part, kept in zip((q, keys, values), before, strict=True))


# ---- the kernel


def splits_of(capacity: int) -> list[int]:
    """Where the splits of a cache begin: 32 of 128 positions, 48 of 256, then 1024 each."""
    starts, start = [], 0
    while start < capacity:
        starts.append(start)
        start += 128 if start < 4096 else 256 if start < 16384 else 1024
    return starts


@lru_cache
def arrivals(device: torch.device) -> Tensor:
    return torch.zeros(64, dtype=torch.int32, device=device)


def attend(q: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, scale: float, **settings: object) -> Tensor:
    """What the kernel writes into the middle of a poisoned buffer; all of it, and nothing beside.

    Every call counts in the same words, which nobody clears.
    """
    rows, width = q.shape[0], q.shape[1] * q.shape[2]
    buffer = torch.full((rows + 2, width + 16), NAN, dtype=q.dtype, device=q.device)
    out, counters = buffer[1:-1, 8:-8], arrivals(q.device)
    settings = {"arrivals": counters, **settings}
    assert kernel(q, keys, values, position, scale=scale, out=out, **settings).data_ptr() == out.data_ptr()
    assert not counters.any()
    found = out.clone()
    out.fill_(NAN)
    assert buffer.isnan().all()
    return found


def hold(q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float, **settings: object) -> Tensor:
    """Hold the kernel against the reference in float64, the reference in the same dtype being the budget."""
    ours = attend(q, keys, values, position, scale, **settings)
    q, keys, values = (part.cpu() for part in (q, keys, values))
    truth = reference(q.double(), keys.double(), values.double(), position, scale=scale)
    straightforward = reference(q, keys, values, position, scale=scale)
    assert_within_budget(ours.cpu(), truth, straightforward, slack=4 if q.dtype == torch.float32 else 2)
    return ours


def on(device: torch.device, dtype: torch.dtype, parts: tuple[Tensor, ...]) -> list[Tensor]:
    return [part.to(device, dtype) for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 80, 96, 128, 256])
def test_kernel_head_sizes(device, head_dim, dtype):
    q, keys, values = on(device, dtype, inputs(3, 4, 2, head_dim, 37))
    hold(q, keys, values, 37, head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("group", range(1, 9))
def test_kernel_packs_the_heads_of_a_group(device, group, rows, dtype):
    """Up to 128 packed rows: more than a program takes, from 5 query heads a group on."""
    q, keys, values = on(device, dtype, inputs(rows, 2 * group, 2, 16, 50, seed=group))
    hold(q, keys, values, 50, 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, 17))
def test_kernel_rows(device, rows, dtype):
    position = 7 * rows % 45
    q, keys, values = on(device, dtype, inputs(rows, 3, 1, 16, position, seed=rows))
    hold(q, keys, values, position, 0.25)


def sharp_inputs(rows: int, position: int, spare: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One head that looks at the seams of the splits: each position there weighs a few hundredths of the sum."""
    q, keys, values = inputs(rows, 1, 1, 16, position, spare, seed)
    length = position + rows
    q[..., 0], keys[:, :length, 0] = 1, 0
    for seam in (0, 127, 128, 256, 4096, 4352, 16384, 17408, length):
        keys[:, max(0, seam - 2) : min(seam + 2, length), 0] = math.log(length) / 0.25
    return q, keys, values


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize(
    ("rows", "position"),
    [(1, 0), (1, 1), (1, 126), (1, 127), (1, 128), (3, 125), (3, 126), (3, 127), (16, 120), (2, 255), (16, 250)],
)
def test_kernel_at_the_first_seams(device, rows, position, spare, dtype):
    q, keys, values = on(device, dtype, sharp_inputs(rows, position, spare))
    hold(q, keys, values, position, 0.25)


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize(
    ("rows", "position"), [(1, 4095), (1, 4096), (1, 4351), (3, 4094), (3, 4350), (3, 16382), (3, 17406)]
)
def test_kernel_at_the_far_seams(device, rows, position):
    """Three rows of three lengths: one short of the seam, just at it, one beyond."""
    q, keys, values = on(device, HALF, sharp_inputs(rows, position, spare=1))
    hold(q, keys, values, position, 0.25)


@triton.jit
def splits_kernel(length_ptr, count_ptr, first_ptr, size: tl.constexpr):
    offs = tl.arange(0, size)
    tl.store(count_ptr + offs, count_splits_of(tl.load(length_ptr + offs)))
    tl.store(first_ptr + offs, first_position(offs))


def test_splits_are_the_same_on_the_host_and_on_the_device(device):
    lengths = torch.cat((torch.arange(20_000), torch.arange(131_000, 131_000 + 12_768))).int()
    starts = splits_of(2**26)
    wanted = [bisect_left(starts, length) for length in lengths.tolist()]  # a split counts once it holds a position
    assert [count_splits(length) for length in lengths.tolist()] == wanted
    counts, firsts = (torch.zeros(len(lengths), dtype=torch.int32, device=device) for _ in range(2))
    splits_kernel[(1,)](lengths.to(device), counts, firsts, len(lengths))
    assert counts.tolist() == wanted
    assert firsts.tolist() == starts[: len(lengths)]


@triton.jit
def offsets_kernel(position_ptr, bound, table_ptr, out_ptr, block_stride, row_stride, block_size: tl.constexpr):
    offs = tl.arange(0, 4)
    positions = tl.load(position_ptr + offs)
    cache = Cache(None, block_stride, None, row_stride)
    rows = row_offsets(positions, positions < bound, cache, table_ptr, block_size)
    tl.store(out_ptr + offs, rows)


@pytest.mark.parametrize("block_size", [0, 1, 16, 24])
def test_offsets_pass_32_bits(device, block_size):
    """In a cache of more than 2^31 elements, by the position alone, by the block alone, and by the slot alone."""
    positions = torch.tensor([0, 3, 25, 40_000], dtype=torch.int32)
    table = torch.arange(40_001, dtype=torch.int32).flip(0)
    for block_stride, row_stride in ((70_000, 128), (5, 2**30), (70_000, 2**30 + 1)):
        out = torch.zeros(4, dtype=torch.int64, device=device)
        where, blocks = positions.to(device), table.to(device) if block_size else None
        offsets_kernel[(1,)](where, 40_001, blocks, out, block_stride, row_stride, block_size)
        if block_size:
            places = [(40_000 - position // block_size, position % block_size) for position in positions.tolist()]
            wanted = [block * block_stride + slot * row_stride for block, slot in places]
        else:
            wanted = [position * row_stride for position in positions.tolist()]
        assert out.tolist() == wanted
        assert max(wanted) > 2**31 or (block_size, row_stride) in {(0, 128), (1, 2**30)}


def test_no_block_is_looked_up_for_a_position_that_nobody_reads(device):
    """The table may end before it."""
    positions = torch.tensor([0, 17, 40, 50], dtype=torch.int32, device=device)
    table = torch.tensor([7, 8, 9, 10], dtype=torch.int32, device=device)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](positions, 40, table, out, 1000, 10, 16)
    assert out.tolist() == [7000, 8010, 80, 20]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, Recorded]:
    """Attention's kernel and that of the merge, which are not launched."""
    found = Recorded(attention_kernel), Recorded(attention_merge_kernel)
    monkeypatch.setattr("kangaroo_kernels.attention.attention_kernel", found[0])
    monkeypatch.setattr("kangaroo_kernels.shared.merge_splits.attention_merge_kernel", found[1])
    return found


def test_one_binary_serves_any_number_of_rows(device, recorded):
    """Wherever they are in the text, wherever the position lies in its buffer, and whoever merges."""
    q, keys, values = on(device, HALF, inputs(16, 8, 2, 16, 40, spare=1100))
    for rows in range(1, 17):
        for position in (rows, torch.tensor([0, 7], device=device)[1:]):
            kernel(q[:rows], keys, values, position, scale=0.25, arrivals=arrivals(device)[rows:])
    assert [len(each.launches) for each in recorded] == [32, 14]
    assert [len(each.binaries()) for each in recorded] == [1, 1]


@pytest.mark.parametrize(
    ("capacity", "bound", "splits"),
    [(128, None, 1), (129, None, 2), (700, 128, 1), (700, 129, 2), (700, 600, 5), (700, 10_000, 6), (4353, None, 34)],
)
def test_programs_are_launched_for_the_bound(device, recorded, capacity, bound, splits):
    """No more than the cache has positions for, in one launch."""
    q, keys, values = on(device, HALF, inputs(2, 4, 2, 16, 3, spare=capacity - 5))
    kernel(q, keys, values, 3, scale=0.25, max_length=bound)
    assert [[launch[0] for launch in each.launches] for each in recorded] == [[(1, 2, splits)], []]


@pytest.mark.parametrize(
    ("rows", "bound", "apart"),
    [(16, 128, False), (16, 1024, False), (16, 1025, True), (9, 1025, False), (10, 1025, True), (1, None, False)],
)
def test_a_long_merge_has_a_launch_of_its_own(device, recorded, rows, bound, apart):
    """What the host knows decides: rows, and the bound of positions that lie on the device."""
    q, keys, values = on(device, HALF, inputs(rows, 8, 2, 16, 3, spare=4500))
    kernel(q, keys, values, torch.tensor([3], device=device), scale=0.25, max_length=bound)
    (split,), merges = (each.launches for each in recorded)
    assert split[1]["merges"] == int(not apart)
    assert [launch[0] for launch in merges] == [(rows, 2)] * apart


# ---- the last program merges, or a launch of its own


@triton.jit
def merge_kernel(sums_ptr, stats_ptr, out_ptr, position, rows, heads, splits, group: tl.constexpr, dim: tl.constexpr):
    attention_merge(
        Work(0, tl.program_id(0), tl.program_id(1), 0),
        position,
        splits,
        Queries(None, rows, heads, 0, 0, None),
        Parts(sums_ptr, stats_ptr, None, out_ptr, heads * dim),
        Heads(group, dim, 16, 16),
        None,
    )


@pytest.mark.parametrize("apart", [False, True], ids=["the last program", "a launch"])
@pytest.mark.parametrize("splits", [1, 2, 7, 8, 9, 31, 32, 33, 80, 83])
@pytest.mark.parametrize(("rows", "group", "head_dim"), [(1, 1, 16), (16, 3, 16), (5, 2, 11)])
def test_splits_are_merged_in_order(device, rows, group, head_dim, splits, apart):
    """One after the other, to the bit; a row takes those that it sees, and the others hold NaN."""
    starts = splits_of(10**6)
    position, heads, generator = starts[splits] - rows // 2 - 1, 2 * group, torch.Generator().manual_seed(splits)
    sums = torch.randn(splits, rows, heads, head_dim, generator=generator)
    tops = torch.randint(-3, 4, (splits, rows, heads), generator=generator).float()  # exp2 is exact
    weights = torch.rand(splits, rows, heads, generator=generator)
    best, denominator = torch.full((rows, heads), -INFINITY), torch.zeros(rows, heads)
    wanted = torch.zeros(rows, heads, head_dim)
    for split, row in ((split, row) for split in range(splits) for row in range(rows)):
        if starts[split] > position + row:
            sums[split, row], tops[split, row], weights[split, row] = NAN, NAN, NAN
            continue
        higher = torch.maximum(best[row], tops[split, row])
        fade, share = torch.exp2(best[row] - higher), torch.exp2(tops[split, row] - higher)
        denominator[row] = denominator[row] * fade + weights[split, row] * share
        wanted[row] = wanted[row] * fade[:, None] + sums[split, row] * share[:, None]
        best[row] = higher
    wanted = (wanted / denominator[..., None]).flatten(1)
    out, stats = torch.full((rows, heads * head_dim), NAN, device=device), torch.stack((tops, weights), -1).to(device)
    sums = sums.to(device)
    if apart:
        merge_splits(torch.tensor([position], device=device), None, out, 2, sums, stats)
    else:
        given = (sums, stats, out, position, rows, heads, splits)
        merge_kernel[(2, triton.cdiv(rows * group, 16))](*given, group=group, dim=head_dim)
    if device.type == "cpu":  # a GPU's division may differ in the last bit
        assert torch.equal(out, wanted)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-6, atol=1e-6)


ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs programs side by side by itself")


@ON_A_CPU
@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize(("rows", "position"), [(1, 300), (9, 500), (3, 126)])
def test_any_program_may_be_the_last(device, rows, position):
    """Whoever it is, the bits are the same, and the counters are 0."""
    q, keys, values = on(device, HALF, inputs(rows, 4, 2, 16, position, spare=40))
    wanted = attend(q, keys, values, position, 0.25)
    for order in range(4):
        with side_by_side(order):
            assert torch.equal(attend(q, keys, values, position, 0.25), wanted)


@ON_A_CPU
@pytest.mark.usefixtures("guarded_workspaces")
def test_the_first_program_must_not_merge(device, monkeypatch):
    """What the others leave is not there yet."""
    monkeypatch.setattr("kangaroo_kernels.attention.is_last", lambda pointer, splits: tl.atomic_add(pointer, 1) == 0)
    q, keys, values = on(device, HALF, inputs(2, 4, 2, 16, 300))
    found = kernel(q, keys, values, 300, scale=0.25, arrivals=arrivals(device).clone())
    assert found.isnan().any()


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize(("rows", "heads", "position"), [(1, 8, 300), (7, 8, 126), (16, 14, 200), (3, 2, 1100)])
def test_who_merges_changes_no_bit(device, monkeypatch, rows, heads, position):
    """Of a chain and a tree, in contiguous and paged caches, with a flag, and of a text beyond its bound."""
    q, keys, values = on(device, HALF, inputs(rows, heads, 2, 16, position, spare=40))
    blocks = shuffled_blocks(position + rows, 16)
    pools = [paged(cache[:, : position + rows], blocks, 16) for cache in (keys, values)]
    table, down = (torch.tensor(each, dtype=torch.int32, device=device) for each in (blocks, [0]))
    where, masks = torch.tensor([position], device=device), masks_of(STAR[: rows - 1], device)
    ways = [{}, {"ancestors": masks}, {"active": down + 1}, {"max_length": 129}]

    def found(most_turns: int) -> list[Tensor]:
        monkeypatch.setattr("kangaroo_kernels.shared.merge_splits.MOST_TURNS", most_turns)
        untouched = q.new_full((rows, heads * 16), 7)
        assert (kernel(q, keys, values, where, scale=0.25, active=down, out=untouched) == 7).all()
        pages = attend(q, *pools, position, 0.25, block_table=table)
        return [pages, *(attend(q, keys, values, where, 0.25, **way) for way in ways)]

    assert all(map(torch.equal, found(-1), found(10**6)))


def test_what_a_launch_merges_nobody_else_does(device, monkeypatch):
    """Without that launch, the result stays as it was."""
    monkeypatch.setattr("kangaroo_kernels.shared.merge_splits.attention_merge_kernel", Recorded(attention_merge_kernel))
    q, keys, values = on(device, HALF, inputs(16, 4, 1, 16, 1100))
    assert attend(q, keys, values, 1100, 0.25).isnan().all()
    assert not attend(q[:9], keys, values, 1100, 0.25).isnan().any()


def test_a_rows_bits_do_not_depend_on_who_merges(device):
    """Alone, or in a pass of so many rows that a launch of its own merges them."""
    splits = count_splits(1100 + 16)
    assert [merges_apart(4 * rows, splits) for rows in (1, 9, 16)] == [False, False, True]
    neighbourhoods(device, HALF, 4, 1, 16, 1100, [(16, 0), (9, 4), (16, 15)])


def test_counters_serve_again_and_again(device):
    """Pass after pass of a text, of any number of rows, with steps that a flag leaves out, paged or not."""
    q, keys, values = on(device, HALF, inputs(16, 4, 2, 16, 300))
    blocks = shuffled_blocks(316, 16)
    pools = [paged(cache[:, :316], blocks, 16) for cache in (keys, values)]
    table, flag = (torch.tensor(each, dtype=torch.int32, device=device) for each in (blocks, [0]))
    for rows in (1, 16, 2, 7, 1):
        wanted = kernel(q[:rows], keys, values, 300, scale=0.25)  # counts in words of its own
        kernel(q[:rows], keys, values, 300, scale=0.25, active=flag, arrivals=arrivals(device))
        for bound in (316, None):
            assert torch.equal(attend(q[:rows], keys, values, 300, 0.25, max_length=bound), wanted)
        assert torch.equal(attend(q[:rows], *pools, 300, 0.25, block_table=table), wanted)
    where = torch.tensor([300], device=device)
    attend(q, keys, values, where, 0.25, max_length=140)  # a text beyond its bound: the counters are 0 nevertheless


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, dtype=torch.int32), torch.zeros(4), torch.zeros(2, 4, dtype=torch.int32)]
)
def test_counters_that_do_not_fit(device, bad):
    q, keys, values = on(device, HALF, inputs(1, 4, 2, 16, 300))
    with pytest.raises(TypeError, match=r"attention: arrivals is .* at least 4 zeros, int32"):
        kernel(q, keys, values, 300, scale=0.25, arrivals=bad.to(device))


@pytest.mark.parametrize("attention", [reference, kernel], ids=["reference", "kernel"])
def test_a_bound_below_the_rows_is_refused(device, attention):
    """The programs that would see the last positions are not launched."""
    q, keys, values = on(device, torch.float32, inputs(3, 4, 2, 16, 400))
    attention(q, keys, values, 400, scale=0.25, max_length=403)
    for bound in (402, 100, 0, -1):
        sentence = rf"^attention: max_length is {bound}; it bounds position \+ M, so it must be at least 403\.$"
        with pytest.raises(ValueError, match=sentence):
            attention(q, keys, values, 400, scale=0.25, max_length=bound)
    position = torch.tensor([400], device=device)  # not read, so what it allows is the caller's to know
    for bound in (0, -1):
        with pytest.raises(ValueError, match=f"max_length is {bound}; .* at least 1\\.$"):
            attention(q, keys, values, position, scale=0.25, max_length=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "position"), [(1, 0), (1, 63), (7, 30), (16, 112), (1, 127)])
def test_a_larger_bound_changes_no_bit(device, rows, position, dtype):
    """Within the first split: written at once, or merged with programs that had nothing to do."""
    q, keys, values = on(device, dtype, inputs(rows, 2, 1, 16, position, spare=500))
    alone = attend(q, keys, values, position, 0.25, max_length=position + rows)
    for bound in (128, 129, None, 100_000):
        assert torch.equal(attend(q, keys, values, position, 0.25, max_length=bound), alone)


@pytest.mark.usefixtures("guarded_workspaces")
def test_a_larger_bound_changes_no_bit_beyond_the_first_split(device):
    q, keys, values = on(device, HALF, inputs(3, 2, 1, 16, 1400, spare=700))
    alone = hold(q, keys, values, 1400, 0.25, max_length=1403)
    for bound in (1500, None, 100_000):
        assert torch.equal(attend(q, keys, values, 1400, 0.25, max_length=bound), alone)


def paged(cache: Tensor, blocks: list[int], block_size: int) -> Tensor:
    """The blocks of a contiguous cache in the order of ``blocks``, in a pool that is NaN elsewhere."""
    kv_heads, capacity, head_dim = cache.shape
    pool = cache.new_full((max(blocks) + 3, kv_heads, block_size, head_dim), NAN)
    for index, block in enumerate(blocks):
        part = cache[:, index * block_size : min((index + 1) * block_size, capacity)]
        pool[block, :, : part.shape[1]] = part
    return pool


def shuffled_blocks(positions: int, block_size: int, seed: int = 3) -> list[int]:
    count = triton.cdiv(positions, block_size)
    return (2 + torch.randperm(count + 4, generator=torch.Generator().manual_seed(seed))[:count]).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 24, 64])
@pytest.mark.parametrize(("rows", "position"), [(3, 46), (4, 126)])
def test_paged_caches(device, rows, position, block_size, dtype):
    """Shuffled blocks, the same bits; entries of the table that nobody may read lie outside of the pool."""
    q, keys, values = on(device, dtype, inputs(rows, 2, 2, 16, position, spare=9))
    wanted = attend(q, keys, values, position, 0.25)
    blocks = shuffled_blocks(position + rows, block_size)
    pools = [paged(cache[:, : position + rows], blocks, block_size) for cache in (keys, values)]
    table = torch.tensor([*blocks, 2**30, -(2**30)], dtype=torch.int32, device=device)
    assert torch.equal(attend(q, *pools, position, 0.25, block_table=table), wanted)
    # one in a pool of another order of dimensions, beside something else
    for index in (0, 1):
        others = list(pools)
        turned = pools[index].transpose(1, 2)
        others[index] = torch.stack((turned, torch.full_like(turned, NAN)), dim=1)[:, 0].transpose(1, 2)
        assert torch.equal(attend(q, *others, position, 0.25, block_table=table), wanted)


@pytest.mark.parametrize("rows", [1, 70])
def test_paged_reference(rows):
    q, keys, values = inputs(rows, 4, 2, 8, 41, spare=0)
    blocks = shuffled_blocks(41 + rows, 16)
    pools = [paged(cache, blocks, 16) for cache in (keys, values)]
    table = torch.tensor(blocks, dtype=torch.int32)
    wanted = reference(q, keys, values, 41, scale=0.3)
    assert torch.equal(reference(q, *pools, 41, scale=0.3, block_table=table), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["token major", "fused", "wide rows", "one token major"])
@pytest.mark.parametrize(("rows", "position"), [(1, 140), (5, 33)])
def test_kernel_strides(device, rows, position, layout, dtype):
    """A caller's own cache, queries that are a view of the fused projection: the same bits."""
    heads, kv_heads, head_dim = 4, 2, 16
    q, keys, values = on(device, dtype, inputs(rows, heads, kv_heads, head_dim, position))
    wanted = hold(q, keys, values, position, 0.25)
    if layout == "token major":
        keys, values = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in (keys, values))
    elif layout == "one token major":
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "fused":
        both = torch.stack((keys, values), dim=2)
        keys, values = both[:, :, 0], both[:, :, 1]
        fused = q.new_full((rows, heads + 2 * kv_heads, head_dim), NAN)
        fused[:, :heads] = q
        q = fused[:, :heads]
    else:
        keys, values = (torch.cat((part, torch.full_like(part, NAN)), dim=2)[..., :head_dim] for part in (keys, values))
        q = torch.cat((q, torch.full_like(q, NAN)), dim=2)[..., :head_dim]
    assert torch.equal(attend(q, keys, values, position, 0.25), wanted)


@pytest.mark.parametrize("position", [0, 77, 130])
def test_the_position_may_lie_on_the_device(device, position):
    """Wherever in a buffer: one binary."""
    q, keys, values = on(device, HALF, inputs(2, 4, 2, 16, position))
    wanted = attend(q, keys, values, position, 0.25)
    buffer = torch.tensor([9999, position, position, 9999], device=device)
    for first in (1, 2):
        assert torch.equal(attend(q, keys, values, buffer[first : first + 1], 0.25), wanted)
    assert buffer.tolist() == [9999, position, position, 9999]


@pytest.mark.usefixtures("guarded_workspaces")
@pytest.mark.parametrize("capacity", [64, 140, 256])
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_position_without_room_reads_nothing_beyond_the_cache(device, capacity, block_size):
    """The host refuses one that it knows; on the device, rows within the cache are right, whatever the others are."""
    q, keys, values = on(device, HALF, inputs(3, 2, 1, 16, capacity - 3, spare=40))
    keys[:, capacity:] = values[:, capacity:] = 6e4
    caches, settings = [keys[:, :capacity], values[:, :capacity]], {}
    wanted = {position: attend(q[:1], *caches, position, 0.25) for position in (capacity - 1, 0)}
    second = attend(q[1:2], *caches, 0, 0.25)
    if block_size:
        blocks = shuffled_blocks(capacity, block_size)
        caches = [paged(cache, blocks, block_size) for cache in caches]
        settings["block_table"] = torch.tensor([*blocks, 0, 0], dtype=torch.int32, device=device)[: len(blocks)]
    beyond = attend(q, *caches, torch.tensor([capacity - 1], device=device), 0.25, **settings)
    assert torch.equal(beyond[:1], wanted[capacity - 1])
    assert (beyond.abs() < 10).all()
    for attention, wanted in ((kernel, second), (reference, reference(q[1:2], *caches, 0, scale=0.25, **settings))):
        before = attention(q[:2], *caches, torch.tensor([-1], device=device), scale=0.25, **settings)
        assert torch.equal(before[1:], wanted)
        assert (before[0] == 0).all()
    for position in (-1, capacity - 2, capacity):
        with pytest.raises(ValueError, match=f"position {position} with 3 rows"):
            kernel(q, *caches, position, scale=0.25, **settings)


@pytest.mark.parametrize("spare", [5, 200])
@pytest.mark.parametrize("attention", [reference, kernel], ids=["reference", "kernel"])
def test_the_flag(device, attention, spare):
    """0: nothing is done. 1: the bits of a call without one."""
    q, keys, values = on(device, torch.float32, inputs(3, 4, 2, 16, 20, spare))
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.full((3, 64), 7.0, device=device)
    assert attention(q, keys, values, 20, scale=0.25, active=flag, out=out).data_ptr() == out.data_ptr()
    assert (out == 7).all()
    assert attention(q, keys, values, 20, scale=0.25, active=flag).shape == (3, 64)
    flag.fill_(1)
    wanted = attention(q, keys, values, 20, scale=0.25)
    assert torch.equal(attention(q, keys, values, 20, scale=0.25, active=flag, out=out), wanted)
    assert torch.equal(out, wanted)
    assert flag.tolist() == [1]


@pytest.mark.parametrize("spare", [5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_nothing_beyond_the_last_row_is_read(device, rows, dtype, spare):
    position = 40
    q, keys, values = on(device, dtype, inputs(rows, 2, 1, 16, position, spare))
    wanted = hold(q, keys, values, position, 0.25)
    for spoil in (INFINITY, 1e4, 0.0):
        keys[:, position + rows :] = values[:, position + rows :] = spoil
        assert torch.equal(attend(q, keys, values, position, 0.25), wanted)


@NANS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [29, 125])
def test_no_row_sees_those_after_it(device, position, dtype):
    """Whatever their tokens leave in the cache, and even NaN in their queries and keys."""
    q, keys, values = on(device, dtype, inputs(6, 4, 2, 16, position))
    wanted = hold(q, keys, values, position, 0.25)
    generator = torch.Generator().manual_seed(1)
    for row in range(1, 6):
        others = [part.clone() for part in (q, keys, values)]
        others[0][row:] = NAN
        others[1][:, position + row :] = NAN
        others[2][:, position + row :] = 100 * torch.randn(2, 11 - row, 16, generator=generator).to(values)
        found = attend(*others, position, 0.25)
        assert torch.equal(found[:row], wanted[:row])
        assert found[row:].isnan().all()


@NANS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_head_and_row(device, dtype):
    q, keys, values = on(device, dtype, inputs(5, 6, 2, 16, 37))
    wanted = attend(q, keys, values, 37, 0.25).view(5, 6, 16)
    q[2, 4, 3] = NAN
    found = attend(q, keys, values, 37, 0.25).view(5, 6, 16)
    assert found[2, 4].isnan().all()
    found[2, 4] = wanted[2, 4]
    assert torch.equal(found, wanted)


def given_scores(scores: Tensor, spare: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows and heads that score the positions so, exactly: of queries and keys one element alone is not 0."""
    q, keys, values = inputs(2, 2, 1, 16, len(scores) - 2, spare)
    q.zero_()[..., 0] = 32.0
    keys[:, : len(scores)] = 0.0
    keys[:, : len(scores), 0] = scores / 32.0
    return q, keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spare", [0, 200])
@pytest.mark.parametrize("level", [-4096.0, -128.0, 128.0, 4096.0])
def test_softmax_of_large_scores(device, level, spare, dtype):
    """Every score lies far from 0: a sum of bare exponentials would be 0 or infinite."""
    q, keys, values = on(device, dtype, given_scores(torch.full((138,), level), spare))
    hold(q, keys, values, 136, 1.0)


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_score_may_come_first_or_last(device, rising):
    """The running maximum moves in every tile and every split, or never again: what was summed is scaled down."""
    steps = torch.arange(400) // 16.0
    q, keys, values = on(device, torch.float32, given_scores(steps if rising else steps.flip(0), spare=3))
    for scale in (math.log(2), 16 * math.log(2)):  # powers of two, exactly
        hold(q, keys, values, 398, scale)


def test_scores_that_underflow(device):
    """A position whose share is below the smallest float has none, and harms nothing."""
    q, keys, values = on(device, torch.float32, inputs(1, 1, 1, 16, 299, spare=0))
    q[:], keys[:] = 1.0, -1000.0
    keys[:, 130] = 1000.0
    assert torch.equal(attend(q, keys, values, 299, 0.25)[0], values[0, 130])


def neighbourhoods(device, dtype, heads, kv_heads, head_dim, position, passes, **settings):
    """Hold a row's bits in passes of ``(rows, place)`` beside random rows against those of the row alone."""
    generator = torch.Generator().manual_seed(position)
    capacity = position + 16
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    own, keys, values = draw(1, heads, head_dim), draw(kv_heads, capacity, head_dim), draw(kv_heads, capacity, head_dim)
    alone = attend(own, keys, values, position, head_dim**-0.5)
    for rows, place in passes:
        if place > position:
            continue
        q = draw(rows, heads, head_dim)
        q[place] = own
        keys[:, position + 1 :], values[:, position + 1 :] = draw(kv_heads, 15, head_dim), draw(kv_heads, 15, head_dim)
        found = attend(q, keys, values, position - place, head_dim**-0.5, **settings)
        assert torch.equal(found[place : place + 1], alone), (rows, place)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("position", [30, 127, 135])
def test_a_rows_bits_do_not_depend_on_its_pass(device, position, dtype):
    """Nor on tiles and splits that others look at, and it does not."""
    passes = [(2, 1), (5, 3), (9, 0), (16, 7), (16, 15)]
    neighbourhoods(device, dtype, 2, 1, 16, position, passes)


ALL_PASSES = [(rows, place) for rows in range(1, 17) for place in range(rows)]
REAL = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 128), (32, 8, 64)])
REAL_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])


@pytest.mark.gpu
@REAL_DTYPES
@REAL
@pytest.mark.parametrize("position", [0, 14, 126, 127, 128, 135, 1000, 4095, 4096, 4103, 4352, 16_384, 17_410])
def test_a_rows_bits_on_a_gpu(device, position, heads, kv_heads, head_dim, dtype):
    neighbourhoods(device, dtype, heads, kv_heads, head_dim, position, ALL_PASSES)


@pytest.mark.gpu
@REAL_DTYPES
@REAL
@pytest.mark.parametrize("position", [0, 100, 120, 2000, 4090, 4350, 16_378])
def test_a_verify_pass_has_the_bits_of_drafting_passes(device, position, heads, kv_heads, head_dim, dtype):
    """Plain and paged, with a flag and without, with the tightest bound and the widest."""
    q, keys, values = on(device, dtype, inputs(16, heads, kv_heads, head_dim, position, spare=300))
    scale = head_dim**-0.5
    single = [attend(q[row : row + 1], keys, values, position + row, scale) for row in range(16)]
    flag = torch.ones(1, dtype=torch.int32, device=device)
    for rows in range(1, 17):
        settings = [{}, {"max_length": position + rows}, {"active": flag}]
        for setting in settings:
            found = attend(q[:rows], keys, values, position, scale, **setting)
            assert torch.equal(found, torch.cat(single[:rows])), (rows, setting)
    for block_size in (16, 64, 256):
        blocks = shuffled_blocks(position + 16, block_size)
        pools = [paged(cache[:, : position + 16], blocks, block_size) for cache in (keys, values)]
        table = torch.tensor(blocks, dtype=torch.int32, device=device)
        for rows in (1, 5, 16):
            found = attend(q[:rows], *pools, position, scale, block_table=table)
            assert torch.equal(found, torch.cat(single[:rows])), (block_size, rows)


@pytest.mark.gpu
@REAL
def test_real_shapes(device, heads, kv_heads, head_dim):
    for position in (0, 1000, 5000):
        q, keys, values = on(device, torch.bfloat16, inputs(4, heads, kv_heads, head_dim, position))
        hold(q, keys, values, position, head_dim**-0.5)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_31_elements(device):
    """The second head lies that far from the first; the values lie behind the keys."""
    if torch.cuda.mem_get_info(device)[0] < 5 * 2**30:
        pytest.skip("needs 5 GiB of GPU memory")
    q, keys, values = on(device, HALF, inputs(3, 4, 2, 64, 150, spare=0))
    wanted = attend(q, keys, values, 150, 0.125)
    stride, size = 2**31 + 64, 153 * 64
    buffer = torch.empty(stride + 2 * size, dtype=HALF, device=device)
    far = [buffer.as_strided((2, 153, 64), (stride, 64, 1), first) for first in (0, size)]
    for cache, part in zip(far, (keys, values), strict=True):
        cache.copy_(part)
    assert torch.equal(attend(q, *far, 150, 0.125), wanted)


def test_arguments_that_do_not_fit(device):
    q, keys, values = on(device, torch.float32, inputs(2, 4, 2, 16, 3))
    table = torch.zeros(2, dtype=torch.int32, device=device)
    pool = keys[None, :, :4]
    wide = torch.zeros(2, 4, 32, device=device)
    for error, message, parts, settings in [
        (ValueError, "1 to 16 rows, got 17", (q.repeat(9, 1, 1)[:17], keys, values), {}),
        (ValueError, "1 to 16 rows, got 0", (q[:0], keys, values), {}),
        (ValueError, r"^attention: q is \[2, 64\]; it must be \[M, H, D\]\.$", (q.flatten(1), keys, values), {}),
        (ValueError, r"^attention: q is \[\]; it must be \[M, H, D\]\.$", (q[0, 0, 0], keys, values), {}),
        (ValueError, "multiple of H_kv", (q[:, :0], keys, values), {}),
        (ValueError, "multiple of H_kv", (q, keys[:0], values[:0]), {}),
        (TypeError, "float32, float16 or bfloat16", (q.double(), keys.double(), values.double()), {}),
        (TypeError, "must agree", (q, keys.half(), values), {}),
        (TypeError, "must agree", (q, keys, values.half()), {}),
        (ValueError, "multiple of H_kv", (q[:, :3], keys, values), {}),
        (ValueError, "multiple of H_kv", (q, keys, values[:, :-1]), {}),
        (ValueError, "multiple of H_kv", (q[..., :8], keys, values), {}),
        (ValueError, "last stride 1", (wide[..., ::2], keys, values), {}),
        (ValueError, "stride 2 along its last", (q, torch.cat((keys, keys), 2)[..., ::2], values), {}),
        (ValueError, "stride 2 along its last", (q, keys, torch.cat((values, values), 2)[..., ::2]), {}),
        (ValueError, "without a block table", (q, pool, pool), {}),
        (ValueError, "with a block table", (q, keys, values), {"block_table": table}),
        (TypeError, "row of int32", (q, pool, pool), {"block_table": table.long()}),
        (TypeError, "row of int32", (q, pool, pool), {"block_table": table[None]}),
        (TypeError, "row of int32", (q, pool, pool), {"block_table": table.repeat(2)[::2]}),
        (ValueError, "out is", (q, keys, values), {"out": torch.zeros(2, 63, device=device)}),
        (ValueError, "out is", (q, keys, values), {"out": torch.zeros(2, 64, device=device).half()}),
        (ValueError, "out is", (q, keys, values), {"out": torch.zeros(2, 128, device=device)[:, ::2]}),
    ]:
        with pytest.raises(error, match=message):
            kernel(*parts, 3, scale=0.25, **settings)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernel(*inputs(1, 2, 2, 16, 3), 3, scale=0.25)
