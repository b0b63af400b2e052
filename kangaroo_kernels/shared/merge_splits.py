"""The splits of ``attention`` merged, one after the other in the order of positions, whichever program does it.

Where there is little to merge, the last program of ``attention`` to arrive does it. One program would take long over
many rows and many splits, so these have a launch of their own, with a program for every ``MERGED_ROWS`` packed rows of
a key-value head. Either way a row's arithmetic is the same. Bytes read, all of them from the L2:
``4 * M * H * (D + 2)`` a split.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.launch import launch_options
from kangaroo_kernels.shared.operands import Heads, Parts, Queries, Work
from kangaroo_kernels.shared.splits import count_splits_of
from kangaroo_kernels.shared.tiles import skipped

MERGED_ROWS, MERGED = tl.constexpr(4), tl.constexpr(8)
"""Packed rows that are merged at a time, and splits that are fetched at a time: 16 KB of parts at heads of 128."""

MOST_TURNS = 16
"""The most turns, of ``MERGED_ROWS`` rows and ``MERGED`` splits, by which a merge in one program may be longer than one
in many. A turn is about 500 instructions of each warp on sm_90, 0.3 us at 1.7 GHz if nothing waits; a launch in a graph
is taken for 3 us, as in ``tools/bandwidth_model.py``. Neither has been measured."""

STAGES_APART = tl.constexpr(3)
"""The pipeline's depth where a launch merges: two turns are under way while a third is added up."""


@triton.jit
def seen_or_one(denominator):
    """``denominator``, but 1 for a row that sees no position, as it lies before the first: its result is 0, not NaN."""
    return tl.where(denominator > 0.0, denominator, 1.0)


@triton.jit
def attention_merge(work, position, splits, q, parts, heads, STAGES: tl.constexpr):
    """Merge the first ``splits`` splits of a block of packed rows, each row those that it sees, one after the other.

    ``STAGES`` is the software pipeline's depth; None is none, where other programs of the launch wrote the parts: the
    pipeline copies the two numbers of a split through the L1.
    """
    GROUP: tl.constexpr = heads.GROUP
    HEAD_DIM: tl.constexpr = heads.DIM
    BLOCK_D: tl.constexpr = heads.BLOCK_D
    BLOCK_R: tl.constexpr = heads.BLOCK_R
    M = q.rows
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    filled = tl.minimum(M * GROUP - work.block * BLOCK_R, BLOCK_R)
    for first in tl.range(0, filled, MERGED_ROWS):
        packed = work.block * BLOCK_R + first + tl.arange(0, MERGED_ROWS)
        rows, query_heads = packed // GROUP, work.kv_head * GROUP + packed % GROUP
        row_mask = rows < M
        seen = tl.maximum(tl.minimum(count_splits_of(position + rows + 1), splits), 1)
        mask = row_mask[:, None] & dim_mask[None, :]
        best = tl.full((MERGED_ROWS,), float("-inf"), dtype=tl.float32)
        denominator = tl.zeros((MERGED_ROWS,), dtype=tl.float32)
        acc = tl.zeros((MERGED_ROWS, BLOCK_D), dtype=tl.float32)
        for start in tl.range(0, splits, MERGED, num_stages=STAGES):
            fetched = ()  # all loads are under way before the first is waited for; behind the end, the last part again
            for offset in tl.static_range(MERGED):
                slots = (tl.minimum(start + offset, seen - 1) * M + rows).to(tl.int64) * q.heads + query_heads
                top = tl.load(parts.stats_ptr + slots * 2, mask=row_mask, other=0.0, cache_modifier=".cg")
                weight = tl.load(parts.stats_ptr + slots * 2 + 1, mask=row_mask, other=0.0, cache_modifier=".cg")
                sums_ptrs = parts.sums_ptr + slots[:, None] * HEAD_DIM + dims[None, :]
                sums = tl.load(sums_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                fetched = fetched + ((top, weight, sums),)  # type: ignore  # noqa: RUF005 (not in Triton)
            for offset in tl.static_range(MERGED):
                top, weight, sums = fetched[offset]
                there = start + offset < seen  # a split that a row does not see changes none of its bits
                higher = tl.where(there, tl.maximum(best, top), best)
                pivot = tl.where(higher == float("-inf"), 0.0, higher)
                fade, share = tl.exp2(best - pivot), tl.exp2(top - pivot)
                denominator = tl.where(there, denominator * fade + weight * share, denominator)
                acc = tl.where(there[:, None], acc * fade[:, None] + sums * share[:, None], acc)
                best = higher
        out = acc / seen_or_one(denominator)[:, None]
        out_ptrs = (
            parts.out_ptr + rows[:, None] * parts.out_row_stride + query_heads[:, None] * HEAD_DIM + dims[None, :]
        )
        tl.store(out_ptrs, out.to(parts.out_ptr.dtype.element_ty), mask=mask)


@stable_key
@triton.jit(
    do_not_specialize=["M", "splits"],
    do_not_specialize_on_alignment=["position_ptr", "active_ptr"],
)
def attention_merge_kernel(
    sums_ptr,  # [splits, M, H, D] float32
    stats_ptr,  # [splits, M, H, 2] float32: maximum (of base-2 scores), denominator
    position_ptr,  # [1] int64
    active_ptr,  # [1] int32 or None
    out_ptr,  # [M, H * D]
    M,
    H,
    splits,  # that there is room for; a text may have fewer
    out_row_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns ``MERGED_ROWS`` packed rows of one key-value head."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    position = tl.load(position_ptr).to(tl.int32)
    attention_merge(
        Work(None, tl.program_id(1), tl.program_id(0), None),
        position,
        tl.maximum(tl.minimum(count_splits_of(position + M), splits), 1),
        Queries(None, M, H, None, None, None),
        Parts(sums_ptr, stats_ptr, None, out_ptr, out_row_stride),
        Heads(GROUP, HEAD_DIM, BLOCK_D, MERGED_ROWS),
        STAGES_APART,
    )


def merges_apart(packed_rows: int, splits: int) -> bool:
    """Whether ``packed_rows`` of a block over ``splits`` are too much for one program to merge."""
    programs = triton.cdiv(packed_rows, MERGED_ROWS.value)
    return bool((programs - 1) * triton.cdiv(splits, MERGED.value) > MOST_TURNS)


def merge_splits(
    position: Tensor, active: Tensor | None, out: Tensor, kv_heads: int, sums: Tensor, stats: Tensor
) -> None:
    """Launch the merge.

    Args:
        position: ``[1]`` int64, of the first row.
        active: a drafting step's flag, ``[1]`` int32, or None.
        out: ``[M, H * D]``, the result.
        kv_heads: H_kv.
        sums: ``[splits, M, H, D]`` float32, what the splits left; ``splits`` is how many there is room for.
        stats: ``[splits, M, H, 2]`` float32.
    """
    splits, rows, heads, head_dim = sums.shape
    group, block_d = heads // kv_heads, int(triton.next_power_of_2(head_dim))
    attention_merge_kernel[(triton.cdiv(rows * group, MERGED_ROWS.value), kv_heads)](
        sums,
        stats,
        position,
        active,
        out,
        rows,
        heads,
        splits,
        out.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        num_warps=max(1, block_d // 32),  # a thread has four elements of a row: copies of 16 bytes
        **launch_options(out),
    )
