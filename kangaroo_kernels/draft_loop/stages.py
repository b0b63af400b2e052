"""The stages of ``draft_loop`` that know a block's shape: a program's share of their tiles, and what it prefetches.

A block is a layer, or the adapter after the last layer. A row of a table says where the tensors of a block lie.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kangaroo_kernels.attention import attention_tile
from kangaroo_kernels.qkv_rope import qkv_rope_tile
from kangaroo_kernels.shared.grid import prefetch
from kangaroo_kernels.shared.launch import VECTOR_BYTES
from kangaroo_kernels.shared.operands import Cache, Caches, Linear, Matrix, Norm, Queries, Work
from kangaroo_kernels.shared.splits import count_splits_of, first_position
from kangaroo_kernels.shared.tiles import K_STEP_BYTES, elements

# The stages, in the order of a layer and then of the head; an adapter of attention alone leaves out the MLP's two.
QKV = tl.constexpr(0)
ATTEND = tl.constexpr(1)
OUTPUT = tl.constexpr(2)
GATE_UP = tl.constexpr(3)
DOWN = tl.constexpr(4)
HEAD = tl.constexpr(5)
CHOOSE = tl.constexpr(6)
TURNS = tl.constexpr(5)
"""Stages of a layer."""

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
"""The distance from one prefetch to the next: the memory's own granularity."""

VECTOR = tl.constexpr(VECTOR_BYTES)
"""The table's offsets count in units of this many bytes."""

ATTENTION_STAGES = tl.constexpr(2)
"""Stages of the pipeline over the KV cache: with more of them one program would take the shared memory of two."""


class Turn(NamedTuple):
    """What every stage of a turn knows: the program, the block and the rows.

    Attributes:
        program: the number of this program.
        programs: how many programs the grid has.
        base_ptr: what the table's offsets count from, of the weights' dtype.
        row_ptr: the block's row of the table, ``[TABLE_WORDS]`` int64.
        adapting: whether the block is the adapter.
        M: rows, 1 or 2.
        position: the position of the first row.
        kv_heads: the block's key-value heads.
        room: positions that the block's caches and phases hold.
    """

    program: tl.tensor
    programs: tl.tensor
    base_ptr: tl.tensor
    row_ptr: tl.tensor
    adapting: tl.tensor
    M: tl.tensor
    position: tl.tensor
    kv_heads: tl.tensor
    room: tl.tensor


class Strides(NamedTuple):
    """The strides of a block's key cache, which are those of its value cache, too.

    Attributes:
        head: from head to head.
        row: from position to position.
    """

    head: tl.tensor
    row: tl.tensor


class Sizes(NamedTuple):
    """The rows and columns of the weights that are fetched ahead.

    Attributes:
        queries: H * D of the block, the columns of its output projection.
        qkv_rows: rows of the next block's packed q, k and v.
        V: rows of the head.
        K: the hidden size.
        I: the inner size of the block's MLP.
    """

    queries: tl.tensor
    qkv_rows: tl.tensor
    V: tl.tensor
    K: tl.tensor
    I: tl.tensor


class Widths(NamedTuple):
    """The columns of the projections' tiles, all known at compile time.

    Attributes:
        QKV: of ``qkv_rope``.
        LINEAR: of ``linear_residual``.
        GATE_UP: of ``gate_up``, whose tiles read twice as many weight rows.
        HEAD: of the head, whose columns are tokens.
    """

    QKV: tl.constexpr
    LINEAR: tl.constexpr
    GATE_UP: tl.constexpr
    HEAD: tl.constexpr


@triton.jit
def tensor_at(base_ptr, row_ptr, word):
    """A block's tensor; the table counts in vectors, so that the address is known to be a multiple of 16."""
    return base_ptr + tl.load(row_ptr + word) * elements(VECTOR, base_ptr)


@triton.jit
def qkv_stage(turn, x_ptr, K, strides, eps, phases_ptr, q_ptr, heads, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's tiles of a block's ``qkv_rope``."""
    base_ptr, row_ptr, H_KV = turn.base_ptr, turn.row_ptr, turn.kv_heads
    N = (heads.GROUP + 2) * H_KV * heads.DIM
    for tile in tl.range(turn.program, tl.cdiv(N, BLOCK_N), turn.programs, disable_licm=True):
        norm_ptr, w_ptr = tensor_at(base_ptr, row_ptr, NORM_AT), tensor_at(base_ptr, row_ptr, QKV_AT)
        bias_ptr = tensor_at(base_ptr, row_ptr, QKV_BIAS_AT) if HAS_BIAS else None
        keys = Cache(tensor_at(base_ptr, row_ptr, KEYS_AT), 0, strides.head, strides.row)
        values = Cache(tensor_at(base_ptr, row_ptr, VALUES_AT), 0, strides.head, strides.row)
        qkv_rope_tile(
            tile,
            turn.position,
            Matrix(x_ptr, turn.M, K, K),
            Norm(norm_ptr, eps),
            Linear(w_ptr, bias_ptr, N, K, K),
            phases_ptr,
            Queries(q_ptr, turn.M, heads.GROUP * H_KV, heads.GROUP * H_KV * heads.DIM, heads.DIM, None),
            Caches(keys, values, None, H_KV, turn.room, 0),
            heads.DIM,
            BLOCK_N,
        )


@triton.jit
def attend_stage(turn, q_ptr, strides, scale, parts, heads):
    """A program's splits of a block's ``attention``: those that the text has, the long ones first, and their merge."""
    H_KV = turn.kv_heads
    splits = count_splits_of(tl.minimum(turn.position + turn.M, turn.room))
    for item in tl.range(turn.program, splits * H_KV, turn.programs, disable_licm=True):
        split = splits - 1 - item // H_KV
        work = Work(split, item % H_KV, 0, first_position(split))
        keys = Cache(tensor_at(turn.base_ptr, turn.row_ptr, KEYS_AT), 0, strides.head, strides.row)
        values = Cache(tensor_at(turn.base_ptr, turn.row_ptr, VALUES_AT), 0, strides.head, strides.row)
        attention_tile(
            work,
            turn.position,
            splits,
            True,
            Queries(q_ptr, turn.M, heads.GROUP * H_KV, heads.GROUP * H_KV * heads.DIM, heads.DIM, None),
            scale,
            Caches(keys, values, None, H_KV, turn.room, 0),
            parts,
            heads,
            ATTENTION_STAGES,
        )


@triton.jit
def prefetch_next(
    turn, stage, table_ptr, head_ptr, sizes, widths: tl.constexpr, STEPS: tl.constexpr, ADAPTER_END: tl.constexpr
):
    """Prefetch into the L2 the first ``STEPS`` steps along K of this program's first tile of the next weight.

    Those of the output projection are fetched right after QKV, since attention reads no weight. The head's follow the
    adapter's last stage, ``ADAPTER_END``.
    """
    QKV_N: tl.constexpr = widths.QKV
    LINEAR_N: tl.constexpr = widths.LINEAR
    GATE_UP_N: tl.constexpr = widths.GATE_UP
    HEAD_N: tl.constexpr = widths.HEAD
    MOST_ROWS: tl.constexpr = max(QKV_N, LINEAR_N, 2 * GATE_UP_N, HEAD_N)
    GRAIN: tl.constexpr = elements(PREFETCH_BYTES, turn.base_ptr)
    COLS: tl.constexpr = STEPS * elements(K_STEP_BYTES, turn.base_ptr) // GRAIN
    V, K, I = sizes.V, sizes.K, sizes.I
    to_head = turn.adapting & (stage == ADAPTER_END)
    word = tl.where(stage == QKV, OUTPUT_AT, tl.where(stage == OUTPUT, GATE_UP_AT, DOWN_AT))
    word = tl.where((stage == DOWN) | (stage == HEAD), QKV_AT, word)
    to_next_block = (stage == DOWN) & (to_head == 0)
    row_ptr = tl.where(stage == HEAD, table_ptr, turn.row_ptr + tl.where(to_next_block, TABLE_WORDS, 0))
    w_ptr = tl.where(to_head, head_ptr, tensor_at(turn.base_ptr, row_ptr, word))
    size = tl.where(word == QKV_AT, QKV_N, tl.where(word == GATE_UP_AT, 2 * GATE_UP_N, LINEAR_N))
    size = tl.where(to_head, HEAD_N, size)
    N = tl.where(to_head, V, tl.where(word == QKV_AT, sizes.qkv_rows, tl.where(word == GATE_UP_AT, I, K)))
    inputs = tl.where(word == OUTPUT_AT, sizes.queries, tl.where(word == DOWN_AT, I, K))
    in_pairs = (word == GATE_UP_AT) & (to_head == 0)

    rows = turn.program * size + tl.minimum(tl.arange(0, MOST_ROWS), size - 1)
    half = tl.where(in_pairs, rows % 2 * I, 0)  # gate and up rows alternate
    rows = tl.minimum(tl.where(in_pairs, rows // 2, rows), N - 1) + half  # beyond the end, the last one again
    cols = tl.minimum(tl.arange(0, COLS) * GRAIN, inputs - 1)
    prefetch(w_ptr + rows.to(tl.int64)[:, None] * inputs + cols[None, :])
