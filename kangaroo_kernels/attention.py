"""``attention`` in Triton: M query rows over the KV cache, split along the positions, causal among the rows in flight.

Two kernels. ``attention_kernel``: a program owns one split of the cache of one key-value head for up to 64 packed query
rows (row ``m * GROUP + g`` is query head g of the group at token m), and leaves an unnormalised sum with its maximum
and its denominator. ``attention_reduce_kernel``: a program owns one head of one token and merges the splits in order.
(Split-KV decoding is Flash-Decoding's, the running softmax that of FlashAttention, arXiv 2205.14135.)

Splits lie at absolute positions: short ones first, so that a short context fills the card, longer ones later, so that
the partial sums stay small beside the cache. Where every position is in the first split, that one writes the result
itself and the second kernel is not launched. Bytes moved: ``2 * H_kv * (position + M) * D`` elements, once for every 64
packed rows, and the partial sums, ``8 * M * H * (D + 2)`` bytes a split.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.shared.cache_layout import cache_layout, row_offsets
from kangaroo_kernels.shared.chain import chain, follow
from kangaroo_kernels.shared.checks import check_max_length
from kangaroo_kernels.shared.launch import check_flag, check_out, check_position, check_rows, device_scalar

# Where the splits lie is part of the contract (docs/kernels.md) and never tuned.
SHORT = tl.constexpr(128)
SHORT_SPLITS = tl.constexpr(32)
MIDDLE = tl.constexpr(256)
MIDDLE_SPLITS = tl.constexpr(48)
LONG = tl.constexpr(1024)
MERGED = tl.constexpr(8)
"""Splits that the reduction takes at a time; fewer than packed rows, lest the compiler lay both alike in draft_loop."""

MAX_PACKED_ROWS = {2: 64, 4: 16}
TILE = {2: 64, 4: 32}
"""KV positions a tile, by the bytes of an element; float32 is multiplied in registers. Part of the contract, too."""


def count_splits(length: int) -> int:
    """How many splits the first ``length`` positions take."""
    short: int = SHORT.value * SHORT_SPLITS.value
    middle: int = MIDDLE.value * MIDDLE_SPLITS.value
    count: int = triton.cdiv(min(length, short), SHORT.value)
    count += triton.cdiv(max(0, min(length - short, middle)), MIDDLE.value)
    count += triton.cdiv(max(0, length - short - middle), LONG.value)
    return count


@triton.jit
def count_splits_of(length):
    """``count_splits`` on the device."""
    short = tl.minimum(length, SHORT * SHORT_SPLITS)
    middle = tl.minimum(tl.maximum(length - SHORT * SHORT_SPLITS, 0), MIDDLE * MIDDLE_SPLITS)
    long = tl.maximum(length - SHORT * SHORT_SPLITS - MIDDLE * MIDDLE_SPLITS, 0)
    return tl.cdiv(short, SHORT) + tl.cdiv(middle, MIDDLE) + tl.cdiv(long, LONG)


@triton.jit
def first_position(split):
    """Where a split begins."""
    short = tl.minimum(split, SHORT_SPLITS)
    middle = tl.minimum(tl.maximum(split - SHORT_SPLITS, 0), MIDDLE_SPLITS)
    long = tl.maximum(split - SHORT_SPLITS - MIDDLE_SPLITS, 0)
    return short * SHORT + middle * MIDDLE + long * LONG


@triton.jit
def seen_or_one(denominator):
    """1 for a row that sees nothing, before the first position: its result is 0, not NaN."""
    return tl.where(denominator > 0.0, denominator, 1.0)


@triton.jit
def attention_split(
    split,
    kv_head,
    block,
    start,
    length,
    position,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    sums_ptr,
    stats_ptr,
    out_ptr,
    M,
    H,
    scale,
    q_row_stride,
    q_head_stride,
    k_block_stride,
    k_head_stride,
    k_row_stride,
    v_block_stride,
    v_head_stride,
    v_row_stride,
    out_row_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A split, from ``start`` on, for packed rows ``block * BLOCK_R ..`` of ``kv_head``; arguments as for the kernel.

    ``STAGES`` of the software pipeline; None leaves them to the launch.
    """
    packed = block * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, heads = packed // GROUP, kv_head * GROUP + packed % GROUP
    row_mask = rows < M
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    q_ptrs = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=row_mask[:, None] & dim_mask[None, :], other=0.0, cache_modifier=".cg")
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_head_stride
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_head_stride

    best = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    denominator = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in tl.range(start, tl.minimum(first_position(split + 1), length), BLOCK_T, num_stages=STAGES):
        positions = first + tl.arange(0, BLOCK_T)
        written = positions < length  # beyond lies whatever was there: 0 * NaN is NaN
        mask = written[:, None] & dim_mask[None, :]
        k_rows = row_offsets(positions, written, table_ptr, k_block_stride, k_row_stride, BLOCK_SIZE)
        k_ptrs = k_head_ptr + k_rows[:, None] + dims[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = positions[None, :] <= position + rows[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        # a row that has seen nothing yet stays exactly as it is: powers of -inf, not NaN
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(best - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        v_rows = row_offsets(positions, written, table_ptr, v_block_stride, v_row_stride, BLOCK_SIZE)
        v_ptrs = v_head_ptr + v_rows[:, None] + dims[None, :]
        v = tl.load(v_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        denominator = denominator * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = higher

    mask = row_mask[:, None] & dim_mask[None, :]
    if WHOLE:
        out = acc / seen_or_one(denominator)[:, None]
        out_ptrs = out_ptr + rows[:, None] * out_row_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slots = (split * M + rows).to(tl.int64) * H + heads
        tl.store(sums_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(stats_ptr + slots * 2, best, mask=row_mask)
        tl.store(stats_ptr + slots * 2 + 1, denominator, mask=row_mask)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["position_ptr", "active_ptr"])
def attention_kernel(
    q_ptr,  # [M, H, D]
    k_ptr,  # [H_kv, T, D] or [blocks, H_kv, block_size, D]
    v_ptr,  # likewise
    table_ptr,  # [T / block_size] int32 or None
    position_ptr,  # [1] int64
    active_ptr,  # [1] int32 or None
    sums_ptr,  # [splits, M, H, D] float32
    stats_ptr,  # [splits, M, H, 2] float32: maximum (of base-2 scores), denominator
    out_ptr,  # [M, H * D]
    M,
    H,
    T,  # positions that the cache holds
    scale,  # times log2(e): the exponentials are powers of two
    q_row_stride,
    q_head_stride,
    k_block_stride,
    k_head_stride,
    k_row_stride,
    v_block_stride,
    v_head_stride,
    v_row_stride,
    out_row_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns ``BLOCK_R`` packed rows of one key-value head, over one split of the positions."""
    follow(CHAINED)
    if active_ptr is not None:
        if tl.load(active_ptr) == 0:
            return
    position = tl.load(position_ptr).to(tl.int32)
    length = tl.minimum(position + M, T)
    split = tl.num_programs(2) - 1 - tl.program_id(2)  # the long splits first
    start = first_position(split)
    if start >= length:
        return
    attention_split(
        split,
        tl.program_id(1),
        tl.program_id(0),
        start,
        length,
        position,
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        sums_ptr,
        stats_ptr,
        out_ptr,
        M,
        H,
        scale,
        q_row_stride,
        q_head_stride,
        k_block_stride,
        k_head_stride,
        k_row_stride,
        v_block_stride,
        v_head_stride,
        v_row_stride,
        out_row_stride,
        GROUP,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_R,
        BLOCK_T,
        BLOCK_SIZE,
        WHOLE,
        None,
    )


@triton.jit
def attention_merge(
    row,
    head,
    position,
    sums_ptr,
    stats_ptr,
    out_ptr,
    M,
    H,
    SPLITS,
    out_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of a head of a token; arguments as for the kernel."""
    splits = tl.minimum(count_splits_of(position + row + 1), SPLITS)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    best = tl.full((), float("-inf"), dtype=tl.float32)
    denominator = tl.zeros((), dtype=tl.float32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, splits, MERGED):
        offs = first + tl.arange(0, MERGED)
        there = offs < splits
        slots = (offs * M + row).to(tl.int64) * H + head
        tops = tl.load(stats_ptr + slots * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        parts = tl.load(stats_ptr + slots * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        sums_mask = there[:, None] & dim_mask[None, :]
        sums_ptrs = sums_ptr + slots[:, None] * HEAD_DIM + dims[None, :]
        sums = tl.load(sums_ptrs, mask=sums_mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, tl.max(tops, axis=0))  # finite: there is a split only for a row that sees position 0
        fade, shares = tl.exp2(best - higher), tl.exp2(tops - higher)
        denominator = denominator * fade + tl.sum(parts * shares, axis=0)
        acc = acc * fade + tl.sum(sums * shares[:, None], axis=0)
        best = higher
    out_ptrs = out_ptr + row * out_row_stride + head * HEAD_DIM + dims
    tl.store(out_ptrs, (acc / seen_or_one(denominator)).to(out_ptr.dtype.element_ty), mask=dim_mask)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["position_ptr", "active_ptr"])
def attention_reduce_kernel(
    sums_ptr,  # [splits, M, H, D] float32
    stats_ptr,  # [splits, M, H, 2] float32
    position_ptr,  # [1] int64
    active_ptr,  # [1] int32 or None
    out_ptr,  # [M, H * D]
    M,
    H,
    SPLITS,
    out_row_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns one head of one token; splits are merged ``MERGED`` at a time, in the order of positions."""
    follow(CHAINED)
    if active_ptr is not None:
        if tl.load(active_ptr) == 0:
            return
    attention_merge(
        tl.program_id(1),
        tl.program_id(0),
        tl.load(position_ptr).to(tl.int32),
        sums_ptr,
        stats_ptr,
        out_ptr,
        M,
        H,
        SPLITS,
        out_row_stride,
        HEAD_DIM,
        BLOCK_D,
    )


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    block_table: Tensor | None = None,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from M rows to the cache; arguments and result as for ``reference.attention``.

    ``max_length`` bounds ``position + M`` (the caches' capacity if None): programs are launched for so many positions,
    and return at once where the text is shorter.
    """
    if q.ndim != 3:
        raise ValueError(f"attention: q is {list(q.shape)}; it must be [M, H, D].")
    check_rows("attention", q)
    check_flag("attention", active, q.device)
    keys = cache_layout("attention", k_cache, block_table, q)
    values = cache_layout("attention", v_cache, block_table, q)
    rows, heads, head_dim = q.shape
    group, left = divmod(heads, max(1, keys.kv_heads))
    no_heads = not heads or not keys.kv_heads
    if no_heads or left or k_cache.shape != v_cache.shape or k_cache.shape[-1] != head_dim or q.stride(2) != 1:
        raise ValueError(
            f"attention: q is {list(q.shape)}, last stride {q.stride(2)}, the caches {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}; they must be [M, H, D], last stride 1, and two caches of H_kv heads of size D, "
            "H a multiple of H_kv."
        )
    out = check_out("attention", out, (rows, heads * head_dim), q)
    check_position("attention", position, rows, keys.capacity, q.device)
    check_max_length(max_length, position, rows)
    splits = count_splits(keys.capacity if max_length is None else min(max_length, keys.capacity))
    whole = splits == 1
    sums = stats = None
    if not whole:
        sums = torch.empty((splits, rows, heads, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((splits, rows, heads, 2), dtype=torch.float32, device=q.device)
    where = device_scalar(position, q.device)
    block_rows = min(MAX_PACKED_ROWS[q.element_size()], triton.next_power_of_2(MAX_ROWS * group))
    block_d = max(16, triton.next_power_of_2(head_dim))
    # a block table is loaded a stage ahead of what it points to
    config = launch_config("attention" if block_table is None else "attention_paged", head_dim, block_rows, q)
    attention_kernel[(triton.cdiv(rows * group, block_rows), keys.kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        where,
        active,
        sums,
        stats,
        out,
        rows,
        heads,
        keys.capacity,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        keys.block_stride,
        keys.head_stride,
        keys.row_stride,
        values.block_stride,
        values.head_stride,
        values.row_stride,
        out.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_R=block_rows,
        BLOCK_T=TILE[q.element_size()],
        BLOCK_SIZE=keys.block_size,
        WHOLE=whole,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **chain(q),
    )
    if not whole:
        attention_reduce_kernel[(heads, rows)](
            sums,
            stats,
            where,
            active,
            out,
            rows,
            heads,
            splits,
            out.stride(0),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            num_warps=4,
            **chain(q),
        )
    return out
