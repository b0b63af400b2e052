"""What the projections share: a weight matrix streamed once past up to 16 rows.

    acc[m, n] = sum_k x[m, k] * W[n, k]            the operand of the sum is rounded to the weight's dtype
    with a norm: x[m, k] * g[k] takes the place of x[m, k], and the sum is multiplied by 1 / sqrt(mean(x[m]^2) + eps)

The norm's factor is taken out of the sum, so one pass reads ``x`` once and starts on the weight at once: nothing waits
for a reduction over the row. What the contract of ``docs/kernels.md`` asks of every projection is kept here: 16 rows
whatever M is (rows from M on are zero), K in steps of 512 bytes from 0 upwards, four accumulators per output element,
one for each quarter of a step, which are added in one order at the end.
"""

import triton
import triton.language as tl

from kangaroo_kernels.contract import MAX_ROWS

BLOCK_M = tl.constexpr(MAX_ROWS)
"""Rows of every tile: all tokens in flight, and the least that the tensor cores take."""

K_STEP_BYTES = tl.constexpr(512)
"""Bytes of a weight row in a step along K: 256 elements of 16 bits."""

SLICES = tl.constexpr(4)
"""Quarters of a step along K, 128 bytes of a weight row each, with an accumulator each. Of four warps each takes a
quarter: a product of the tensor cores then waits for three others of its step, where it would else wait for fifteen."""

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
def slices(tile):
    """A tile [ROWS, BLOCK_K] by its quarters: [SLICES, ROWS, BLOCK_K / SLICES].

    They are cut here and not where the tile is loaded, so that the compiler keeps tiles of two dimensions in shared
    memory, whose rows it swizzles: loads of the tensor cores' operands then meet no bank conflict.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1] // SLICES
    return tl.permute(tl.reshape(tile, (ROWS, SLICES, COLS)), (1, 0, 2))


@triton.jit
def multiply_add(acc, x, w):
    """``acc + x @ w^T`` by quarters: ``acc`` [SLICES, M, N], tiles ``x`` [M, BLOCK_K] and ``w`` [N, BLOCK_K].

    float32 is multiplied without TF32.
    """
    return tl.dot(slices(x), tl.permute(slices(w), (0, 2, 1)), acc, input_precision="ieee")


@triton.jit
def sum_slices(acc):
    """The quarters of ``acc`` [SLICES, M, N] added as (0 + 1) + (2 + 3), wherever they lie across threads: [M, N]."""
    ROWS: tl.constexpr = acc.shape[1]
    COLS: tl.constexpr = acc.shape[2]
    even, odd = tl.split(tl.reshape(tl.permute(acc, (1, 2, 0)), (ROWS, COLS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first + second) + (third + fourth)


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
    """``x * g`` rounded to the dtype of ``x``, for a tile of ``load_rows`` at ``k``."""
    offs = k + tl.arange(0, BLOCK_K)
    g = tl.load(norm_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    return (wide * g[None, :]).to(x.dtype)


@triton.jit
def norm_factor(gram, K, eps):
    """``1 / sqrt(mean(x^2) + eps)`` of each row, [BLOCK_M], from ``x @ x^T`` by quarters, [SLICES, BLOCK_M, BLOCK_M].

    The sums of squares are its diagonal. So the tensor cores make them, and nothing but products reads the tile of x.
    """
    rows = tl.arange(0, BLOCK_M)
    squares = tl.sum(tl.where(rows[:, None] == rows[None, :], sum_slices(gram), 0.0), axis=1)  # zeros change no sum
    return 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def project(x, w, cols, BLOCK_N: tl.constexpr):
    """``x @ w[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` must be a row of ``w``."""
    BLOCK_K: tl.constexpr = elements(K_STEP_BYTES, w.ptr)
    acc = tl.zeros((SLICES, BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, w.cols, BLOCK_K):
        weights = load_weight(w, cols, k, BLOCK_K)
        acc = multiply_add(acc, load_rows(x, k, BLOCK_K), weights)
    return sum_slices(acc)


@triton.jit
def norm_project(x, norm, w, cols, BLOCK_N: tl.constexpr):
    """``rms_norm(x) @ w[cols]^T``: [BLOCK_M, BLOCK_N] float32; every one of ``cols`` must be a row of ``w``."""
    BLOCK_K: tl.constexpr = elements(K_STEP_BYTES, w.ptr)
    acc = tl.zeros((SLICES, BLOCK_M, BLOCK_N), dtype=tl.float32)
    gram = tl.zeros((SLICES, BLOCK_M, BLOCK_M), dtype=tl.float32)
    for k in range(0, w.cols, BLOCK_K):
        weights = load_weight(w, cols, k, BLOCK_K)
        rows = load_rows(x, k, BLOCK_K)
        gram = multiply_add(gram, rows, rows)
        acc = multiply_add(acc, weigh(rows, norm.ptr, k, w.cols, BLOCK_K), weights)
    return sum_slices(acc) * norm_factor(gram, w.cols, norm.eps)[:, None]


@triton.jit
def add_bias(acc, bias_ptr, cols, N):
    """``acc + bias[cols]``."""
    return acc + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
