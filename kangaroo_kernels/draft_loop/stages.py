"""The stages of ``draft_loop`` that know a block's shape: a program's share of their tiles, and what it prefetches.

A block is a layer, or the adapter behind the last of them. Where its tensors lie, a row of a table says.
"""

import triton
import triton.language as tl

from kangaroo_kernels.attention import attention_merge, attention_split, count_splits_of, first_position
from kangaroo_kernels.qkv_rope import qkv_rope_tile
from kangaroo_kernels.shared.grid import prefetch

# The stages, in the order of a layer; the adapter goes from OUTPUT to HEAD.
QKV = tl.constexpr(0)
ATTEND = tl.constexpr(1)
MERGE = tl.constexpr(2)
OUTPUT = tl.constexpr(3)
GATE_UP = tl.constexpr(4)
DOWN = tl.constexpr(5)
HEAD = tl.constexpr(6)
CHOOSE = tl.constexpr(7)
TURNS = tl.constexpr(6)
"""Stages of a layer, and as many of the adapter and the head."""

# Where a block's tensors lie: words of its row of the table.
NORM_AT = tl.constexpr(0)
QKV_AT = tl.constexpr(1)
QKV_BIAS_AT = tl.constexpr(2)
OUTPUT_AT = tl.constexpr(3)
OUTPUT_BIAS_AT = tl.constexpr(4)
MLP_NORM_AT = tl.constexpr(5)
GATE_UP_AT = tl.constexpr(6)
GATE_UP_BIAS_AT = tl.constexpr(7)
DOWN_AT = tl.constexpr(8)
DOWN_BIAS_AT = tl.constexpr(9)
KEYS_AT = tl.constexpr(10)
VALUES_AT = tl.constexpr(11)
TABLE_WORDS = tl.constexpr(12)

PREFETCH_BYTES = tl.constexpr(64)
"""From one prefetch to the next: the memory's own grain."""


@triton.jit
def tensor_at(base_ptr, row_ptr, word, UNIT: tl.constexpr):
    """A block's tensor; the table counts in vectors of 16 bytes, so that the address is known to be a multiple."""
    return base_ptr + tl.load(row_ptr + word) * UNIT


@triton.jit
def qkv_stage(
    program,
    programs,
    base_ptr,
    row_ptr,
    position,
    x_ptr,
    phases_ptr,
    q_ptr,
    M,
    K,
    H_KV,
    T,
    head_stride,
    row_stride,
    eps,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program's tiles of a block's ``qkv_rope``."""
    N = (GROUP + 2) * H_KV * HEAD_DIM
    for tile in tl.range(program, tl.cdiv(N, BLOCK_N), programs, disable_licm=True):
        qkv_rope_tile(
            tile,
            position,
            x_ptr,
            tensor_at(base_ptr, row_ptr, NORM_AT, UNIT),
            tensor_at(base_ptr, row_ptr, QKV_AT, UNIT),
            tensor_at(base_ptr, row_ptr, QKV_BIAS_AT, UNIT) if HAS_BIAS else None,
            phases_ptr,
            q_ptr,
            tensor_at(base_ptr, row_ptr, KEYS_AT, UNIT),
            tensor_at(base_ptr, row_ptr, VALUES_AT, UNIT),
            None,
            M,
            N,
            K,
            GROUP * H_KV,
            H_KV,
            T,
            K,
            K,
            GROUP * H_KV * HEAD_DIM,
            0,
            head_stride,
            row_stride,
            0,
            head_stride,
            row_stride,
            eps,
            HEAD_DIM,
            0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


@triton.jit
def attend_stage(
    program,
    programs,
    base_ptr,
    row_ptr,
    position,
    q_ptr,
    sums_ptr,
    stats_ptr,
    M,
    H_KV,
    T,
    scale,
    head_stride,
    row_stride,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program's splits of a block's ``attention``: those that the text has, the long ones first."""
    length = tl.minimum(position + M, T)
    splits = count_splits_of(length)
    for item in tl.range(program, splits * H_KV, programs, disable_licm=True):
        split = splits - 1 - item // H_KV
        attention_split(
            split,
            item % H_KV,
            0,
            first_position(split),
            length,
            position,
            q_ptr,
            tensor_at(base_ptr, row_ptr, KEYS_AT, UNIT),
            tensor_at(base_ptr, row_ptr, VALUES_AT, UNIT),
            None,
            sums_ptr,
            stats_ptr,
            None,
            M,
            GROUP * H_KV,
            scale,
            GROUP * H_KV * HEAD_DIM,
            HEAD_DIM,
            0,
            head_stride,
            row_stride,
            0,
            head_stride,
            row_stride,
            0,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_R,
            BLOCK_T,
            0,
            False,
            STAGES,
        )


@triton.jit
def merge_stage(
    program,
    programs,
    position,
    sums_ptr,
    stats_ptr,
    mixed_ptr,
    M,
    H,
    T,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program's heads of the merge of a block's splits."""
    splits = count_splits_of(tl.minimum(position + M, T))
    for item in tl.range(program, M * H, programs, disable_licm=True):
        attention_merge(
            item // H,
            item % H,
            position,
            sums_ptr,
            stats_ptr,
            mixed_ptr,
            M,
            H,
            splits,
            H * HEAD_DIM,
            HEAD_DIM,
            BLOCK_D,
        )


@triton.jit
def prefetch_next(
    stage,
    program,
    adapting,
    base_ptr,
    table_ptr,
    row_ptr,
    head_ptr,
    queries,
    qkv_rows,
    V,
    K,
    I,
    UNIT: tl.constexpr,
    QKV_N: tl.constexpr,
    LINEAR_N: tl.constexpr,
    GATE_UP_N: tl.constexpr,
    HEAD_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Have the first ``STEPS`` along K of this program's first tile of the next weight brought to the L2.

    The output projection's are fetched behind QKV, for attention and its merge read no weight. ``ROWS`` is the most
    that a tile has.
    """
    GRAIN: tl.constexpr = PREFETCH_BYTES // (base_ptr.dtype.element_ty.primitive_bitwidth // 8)
    to_head = adapting & (stage == OUTPUT)
    word = tl.where(stage == QKV, OUTPUT_AT, tl.where(stage == OUTPUT, GATE_UP_AT, DOWN_AT))
    word = tl.where((stage == DOWN) | (stage == HEAD), QKV_AT, word)
    row_ptr = tl.where(stage == HEAD, table_ptr, row_ptr + tl.where(stage == DOWN, TABLE_WORDS, 0))
    w_ptr = tl.where(to_head, head_ptr, tensor_at(base_ptr, row_ptr, word, UNIT))
    size = tl.where(word == QKV_AT, QKV_N, tl.where(word == GATE_UP_AT, 2 * GATE_UP_N, LINEAR_N))
    size = tl.where(to_head, HEAD_N, size)
    N = tl.where(to_head, V, tl.where(word == QKV_AT, qkv_rows, tl.where(word == GATE_UP_AT, I, K)))
    inputs = tl.where(word == OUTPUT_AT, queries, tl.where(word == DOWN_AT, I, K))
    in_pairs = (word == GATE_UP_AT) & (to_head == 0)

    rows = program * size + tl.minimum(tl.arange(0, ROWS), size - 1)
    half = tl.where(in_pairs, rows % 2 * I, 0)  # gate and up in turns
    rows = tl.minimum(tl.where(in_pairs, rows // 2, rows), N - 1) + half  # beyond an end the last one again
    cols = tl.minimum(tl.arange(0, STEPS * BLOCK_K // GRAIN) * GRAIN, inputs - 1)
    prefetch(w_ptr + rows.to(tl.int64)[:, None] * inputs + cols[None, :])
