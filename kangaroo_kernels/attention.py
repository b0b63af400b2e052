"""``attention`` in Triton: M query rows over the KV cache, split along the positions, causal among the rows in flight.

A program owns one split of the cache of one key-value head for up to 64 packed query rows (row ``m * GROUP + g`` is
query head g of the group at token m), and leaves an unnormalised sum with its maximum and its denominator. The last
program to arrive at a block of packed rows merges its splits in order; where rows and splits are many, a second launch
does (``shared/merge_splits.py``). (Split-KV decoding is Flash-Decoding's, the running softmax that of FlashAttention,
arXiv 2205.14135; that the last program to arrive finishes the work is CUDA's ``threadFenceReduction`` sample.)

Splits lie at absolute positions: short ones first, so that a short context fills the card, longer ones later, so that
the partial sums stay small beside the cache. Where every position is in the first split, that one writes the result
itself and nobody counts. Bytes moved: ``2 * H_kv * (position + M) * D`` elements, once for every 64 packed rows, and
the partial sums, ``8 * M * H * (D + 2)`` bytes a split.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.shared.attend import TILE_BYTES, attend, attend_to_a_tree
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.cache_layout import CacheLayout, cache_layout
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_ancestors, check_max_length
from kangaroo_kernels.shared.grid import is_last
from kangaroo_kernels.shared.launch import (
    check_flag,
    check_out,
    check_position,
    check_rows,
    device_count,
    launch_options,
)
from kangaroo_kernels.shared.merge_splits import attention_merge, merge_splits, merges_apart, seen_or_one
from kangaroo_kernels.shared.operands import Cache, Caches, Heads, Parts, Queries, Work
from kangaroo_kernels.shared.splits import count_splits, count_splits_of, first_position
from kangaroo_kernels.shared.tiles import elements, skipped

MAX_PACKED_ROWS = {2: 64, 4: 16}
"""The most packed rows of a tile, by the bytes of an element; float32, multiplied in registers, has fewer. Part of the
contract (docs/kernels.md)."""


@triton.jit
def attention_split(work, position, q, scale, caches, parts, heads, STAGES: tl.constexpr):
    """A split of a key-value head's positions for a block of packed rows; ``position`` is the first row's.

    ``scale`` includes the factor log2(e). ``STAGES`` is the software pipeline's depth; None leaves it to the launch.
    """
    GROUP: tl.constexpr = heads.GROUP
    HEAD_DIM: tl.constexpr = heads.DIM
    BLOCK_D: tl.constexpr = heads.BLOCK_D
    BLOCK_R: tl.constexpr = heads.BLOCK_R
    BLOCK_T: tl.constexpr = elements(TILE_BYTES, q.ptr)
    split, kv_head, keys, values, M = work.split, work.kv_head, caches.k, caches.v, q.rows
    length = tl.minimum(position + M, caches.positions)
    packed = work.block * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, query_heads = packed // GROUP, kv_head * GROUP + packed % GROUP
    row_mask = rows < M
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    q_ptrs = q.ptr + rows[:, None] * q.row_stride + query_heads[:, None] * q.head_stride + dims[None, :]
    queries = tl.load(q_ptrs, mask=row_mask[:, None] & dim_mask[None, :], other=0.0, cache_modifier=".cg")
    k_head_ptr = keys.ptr + kv_head.to(tl.int64) * keys.head_stride
    v_head_ptr = values.ptr + kv_head.to(tl.int64) * values.head_stride

    best = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    denominator = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    if q.ancestors_ptr is None:
        for first in tl.range(work.start, tl.minimum(first_position(split + 1), length), BLOCK_T, num_stages=STAGES):
            positions = first + tl.arange(0, BLOCK_T)
            tile = positions, positions, positions < length
            best, denominator, acc = attend(
                tile,
                (position, rows),
                queries,
                scale,
                (k_head_ptr, v_head_ptr),
                caches,
                (dims, dim_mask),
                (best, denominator, acc),
            )
    else:
        best, denominator, acc = attend_to_a_tree(
            (work.start, tl.minimum(first_position(split + 1), length), length),
            (position, rows, M),
            q.ancestors_ptr,
            (queries, scale),
            (k_head_ptr, v_head_ptr),
            caches,
            (dims, dim_mask),
            (best, denominator, acc),
            BLOCK_T,
            STAGES,
        )

    mask = row_mask[:, None] & dim_mask[None, :]
    if parts.sums_ptr is None:
        out = acc / seen_or_one(denominator)[:, None]
        out_ptrs = (
            parts.out_ptr + rows[:, None] * parts.out_row_stride + query_heads[:, None] * HEAD_DIM + dims[None, :]
        )
        tl.store(out_ptrs, out.to(parts.out_ptr.dtype.element_ty), mask=mask)
    else:
        slots = (split * M + rows).to(tl.int64) * q.heads + query_heads
        tl.store(parts.sums_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(parts.stats_ptr + slots * 2, best, mask=row_mask)
        tl.store(parts.stats_ptr + slots * 2 + 1, denominator, mask=row_mask)


@triton.jit
def attention_tile(work, position, splits, merges, q, scale, caches, parts, heads, STAGES: tl.constexpr):
    """A split of a block of packed rows, of ``splits``; where one ``merges``, the last of them to arrive does."""
    attention_split(work, position, q, scale, caches, parts, heads, STAGES)
    if parts.sums_ptr is not None:
        if merges:
            if is_last(parts.arrivals_ptr + work.block * caches.heads + work.kv_head, splits):
                attention_merge(work, position, splits, q, parts, heads, None)


@stable_key
@triton.jit(
    do_not_specialize=["M", "merges"],
    do_not_specialize_on_alignment=["position_ptr", "ancestors_ptr", "active_ptr", "arrivals_ptr"],
)
def attention_kernel(
    q_ptr,  # [M, H, D]
    k_ptr,  # [H_kv, T, D] or [blocks, H_kv, block_size, D]
    v_ptr,  # as k_ptr
    table_ptr,  # [T / block_size] int32 or None
    position_ptr,  # [1] int64
    ancestors_ptr,  # [M] int32 or None
    active_ptr,  # [1] int32 or None
    sums_ptr,  # [splits, M, H, D] float32
    stats_ptr,  # [splits, M, H, 2] float32: maximum (of base-2 scores), denominator
    arrivals_ptr,  # [H] int32, all 0 before and after; None where there is one split, as for sums and stats
    out_ptr,  # [M, H * D]
    M,
    H,
    T,  # positions that the cache holds
    merges,  # 1 where the last program to arrive merges the splits, 0 where a launch of its own does
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
    BLOCK_SIZE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns ``BLOCK_R`` packed rows of one key-value head, over one split of the positions."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    position = tl.load(position_ptr).to(tl.int32)
    length = tl.minimum(position + M, T)
    splits = tl.maximum(tl.minimum(count_splits_of(length), tl.num_programs(2)), 1)
    split = tl.num_programs(2) - 1 - tl.program_id(2)  # the long splits first
    if split >= splits:
        return
    keys = Cache(k_ptr, k_block_stride, k_head_stride, k_row_stride)
    values = Cache(v_ptr, v_block_stride, v_head_stride, v_row_stride)
    attention_tile(
        Work(split, tl.program_id(1), tl.program_id(0), first_position(split)),
        position,
        splits,
        merges,
        Queries(q_ptr, M, H, q_row_stride, q_head_stride, ancestors_ptr),
        scale,
        Caches(keys, values, table_ptr, tl.num_programs(1), T, BLOCK_SIZE),
        Parts(sums_ptr, stats_ptr, arrivals_ptr, out_ptr, out_row_stride),
        Heads(GROUP, HEAD_DIM, BLOCK_D, BLOCK_R),
        None,
    )


def query_tile(group: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """Packed rows and columns of the queries' tile, for ``group`` query heads of ``head_dim`` per key-value head."""
    rows = min(MAX_PACKED_ROWS[itemsize], triton.next_power_of_2(MAX_ROWS * group))
    return int(rows), int(max(16, triton.next_power_of_2(head_dim)))


def check_heads(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None
) -> tuple[CacheLayout, CacheLayout]:
    """The layouts of keys and values; raises unless they and the queries fit each other."""
    if q.ndim != 3:
        raise ValueError(f"attention: q is {list(q.shape)}; it must be [M, H, D].")
    check_rows("attention", q)
    keys = cache_layout("attention", k_cache, block_table, q)
    values = cache_layout("attention", v_cache, block_table, q)
    heads, head_dim = q.shape[1:]
    no_heads = not heads or not keys.kv_heads
    alike = k_cache.shape == v_cache.shape and k_cache.shape[-1] == head_dim
    if no_heads or heads % keys.kv_heads or not alike or q.stride(2) != 1:
        raise ValueError(
            f"attention: q is {list(q.shape)}, last stride {q.stride(2)}, the caches {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}; they must be [M, H, D], last stride 1, and two caches of H_kv heads of size D, "
            "H a multiple of H_kv."
        )
    return keys, values


def counters(arrivals: Tensor | None, heads: int, device: torch.device) -> Tensor:
    """The counters of a launch: one for each block of packed rows of each key-value head, of which there are at most H.

    Without the caller's own, new ones; filling them with 0 is a launch of its own.
    """
    if arrivals is None:
        return torch.zeros(heads, dtype=torch.int32, device=device)
    is_row = arrivals.ndim == 1 and len(arrivals) >= heads and arrivals.stride(0) == 1
    if not is_row or arrivals.dtype != torch.int32 or arrivals.device != device:
        raise TypeError(
            f"attention: arrivals is {list(arrivals.shape)} {arrivals.dtype} on {arrivals.device}; it must be one "
            f"contiguous row of at least {heads} zeros, int32 on {device}."
        )
    return arrivals


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    block_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    arrivals: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from M rows to the cache; arguments and result as for ``reference.attention``.

    ``max_length`` bounds ``position + M`` (the caches' capacity if None): programs are launched for this many
    positions, and those beyond the end of the text return at once.
    """
    keys, values = check_heads(q, k_cache, v_cache, block_table)
    check_flag("attention", active, q.device)
    rows, heads, head_dim = q.shape
    group = heads // keys.kv_heads
    out = check_out("attention", out, (rows, heads * head_dim), q)
    check_position("attention", position, rows, keys.capacity, q.device)
    check_max_length(max_length, position, rows)
    check_ancestors("attention", ancestors, rows, q.device)
    splits = count_splits(keys.capacity if max_length is None else min(max_length, keys.capacity))
    sizes = () if splits == 1 else ((splits, rows, heads, head_dim), (splits, rows, heads, 2))
    parts = [torch.empty(size, dtype=torch.float32, device=q.device) for size in sizes]
    sums, stats = parts or (None, None)
    where = device_count(position, q.device)
    block_rows, block_d = query_tile(group, head_dim, q.element_size())
    apart = bool(parts) and merges_apart(min(rows * group, block_rows), splits)
    # in a paged cache the pipeline loads block table entries a stage ahead of the rows that they point to
    config = launch_config("attention" if block_table is None else "attention_paged", head_dim, block_rows, q)
    attention_kernel[(triton.cdiv(rows * group, block_rows), keys.kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        where,
        ancestors,
        active,
        sums,
        stats,
        counters(arrivals, heads, q.device) if parts else None,
        out,
        rows,
        heads,
        keys.capacity,
        int(not apart),
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
        BLOCK_SIZE=keys.block_size,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # the limit is for the merge; what a tree needs for its paths is more
        maxnreg=(config.registers or None) if splits > 1 and ancestors is None else None,
        **launch_options(q),
    )
    if apart:
        merge_splits(where, active, out, keys.kv_heads, *parts)
    return out
