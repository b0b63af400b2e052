"""What the projections share: a weight matrix streamed once past up to 16 rows.

    acc[m, n] = sum_k x[m, k] * W[n, k]            the operand of the sum is rounded to the weight's dtype
    with a norm: x[m, k] * g[k] takes the place of x[m, k], and the sum is multiplied by 1 / sqrt(mean(x[m]^2) + eps)

The norm's factor is taken out of the sum, so one pass reads ``x`` once and starts on the weight at once: nothing waits
for a reduction over the row. What the contract of ``docs/kernels.md`` asks of every projection is kept here: 16 rows
whatever M is (rows from M on are zero), K in steps of ``BLOCK_K`` from 0 upwards, one accumulator an output element.
"""

import triton
import triton.language as tl

from kangaroo_kernels.contract import MAX_ROWS

BLOCK_M = MAX_ROWS
"""Rows of every tile: all tokens in flight, and the least that the tensor cores take."""

K_STEP_BYTES = 512
"""Of one weight row in a step along K: 256 elements of 16 bits. Fixed, for the norm's sum of squares depends on it."""


@triton.jit
def multiply_add(acc, x, w):
    """``acc + x @ w^T`` for tiles ``x`` [BLOCK_M, BLOCK_K] and ``w`` [BLOCK_N, BLOCK_K]; float32 exactly so."""
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def load_rows(x_ptr, x_row_stride, k, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """``x[:, k : k + BLOCK_K]``, [BLOCK_M, BLOCK_K], zero outside of [M, K]."""
    rows, offs = tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < M) & (offs[None, :] < K)
    x_ptrs = x_ptr + rows[:, None] * x_row_stride + offs[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0, cache_modifier=".cg")  # draft_loop: another program wrote it


@triton.jit
def load_weight(w_ptr, w_row_stride, cols, k, K, BLOCK_K: tl.constexpr):
    """``W[cols, k : k + BLOCK_K]``, [BLOCK_N, BLOCK_K], zero beyond K."""
    offs = k + tl.arange(0, BLOCK_K)
    w_row_ptrs = w_ptr + cols.to(tl.int64) * w_row_stride  # a head of 128k tokens times 16k is past 2^31 elements
    return tl.load(w_row_ptrs[:, None] + offs[None, :], mask=offs[None, :] < K, other=0.0)


@triton.jit
def weigh(x, norm_ptr, k, K, BLOCK_K: tl.constexpr):
    """``x * g`` rounded to the dtype of ``x``, and ``x^2`` in float32, for a tile of ``load_rows`` at ``k``."""
    offs = k + tl.arange(0, BLOCK_K)
    g = tl.load(norm_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    return (wide * g[None, :]).to(x.dtype), wide * wide


@triton.jit
def norm_factor(squares, K, eps):
    """``1 / sqrt(mean(x^2) + eps)`` of each row from the summed tiles of squares: [BLOCK_M, BLOCK_K] to [BLOCK_M]."""
    return 1.0 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def project(
    x_ptr,
    x_row_stride,
    w_ptr,
    w_row_stride,
    cols,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x @ W[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` [BLOCK_N] must be a row of W."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w = load_weight(w_ptr, w_row_stride, cols, k, K, BLOCK_K)
        x = load_rows(x_ptr, x_row_stride, k, M, K, BLOCK_M, BLOCK_K)
        acc = multiply_add(acc, x, w)
    return acc


@triton.jit
def norm_project(
    x_ptr,
    x_row_stride,
    norm_ptr,
    w_ptr,
    w_row_stride,
    cols,
    M,
    K,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``rms_norm(x) @ W[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` [BLOCK_N] must be a row of W."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w = load_weight(w_ptr, w_row_stride, cols, k, K, BLOCK_K)
        x, square = weigh(load_rows(x_ptr, x_row_stride, k, M, K, BLOCK_M, BLOCK_K), norm_ptr, k, K, BLOCK_K)
        squares += square
        acc = multiply_add(acc, x, w)
    return acc * norm_factor(squares, K, eps)[:, None]


@triton.jit
def add_bias(acc, bias_ptr, cols, N):
    """``acc + bias[cols]``."""
    return acc + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
