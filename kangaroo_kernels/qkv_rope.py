"""``qkv_rope`` in Triton: RMSNorm, the QKV projection, RoPE, and the append of K and V to the cache.

A program owns ``BLOCK_N`` columns of the packed projection, whatever mix of q, k and v they are. The two halves of a
rotated pair are adjacent columns (``interleave_rope``), so they are in one tile, in one thread even. Bytes moved:
``K * (H + 2 * H_kv) * D`` elements of weight, once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.shared.ancestors import count_bits, rows_ahead
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.cache_layout import cache_layout, row_offsets
from kangaroo_kernels.shared.chain import fetch_ahead, follow
from kangaroo_kernels.shared.checks import check_ancestors
from kangaroo_kernels.shared.launch import (
    aligned_rows,
    check_operands,
    check_out,
    check_position,
    device_count,
    launch_options,
    weight_and_bias,
)
from kangaroo_kernels.shared.operands import Cache, Caches, Linear, Matrix, Norm, Queries
from kangaroo_kernels.shared.tiles import BLOCK_M, add_bias, norm_project, skipped


@triton.jit
def rounded(values, like_ptr):
    """Values in the type of ``like_ptr``'s elements. What overflows float16 is NaN, as in the reference.

    An infinite key could give a score of minus infinity, and its position would pass unseen.
    """
    result = values.to(like_ptr.dtype.element_ty)
    if like_ptr.dtype.element_ty == tl.float16:
        result = tl.where(tl.abs(result) == float("inf"), float("nan"), result).to(tl.float16)
    return result


@triton.jit
def qkv_rope_tile(tile, position, x, norm, w, phases_ptr, q, caches, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """All rows of columns ``tile * BLOCK_N ..`` of the packed q, k and v; ``position`` is the first row's.

    Rows of a tree are kept in slots that follow each other, but turned by their places in the text.
    """
    M, N, H, H_KV = x.rows, w.rows, q.heads, caches.heads
    first = tile * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    owned = tl.minimum(cols, N - 1)  # the last tile's columns beyond the end repeat the last one
    acc = norm_project(x, norm, w, owned, BLOCK_N)
    if w.bias_ptr is not None:
        acc = add_bias(acc, w.bias_ptr, cols, N)

    rows = tl.arange(0, BLOCK_M)
    positions = position + rows
    evens = first + 2 * tl.arange(0, BLOCK_N // 2)
    row_mask = (rows < M) & (positions >= 0) & (positions < caches.positions)
    is_turned = evens < (H + H_KV) * HEAD_DIM
    turned = row_mask[:, None] & is_turned[None, :]
    places = positions
    if q.ancestors_ptr is not None:
        root = position - rows_ahead(tl.load(q.ancestors_ptr))
        places = root + count_bits(tl.load(q.ancestors_ptr + rows, mask=rows < M, other=1)) - 1
    phase_ptrs = phases_ptr + places[:, None] * HEAD_DIM + (evens % HEAD_DIM)[None, :]
    cosine = tl.load(phase_ptrs, mask=turned, other=1.0)
    sine = tl.load(phase_ptrs + 1, mask=turned, other=0.0)
    even, odd = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    x_even, x_odd = tl.where(is_turned[None, :], even, 0.0), tl.where(is_turned[None, :], odd, 0.0)
    new_even = tl.where(is_turned[None, :], x_even * cosine - x_odd * sine, even)  # of v: inf * 0 would be NaN
    new_odd = tl.where(is_turned[None, :], x_even * sine + x_odd * cosine, odd)
    out = rounded(tl.reshape(tl.join(new_even, new_odd), (BLOCK_M, BLOCK_N)), q.ptr)

    q_mask = (rows[:, None] < M) & (cols[None, :] < H * HEAD_DIM)
    tl.store(q.ptr + rows[:, None] * q.row_stride + cols[None, :], out, mask=q_mask)
    heads, dims = cols // HEAD_DIM, cols % HEAD_DIM
    k_rows = row_offsets(positions, row_mask, caches.k, caches.table_ptr, caches.BLOCK_SIZE)
    k_cols = (heads - H).to(tl.int64) * caches.k.head_stride + dims
    is_key = (heads >= H) & (heads < H + H_KV)
    tl.store(caches.k.ptr + k_rows[:, None] + k_cols[None, :], out, mask=row_mask[:, None] & is_key[None, :])
    v_rows = row_offsets(positions, row_mask, caches.v, caches.table_ptr, caches.BLOCK_SIZE)
    v_cols = (heads - H - H_KV).to(tl.int64) * caches.v.head_stride + dims
    is_value = (heads >= H + H_KV) & (cols < N)
    tl.store(caches.v.ptr + v_rows[:, None] + v_cols[None, :], out, mask=row_mask[:, None] & is_value[None, :])


@stable_key
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["position_ptr", "ancestors_ptr", "active_ptr"])
def qkv_rope_kernel(
    x_ptr,  # [M, K]
    norm_ptr,  # [K]
    w_ptr,  # [(H + 2 * H_kv) * D, K]
    bias_ptr,  # [(H + 2 * H_kv) * D] or None
    phases_ptr,  # [T, D / 2, 2] float32: cosine, sine
    q_ptr,  # [M, H, D]
    k_ptr,  # [H_kv, T, D] or [blocks, H_kv, block_size, D]
    v_ptr,  # as k_ptr
    table_ptr,  # [T / block_size] int32 or None
    position_ptr,  # [1] int64
    ancestors_ptr,  # [M] int32 or None
    active_ptr,  # [1] int32 or None
    M,
    N,
    K,
    H,
    H_KV,
    T,  # positions that caches and phases hold; rows outside of them are not written
    x_row_stride,
    w_row_stride,
    q_row_stride,
    k_block_stride,
    k_head_stride,
    k_row_stride,
    v_block_stride,
    v_head_stride,
    v_row_stride,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns all rows of ``BLOCK_N`` columns of the packed q, k and v."""
    fetch_ahead(w_ptr, w_row_stride, N, K, active_ptr, BLOCK_N, CHAINED)
    follow(CHAINED)
    if skipped(active_ptr):
        return
    position = tl.load(position_ptr).to(tl.int32)  # early: it arrives while the weight streams
    keys = Cache(k_ptr, k_block_stride, k_head_stride, k_row_stride)
    values = Cache(v_ptr, v_block_stride, v_head_stride, v_row_stride)
    qkv_rope_tile(
        tl.program_id(0),
        position,
        Matrix(x_ptr, M, K, x_row_stride),
        Norm(norm_ptr, eps),
        Linear(w_ptr, bias_ptr, N, K, w_row_stride),
        phases_ptr,
        Queries(q_ptr, M, H, q_row_stride, HEAD_DIM, ancestors_ptr),
        Caches(keys, values, table_ptr, H_KV, T, BLOCK_SIZE),
        HEAD_DIM,
        BLOCK_N,
    )


def qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    eps: float,
    block_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project M tokens and append their keys and values; arguments and result as for ``reference.qkv_rope``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("qkv_rope", x, norm_weight, matrix, active)
    check_ancestors("qkv_rope", ancestors, x.shape[0], x.device)
    x = aligned_rows(x)
    keys = cache_layout("qkv_rope", k_cache, block_table, x)
    values = cache_layout("qkv_rope", v_cache, block_table, x)
    head_dim = k_cache.shape[-1]
    heads = matrix.shape[0] // max(1, head_dim) - 2 * keys.kv_heads
    no_heads = heads < 1 or keys.kv_heads < 1 or head_dim < 1
    if no_heads or matrix.shape[0] % head_dim or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"qkv_rope: the weight has {matrix.shape[0]} rows, the caches are {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}; they must be (H + 2 * H_kv) * D rows and two caches of H_kv heads of size D."
        )
    out = check_out("qkv_rope", out, (x.shape[0], heads, head_dim), x)
    if out.stride(1) != head_dim:
        raise ValueError(f"qkv_rope: out has stride {out.stride(1)} from head to head; it must be {head_dim}.")
    phases = phases_of("qkv_rope", table, head_dim)
    if phases.device != x.device:
        raise TypeError(f"qkv_rope: x is on {x.device}, the table on {phases.device}; they must agree.")
    room = min(keys.capacity, phases.shape[0])
    check_position("qkv_rope", position, x.shape[0], room, x.device)
    config = launch_config("qkv_rope", matrix.shape[0], matrix.shape[1], x)
    qkv_rope_kernel[(triton.cdiv(matrix.shape[0], config.block_n),)](
        x,
        norm_weight,
        matrix,
        bias,
        phases,
        out,
        k_cache,
        v_cache,
        block_table,
        device_count(position, x.device),
        ancestors,
        active,
        x.shape[0],
        matrix.shape[0],
        matrix.shape[1],
        heads,
        keys.kv_heads,
        room,
        x.stride(0),
        matrix.stride(0),
        out.stride(0),
        keys.block_stride,
        keys.head_stride,
        keys.row_stride,
        values.block_stride,
        values.head_stride,
        values.row_stride,
        eps,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=keys.block_size,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return out


def phases_of(op: str, table: Tensor, head_dim: int) -> Tensor:
    """The table of ``rope_table`` as ``[T, 1, D / 2, 2]`` float32."""
    phases = torch.view_as_real(table) if table.is_complex() else table
    if phases.shape[1:] != (1, head_dim // 2, 2) or phases.dtype != torch.float32 or not phases.is_contiguous():
        raise ValueError(f"{op}: the table is {list(table.shape)} {table.dtype}; make it with rope_table.")
    return phases
