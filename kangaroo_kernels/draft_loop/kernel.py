"""``draft_loop`` in Triton: shallow layers, adapter and head, token after token, in one persistent launch.

Every program stays resident and takes its share of the tiles of one stage after the other. A layer has five stages:
``qkv_rope``, ``attention``, the output projection, ``gate_up`` and the down projection. An adapter of attention alone
has the first three of them; the head and its merge follow. Between two stages lies a barrier across the grid
(``shared/grid.py``); before a program waits there, it prefetches what it will first read of the next weight. The device
itself ends the loop, by the threshold. Each stage is the same function that the operation's own kernel (its "stage
kernel") runs, with the same tiles, so the results are the same to the bit.

Bytes moved: for each draft, those of all stages. Barriers for each draft: 5 per layer, 3 or 5 for the adapter, 2 for
the head.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftModel, Top1
from kangaroo_kernels.draft_loop.stages import (
    ATTEND,
    CHOOSE,
    DOWN,
    DOWN_AT,
    DOWN_BIAS_AT,
    GATE_UP,
    GATE_UP_AT,
    GATE_UP_BIAS_AT,
    HEAD,
    MLP_NORM_AT,
    OUTPUT,
    OUTPUT_AT,
    OUTPUT_BIAS_AT,
    QKV,
    TABLE_WORDS,
    TURNS,
    Sizes,
    Strides,
    Turn,
    Widths,
    attend_stage,
    prefetch_next,
    qkv_stage,
    tensor_at,
)
from kangaroo_kernels.draft_loop.table import DraftLoop
from kangaroo_kernels.gate_up import gate_up_tile
from kangaroo_kernels.linear_residual import linear_residual_tile
from kangaroo_kernels.sample_head import sample_tile
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.checks import check_sampling
from kangaroo_kernels.shared.grid import arrive, is_whole, leave, wait
from kangaroo_kernels.shared.head import merge_row
from kangaroo_kernels.shared.launch import check_current, device_number, device_seed
from kangaroo_kernels.shared.operands import Found, Heads, Linear, Matrix, Noise, Norm, Parts, TileParts
from kangaroo_kernels.top1_head import top1_tile

__all__ = ["DraftLoop", "draft_loop", "draft_loop_kernel", "prepare_draft_loop"]


NUMBERS = ["flags_ptr", "positions_ptr", "token_ptr", "confidence_ptr", "tokens_ptr"]  # they lie anywhere
NUMBERS += ["seed_ptr", "temperature_ptr", "threshold_ptr"]


@stable_key
@triton.jit(
    do_not_specialize=["LAYERS", "R", "T", "ADAPTER_T", "programs", "polls", "stream"],
    do_not_specialize_on_alignment=NUMBERS,
)
def draft_loop_kernel(
    base_ptr,  # [] of the weights' dtype: the table's offsets count from here
    table_ptr,  # [layers + 1, TABLE_WORDS] int64, the adapter last
    phases_ptr,  # [T, D / 2, 2] float32
    adapter_phases_ptr,  # [ADAPTER_T, D / 2, 2] float32
    head_norm_ptr,  # [K]
    head_ptr,  # [V, K]
    head_bias_ptr,  # [V] or None
    tokens_ptr,  # [V] int32, the tokens of the head's rows, or None
    embedding_ptr,  # [all tokens, K]
    flags_ptr,  # [R + 1] int32
    positions_ptr,  # [1] int64
    newest_ptr,  # [1, K]
    exit_hidden_ptr,  # [R + 2, K]
    token_ptr,  # [R] int64
    confidence_ptr,  # [R] float32
    q_ptr,  # [2, H, D]
    sums_ptr,  # [splits, 2, H, D] float32
    stats_ptr,  # [splits, 2, H, 2] float32
    arrivals_ptr,  # [H_kv] int32
    mixed_ptr,  # [2, H * D]
    hidden_ptr,  # [K]
    inner_ptr,  # [max(I, ADAPTER_I)]
    adapted_ptr,  # [2, K]
    score_ptr,  # [tiles] float32
    index_ptr,  # [tiles] int32
    largest_ptr,  # [tiles] float32
    sum_ptr,  # [tiles] float32
    state_ptr,  # [STATE_WORDS] int32
    seed_ptr,  # [1] int64, or None for the most likely token
    stream,
    temperature_ptr,  # [1] float32 or None
    threshold_ptr,  # [1] float32
    LAYERS,
    R,
    K,
    I,
    ADAPTER_I,
    V,
    H_KV,
    ADAPTER_H_KV,
    T,  # positions that caches and phases hold
    ADAPTER_T,
    cache_head_stride,
    cache_row_stride,
    adapter_head_stride,
    adapter_row_stride,
    scale,  # times log2(e)
    adapter_scale,
    eps,
    adapter_eps,
    head_eps,
    programs,
    polls,
    QKV_BIAS: tl.constexpr,
    LINEAR_BIAS: tl.constexpr,
    GATE_UP_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADAPTER_GROUP: tl.constexpr,
    ADAPTER_HEAD_DIM: tl.constexpr,
    ADAPTER_BLOCK_D: tl.constexpr,
    ADAPTER_BLOCK_R: tl.constexpr,
    ADAPTER_MLP: tl.constexpr,
    QKV_N: tl.constexpr,
    LINEAR_N: tl.constexpr,
    GATE_UP_N: tl.constexpr,
    HEAD_N: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """One program owns every ``programs``-th tile of each stage."""
    if tl.load(flags_ptr) == 0:
        return
    HEADS: tl.constexpr = Heads(GROUP, HEAD_DIM, BLOCK_D, BLOCK_R)
    ADAPTER_HEADS: tl.constexpr = Heads(ADAPTER_GROUP, ADAPTER_HEAD_DIM, ADAPTER_BLOCK_D, ADAPTER_BLOCK_R)
    WIDTHS: tl.constexpr = Widths(QKV_N, LINEAR_N, GATE_UP_N, HEAD_N)
    OTHER_HEADS: tl.constexpr = (GROUP != ADAPTER_GROUP) or (HEAD_DIM != ADAPTER_HEAD_DIM)
    program = tl.program_id(0)
    before = tl.load(positions_ptr).to(tl.int32)
    tiles = tl.cdiv(V, HEAD_N)
    qkv_rows = (GROUP + 2) * HEAD_DIM * H_KV
    adapter_qkv_rows = (ADAPTER_GROUP + 2) * ADAPTER_HEAD_DIM * ADAPTER_H_KV
    LEFT_OUT: tl.constexpr = 0 if ADAPTER_MLP else HEAD - GATE_UP
    ADAPTER_END: tl.constexpr = DOWN if ADAPTER_MLP else OUTPUT
    whole_draft = TURNS * LAYERS + CHOOSE + 1 - LEFT_OUT
    turns = tl.where(is_whole(state_ptr), whole_draft, 0)  # per draft; 0 ends the loop
    left = TileParts(score_ptr, index_ptr, largest_ptr, sum_ptr, tiles)
    arrivals = 0
    drafted = 0
    while turns > 0:
        # disable_licm: the compiler must not compute what no turn changes ahead of all turns, nor what no tile changes
        # ahead of a stage's tiles, for it would sit in registers through every loop over a weight or the cache.
        for turn in tl.range(0, turns, disable_licm=True):
            if turn < turns:
                # in the interpreter a turn is an int of Python
                block = tl.minimum(tl.cast(turn, tl.int32) // TURNS, LAYERS)
                adapting = block == LAYERS
                stage = turn - block * TURNS
                stage = tl.where(adapting & (stage > OUTPUT), stage + LEFT_OUT, stage)
                row_ptr = table_ptr + block * TABLE_WORDS
                M = tl.where(adapting & (drafted == 0), 2, 1)
                position = before + 2 + drafted - M
                kv_heads = tl.where(adapting, ADAPTER_H_KV, H_KV)
                room = tl.where(adapting, ADAPTER_T, T)
                # the MLP takes one row: of the adapter's two the newest, since only that one goes to the head
                attended_ptr = tl.where(adapting, adapted_ptr + (M - 1) * K, hidden_ptr)
                inner = tl.where(adapting, ADAPTER_I, I)
                now = Turn(program, programs, base_ptr, row_ptr, adapting, M, position, kv_heads, room)

                if stage == QKV:
                    exit_row_ptr = exit_hidden_ptr + (drafted + 2 - M) * K
                    x_ptr = tl.where(adapting, exit_row_ptr, tl.where(block == 0, newest_ptr, hidden_ptr))
                    head_stride = tl.where(adapting, adapter_head_stride, cache_head_stride)
                    row_stride = tl.where(adapting, adapter_row_stride, cache_row_stride)
                    strides = Strides(head_stride, row_stride)
                    block_eps = tl.where(adapting, adapter_eps, eps)
                    rope_ptr = tl.where(adapting, adapter_phases_ptr, phases_ptr)
                    if adapting & OTHER_HEADS:
                        if OTHER_HEADS:
                            qkv_stage(
                                now, x_ptr, K, strides, block_eps, rope_ptr, q_ptr, ADAPTER_HEADS, QKV_BIAS, QKV_N
                            )
                    else:
                        qkv_stage(now, x_ptr, K, strides, block_eps, rope_ptr, q_ptr, HEADS, QKV_BIAS, QKV_N)
                elif stage == ATTEND:
                    head_stride = tl.where(adapting, adapter_head_stride, cache_head_stride)
                    row_stride = tl.where(adapting, adapter_row_stride, cache_row_stride)
                    strides = Strides(head_stride, row_stride)
                    block_scale = tl.where(adapting, adapter_scale, scale)
                    queries = tl.where(adapting, ADAPTER_GROUP * ADAPTER_HEAD_DIM, GROUP * HEAD_DIM) * kv_heads
                    parts = Parts(sums_ptr, stats_ptr, arrivals_ptr, mixed_ptr, queries)
                    if adapting & OTHER_HEADS:
                        if OTHER_HEADS:
                            attend_stage(now, q_ptr, strides, block_scale, parts, ADAPTER_HEADS)
                    else:
                        attend_stage(now, q_ptr, strides, block_scale, parts, HEADS)
                elif (stage == OUTPUT) | (stage == DOWN):
                    is_down = stage == DOWN
                    exit_row_ptr = exit_hidden_ptr + (drafted + 2 - M) * K
                    x_ptr = tl.where(adapting, exit_row_ptr, tl.where(block == 0, newest_ptr, hidden_ptr))
                    bias_word = tl.where(is_down, DOWN_BIAS_AT, OUTPUT_BIAS_AT)
                    queries = tl.where(adapting, ADAPTER_GROUP * ADAPTER_HEAD_DIM, GROUP * HEAD_DIM) * kv_heads
                    inputs = tl.where(is_down, inner, queries)
                    rows = tl.where(is_down, 1, M)
                    last_ptr = tl.where(block == LAYERS - 1, exit_hidden_ptr + (drafted + 1) * K, hidden_ptr)
                    for tile in tl.range(program, tl.cdiv(K, LINEAR_N), programs, disable_licm=True):
                        rows_ptr = tl.where(is_down, inner_ptr, mixed_ptr)
                        w_ptr = tensor_at(base_ptr, row_ptr, tl.where(is_down, DOWN_AT, OUTPUT_AT))
                        bias_ptr = tensor_at(base_ptr, row_ptr, bias_word) if LINEAR_BIAS else None
                        residual_ptr = tl.where(is_down, attended_ptr, x_ptr)
                        attended_rows_ptr = tl.where(adapting, adapted_ptr, hidden_ptr)
                        out_ptr = tl.where(is_down, tl.where(adapting, attended_ptr, last_ptr), attended_rows_ptr)
                        linear_residual_tile(
                            tile,
                            Matrix(rows_ptr, rows, inputs, inputs),
                            Linear(w_ptr, bias_ptr, K, inputs, inputs),
                            Matrix(residual_ptr, rows, K, K),
                            Matrix(out_ptr, rows, K, K),
                            LINEAR_N,
                        )
                elif stage == GATE_UP:
                    block_eps = tl.where(adapting, adapter_eps, eps)
                    for tile in tl.range(program, tl.cdiv(inner, GATE_UP_N), programs, disable_licm=True):
                        norm_ptr = tensor_at(base_ptr, row_ptr, MLP_NORM_AT)
                        w_ptr = tensor_at(base_ptr, row_ptr, GATE_UP_AT)
                        bias_ptr = tensor_at(base_ptr, row_ptr, GATE_UP_BIAS_AT) if GATE_UP_BIAS else None
                        gate_up_tile(
                            tile,
                            Matrix(attended_ptr, 1, K, K),
                            Norm(norm_ptr, block_eps),
                            Linear(w_ptr, bias_ptr, 2 * inner, K, K),
                            Matrix(inner_ptr, 1, inner, inner),
                            GATE_UP_N,
                        )
                elif stage == HEAD:
                    x = Matrix(attended_ptr, 1, K, K)
                    norm, w = Norm(head_norm_ptr, head_eps), Linear(head_ptr, head_bias_ptr, V, K, K)
                    for tile in tl.range(program, tiles, programs, disable_licm=True):
                        if seed_ptr is None:
                            top1_tile(tile, x, norm, w, left, HEAD_N)
                        else:
                            drafted_at = (before + 2 + drafted).to(tl.int64)
                            noise = Noise(
                                tl.load(seed_ptr), stream, drafted_at, tl.load(temperature_ptr), tokens_ptr, None
                            )
                            sample_tile(tile, noise, x, norm, w, None, left, HEAD_N)
                else:
                    for row in tl.range(program, 1, programs, disable_licm=True):
                        merge_row(
                            row,
                            left,
                            Found(
                                token_ptr + drafted,
                                confidence_ptr + drafted,
                                flags_ptr + drafted + 1,
                                threshold_ptr,
                                Matrix(embedding_ptr, None, K, K),
                                Matrix(newest_ptr, None, K, K),
                                tokens_ptr,
                                None,
                            ),
                        )

                # the early exit
                if (stage == DOWN) & (block == LAYERS - 1):
                    sure = tl.load(flags_ptr + drafted, cache_modifier=".cg")
                    turns = tl.where((drafted < R) & (sure != 0), turns, 0)
                if turns == 0:
                    leave(state_ptr, programs)
                else:
                    arrive(state_ptr)
                    arrivals += programs
                    if PREFETCHED:
                        if (stage != ATTEND) & (stage != CHOOSE):
                            queries = tl.where(adapting, ADAPTER_GROUP * ADAPTER_HEAD_DIM, GROUP * HEAD_DIM) * kv_heads
                            next_rows = tl.where(block == LAYERS - 1, adapter_qkv_rows, qkv_rows)
                            sizes = Sizes(queries, next_rows, V, K, inner)
                            prefetch_next(now, stage, table_ptr, head_ptr, sizes, WIDTHS, PREFETCHED, ADAPTER_END)
                    turns = tl.where(wait(state_ptr, arrivals, polls, stage + 1), turns, 0)
        drafted += 1


def prepare_draft_loop(model: DraftModel, most: int) -> DraftLoop:
    """Prepare what ``draft_loop`` needs of ``model`` for up to ``most`` drafts a step."""
    return DraftLoop(model, most)


def draft_loop(
    model: DraftModel,
    flags: Tensor,
    positions: Tensor,
    newest: Tensor,
    exit_hidden: Tensor,
    *,
    threshold: float | Tensor,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    stream: int = TARGET_STREAM,
    prepared: DraftLoop | None = None,
    out: Top1 | None = None,
) -> Top1:
    """Draft up to R tokens, in place; arguments and result as for ``reference.draft_loop``.

    With ``prepared`` (and numbers that lie on the device) a call allocates nothing but ``out`` and never waits for the
    device.
    """
    most = len(flags) - 1
    loop = DraftLoop(model, most) if prepared is None else prepared
    out = loop.check(model, flags, positions, newest, exit_hidden, out)
    vocab_size, K = loop.head[0].shape
    if temperature is not None:
        check_sampling("draft_loop", temperature, None, None, seed, newest.device)
        temperature = device_number(temperature, newest.device)
        seed = device_seed(seed, newest.device)
    head_n, tiles = loop.heads[temperature is not None]
    shape, adapter = loop.shape, loop.adapter_shape
    check_current(newest.device)
    draft_loop_kernel[(loop.grid,)](
        loop.base,
        loop.table,
        shape.phases,
        adapter.phases,
        model.norm,
        *loop.head,
        loop.tokens,
        model.embedding,
        flags,
        positions,
        newest,
        exit_hidden,
        out.token,
        out.confidence,
        loop.q,
        loop.sums,
        loop.stats,
        loop.arrivals,
        loop.mixed,
        loop.hidden,
        loop.inner,
        loop.adapted,
        tiles.scores,
        tiles.indices,
        tiles.largest,
        tiles.sums,
        loop.state,
        None if temperature is None else seed,
        stream,
        temperature,
        device_number(threshold, newest.device),
        len(model.layers),
        most,
        K,
        *loop.inner_sizes,
        vocab_size,
        shape.kv_heads,
        adapter.kv_heads,
        shape.room,
        adapter.room,
        shape.head_stride,
        shape.row_stride,
        adapter.head_stride,
        adapter.row_stride,
        shape.scale,
        adapter.scale,
        shape.eps,
        adapter.eps,
        model.eps,
        loop.programs,
        loop.polls,
        **loop.constants,
        HEAD_N=head_n,
        PREFETCHED=loop.config.steps_ahead if newest.device.type != "cpu" else 0,
        num_warps=loop.config.num_warps,
        num_stages=loop.config.num_stages,
        **loop.gpu_options,
    )
    return out
