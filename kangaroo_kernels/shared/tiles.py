"""What the projections share: a weight matrix streamed once past up to 16 rows.

    acc[m, n] = sum_k x[m, k] * W[n, k]            the operand of the sum is rounded to the weight's dtype
    with a norm: x[m, k] * g[k] takes the place of x[m, k], and the sum is multiplied by 1 / sqrt(mean(x[m]^2) + eps)

The norm's factor is taken out of the sum, so one pass reads ``x`` once and starts on the weight at once: nothing waits
for a reduction over the row. What the contract of ``docs/kernels.md`` asks of every projection is kept here: 16 rows
whatever M is (rows from M on are zero), K in steps of 512 bytes from 0 upwards, one accumulator per output element.
"""

import triton
import triton.language as tl

from kangaroo_kernels.contract import MAX_ROWS

BLOCK_M = tl.constexpr(MAX_ROWS)
"""Rows of every tile: all tokens in flight, and the least that the tensor cores take."""

K_STEP_BYTES = tl.constexpr(512)
"""Bytes of a weight row in a step along K: 256 elements of 16 bits. The norm's sum of squares depends on it."""

CHUNK = tl.constexpr(1024)
"""Elements of a row that a program copies or merges at a time where it has the row alone."""


@triton.constexpr_function
def elements(size, ptr):
    """How many elements of what ``ptr`` points to are ``size`` bytes; known at compile time."""
    return size * 8 // ptr.dtype.element_ty.primitive_bitwidth


@triton.jit
def skipped(active_ptr):
    """Whether the flag of a drafting step, ``[1]`` int32 or None, is 0; without a flag nothing is skipped."""
    down = False
    if active_ptr is not None:
        down = tl.load(active_ptr) == 0
    return down


@triton.jit
def multiply_add(acc, x, w):
    """``acc + x @ w^T`` for tiles ``x`` [BLOCK_M, BLOCK_K] and ``w`` [BLOCK_N, BLOCK_K]; float32 without TF32."""
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def load_rows(x, k, BLOCK_K: tl.constexpr):
    """``x[:, k : k + BLOCK_K]`` of a ``Matrix``, [BLOCK_M, BLOCK_K], zero outside of it."""
    rows, offs = tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < x.rows) & (offs[None, :] < x.cols)
    x_ptrs = x.ptr + rows[:, None] * x.row_stride + offs[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0, cache_modifier=".cg")  # in draft_loop, another program wrote it


@triton.jit
def load_weight(w, cols, k, BLOCK_K: tl.constexpr):
    """``w[cols, k : k + BLOCK_K]`` of a ``Linear``, [BLOCK_N, BLOCK_K], zero beyond its columns."""
    offs = k + tl.arange(0, BLOCK_K)
    w_row_ptrs = w.ptr + cols.to(tl.int64) * w.row_stride  # a head of 128k tokens times 16k is past 2^31 elements
    return tl.load(w_row_ptrs[:, None] + offs[None, :], mask=offs[None, :] < w.cols, other=0.0)


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
def project(x, w, cols, BLOCK_N: tl.constexpr):
    """``x @ w[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` must be a row of ``w``."""
    BLOCK_K: tl.constexpr = elements(K_STEP_BYTES, w.ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, w.cols, BLOCK_K):
        weights = load_weight(w, cols, k, BLOCK_K)
        acc = multiply_add(acc, load_rows(x, k, BLOCK_K), weights)
    return acc


@triton.jit
def norm_project(x, norm, w, cols, BLOCK_N: tl.constexpr):
    """``rms_norm(x) @ w[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` must be a row of ``w``."""
    BLOCK_K: tl.constexpr = elements(K_STEP_BYTES, w.ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, w.cols, BLOCK_K):
        weights = load_weight(w, cols, k, BLOCK_K)
        rows, square = weigh(load_rows(x, k, BLOCK_K), norm.ptr, k, w.cols, BLOCK_K)
        squares += square
        acc = multiply_add(acc, rows, weights)
    return acc * norm_factor(squares, w.cols, norm.eps)[:, None]


@triton.jit
def add_bias(acc, bias_ptr, cols, N):
    """``acc + bias[cols]``."""
    return acc + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
