"""``draft_loop`` in Triton: shallow layers, adapter and head, token after token, in one persistent launch.

Every program stays resident and takes its share of the tiles of one stage after the other: ``qkv_rope``, ``attention``,
its merge, the output projection, ``gate_up``, the down projection; the adapter's first four; the head and its merge.
Between two stages lies a barrier across the grid (``_grid.py``); before a program waits there, it asks for what it will
first read of the next weight. The loop ends on the device's own decision, the threshold. A stage is the very function
that the stage kernels run, with their tiles, so the results are theirs to the bit.

Bytes moved: those of the stages, once a draft. Barriers, a draft: 6 a layer, 4 for the adapter, 2 for the head.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.attention import TILE
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
    MERGE,
    MLP_NORM_AT,
    OUTPUT,
    OUTPUT_AT,
    OUTPUT_BIAS_AT,
    QKV,
    TABLE_WORDS,
    TURNS,
    attend_stage,
    merge_stage,
    prefetch_next,
    qkv_stage,
    tensor_at,
)
from kangaroo_kernels.draft_loop.table import ATTENTION_STAGES, PROGRAMS_PER_SM, DraftLoop
from kangaroo_kernels.gate_up import gate_up_tile
from kangaroo_kernels.linear_residual import linear_residual_tile
from kangaroo_kernels.sample_head import real_filter, sample_tile
from kangaroo_kernels.shared.checks import check_sampling
from kangaroo_kernels.shared.grid import arrive, is_whole, leave, wait
from kangaroo_kernels.shared.head import merge_row
from kangaroo_kernels.shared.launch import device_number, device_seed, step_of
from kangaroo_kernels.shared.tiles import BLOCK_M
from kangaroo_kernels.top1_head import top1_tile

__all__ = ["PROGRAMS_PER_SM", "DraftLoop", "draft_loop", "draft_loop_kernel", "prepare_draft_loop"]

PREFETCHED_STEPS = 4
"""Steps along K of a program's first tile: about what the memory delivers while a barrier lasts."""


@triton.jit(
    do_not_specialize=["LAYERS", "R", "T", "ADAPTER_T", "programs", "polls", "stream"],
    do_not_specialize_on_alignment=[
        "flags_ptr",
        "positions_ptr",
        "token_ptr",
        "confidence_ptr",
        "seed_ptr",
        "temperature_ptr",
        "threshold_ptr",
    ],
)
def draft_loop_kernel(
    base_ptr,  # [] of the weights' dtype, what the table's offsets count from
    table_ptr,  # [layers + 1, TABLE_WORDS] int64, the adapter last
    phases_ptr,  # [T, D / 2, 2] float32
    adapter_phases_ptr,  # likewise
    head_norm_ptr,  # [K]
    head_ptr,  # [V, K]
    head_bias_ptr,  # [V] or None
    embedding_ptr,  # [V, K]
    flags_ptr,  # [R + 1] int32
    positions_ptr,  # [1] int64
    newest_ptr,  # [1, K]
    exit_hidden_ptr,  # [R + 2, K]
    token_ptr,  # [R] int64
    confidence_ptr,  # [R] float32
    q_ptr,  # [2, H, D]
    sums_ptr,  # [splits, 2, H, D] float32
    stats_ptr,  # [splits, 2, H, 2] float32
    mixed_ptr,  # [2, H * D]
    hidden_ptr,  # [K]
    inner_ptr,  # [I]
    adapted_ptr,  # [2, K]
    score_ptr,  # [tiles] float32
    index_ptr,  # [tiles] int32
    largest_ptr,  # [tiles] float32
    sum_ptr,  # [tiles] float32
    state_ptr,  # [STATE_WORDS] int32
    seed_ptr,  # [1] int64, or None: the most likely token
    stream,
    temperature_ptr,  # [1] float32 or None
    threshold_ptr,  # [1] float32
    LAYERS,
    R,
    K,
    I,
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
    BLOCK_T: tl.constexpr,
    ATTENTION_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QKV_N: tl.constexpr,
    LINEAR_N: tl.constexpr,
    GATE_UP_N: tl.constexpr,
    HEAD_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """One program owns every ``programs``-th tile of each stage."""
    if tl.load(flags_ptr) == 0:
        return
    PREFETCH_ROWS: tl.constexpr = max(QKV_N, LINEAR_N, 2 * GATE_UP_N, HEAD_N)
    UNIT: tl.constexpr = 16 // (base_ptr.dtype.element_ty.primitive_bitwidth // 8)
    OTHER_HEADS: tl.constexpr = (GROUP != ADAPTER_GROUP) or (HEAD_DIM != ADAPTER_HEAD_DIM)
    program = tl.program_id(0)
    before = tl.load(positions_ptr).to(tl.int32)
    tiles = tl.cdiv(V, HEAD_N)
    qkv_rows = (GROUP + 2) * HEAD_DIM * H_KV
    adapter_qkv_rows = (ADAPTER_GROUP + 2) * ADAPTER_HEAD_DIM * ADAPTER_H_KV
    turns = tl.where(is_whole(state_ptr), TURNS * (LAYERS + 1), 0)  # of a draft; 0 ends the loop
    arrivals = 0
    drafted = 0
    while turns > 0:
        # What no turn changes is not to be computed ahead of them all, nor what no tile changes ahead of a stage's
        # tiles (disable_licm): it would sit in registers through every loop over a weight or the cache.
        for turn in tl.range(0, turns, disable_licm=True):
            if turn < turns:
                block = tl.cast(turn, tl.int32) // TURNS  # the interpreter's is Python's
                adapting = block == LAYERS
                stage = turn - block * TURNS
                stage = tl.where(adapting & (stage > OUTPUT), stage + HEAD - GATE_UP, stage)
                row_ptr = table_ptr + block * TABLE_WORDS
                M = tl.where(adapting & (drafted == 0), 2, 1)
                position = before + 2 + drafted - M
                kv_heads = tl.where(adapting, ADAPTER_H_KV, H_KV)
                room = tl.where(adapting, ADAPTER_T, T)

                if stage == QKV:
                    exit_row_ptr = exit_hidden_ptr + (drafted + 2 - M) * K
                    x_ptr = tl.where(adapting, exit_row_ptr, tl.where(block == 0, newest_ptr, hidden_ptr))
                    head_stride = tl.where(adapting, adapter_head_stride, cache_head_stride)
                    row_stride = tl.where(adapting, adapter_row_stride, cache_row_stride)
                    block_eps = tl.where(adapting, adapter_eps, eps)
                    block_phases_ptr = tl.where(adapting, adapter_phases_ptr, phases_ptr)
                    if adapting & OTHER_HEADS:
                        if OTHER_HEADS:
                            qkv_stage(
                                program,
                                programs,
                                base_ptr,
                                row_ptr,
                                position,
                                x_ptr,
                                block_phases_ptr,
                                q_ptr,
                                M,
                                K,
                                kv_heads,
                                room,
                                head_stride,
                                row_stride,
                                block_eps,
                                UNIT,
                                QKV_BIAS,
                                ADAPTER_GROUP,
                                ADAPTER_HEAD_DIM,
                                BLOCK_M,
                                QKV_N,
                                BLOCK_K,
                            )
                    else:
                        qkv_stage(
                            program,
                            programs,
                            base_ptr,
                            row_ptr,
                            position,
                            x_ptr,
                            block_phases_ptr,
                            q_ptr,
                            M,
                            K,
                            kv_heads,
                            room,
                            head_stride,
                            row_stride,
                            block_eps,
                            UNIT,
                            QKV_BIAS,
                            GROUP,
                            HEAD_DIM,
                            BLOCK_M,
                            QKV_N,
                            BLOCK_K,
                        )
                elif stage == ATTEND:
                    head_stride = tl.where(adapting, adapter_head_stride, cache_head_stride)
                    row_stride = tl.where(adapting, adapter_row_stride, cache_row_stride)
                    block_scale = tl.where(adapting, adapter_scale, scale)
                    if adapting & OTHER_HEADS:
                        if OTHER_HEADS:
                            attend_stage(
                                program,
                                programs,
                                base_ptr,
                                row_ptr,
                                position,
                                q_ptr,
                                sums_ptr,
                                stats_ptr,
                                M,
                                kv_heads,
                                room,
                                block_scale,
                                head_stride,
                                row_stride,
                                UNIT,
                                ADAPTER_GROUP,
                                ADAPTER_HEAD_DIM,
                                ADAPTER_BLOCK_D,
                                ADAPTER_BLOCK_R,
                                BLOCK_T,
                                ATTENTION_STAGES,
                            )
                    else:
                        attend_stage(
                            program,
                            programs,
                            base_ptr,
                            row_ptr,
                            position,
                            q_ptr,
                            sums_ptr,
                            stats_ptr,
                            M,
                            kv_heads,
                            room,
                            block_scale,
                            head_stride,
                            row_stride,
                            UNIT,
                            GROUP,
                            HEAD_DIM,
                            BLOCK_D,
                            BLOCK_R,
                            BLOCK_T,
                            ATTENTION_STAGES,
                        )
                elif stage == MERGE:
                    if adapting & OTHER_HEADS:
                        if OTHER_HEADS:
                            merge_stage(
                                program,
                                programs,
                                position,
                                sums_ptr,
                                stats_ptr,
                                mixed_ptr,
                                M,
                                ADAPTER_GROUP * kv_heads,
                                room,
                                ADAPTER_HEAD_DIM,
                                ADAPTER_BLOCK_D,
                            )
                    else:
                        merge_stage(
                            program,
                            programs,
                            position,
                            sums_ptr,
                            stats_ptr,
                            mixed_ptr,
                            M,
                            GROUP * kv_heads,
                            room,
                            HEAD_DIM,
                            BLOCK_D,
                        )
                elif (stage == OUTPUT) | (stage == DOWN):
                    is_down = stage == DOWN
                    exit_row_ptr = exit_hidden_ptr + (drafted + 2 - M) * K
                    x_ptr = tl.where(adapting, exit_row_ptr, tl.where(block == 0, newest_ptr, hidden_ptr))
                    bias_word = tl.where(is_down, DOWN_BIAS_AT, OUTPUT_BIAS_AT)
                    queries = tl.where(adapting, ADAPTER_GROUP * ADAPTER_HEAD_DIM, GROUP * HEAD_DIM) * kv_heads
                    inputs = tl.where(is_down, I, queries)
                    last_ptr = tl.where(block == LAYERS - 1, exit_hidden_ptr + (drafted + 1) * K, hidden_ptr)
                    for tile in tl.range(program, tl.cdiv(K, LINEAR_N), programs, disable_licm=True):
                        linear_residual_tile(
                            tile,
                            tl.where(is_down, inner_ptr, mixed_ptr),
                            tensor_at(base_ptr, row_ptr, tl.where(is_down, DOWN_AT, OUTPUT_AT), UNIT),
                            tensor_at(base_ptr, row_ptr, bias_word, UNIT) if LINEAR_BIAS else None,
                            tl.where(is_down, hidden_ptr, x_ptr),
                            tl.where(adapting, adapted_ptr, tl.where(is_down, last_ptr, hidden_ptr)),
                            M,
                            K,
                            inputs,
                            inputs,
                            inputs,
                            K,
                            K,
                            BLOCK_M,
                            LINEAR_N,
                            BLOCK_K,
                        )
                elif stage == GATE_UP:
                    for tile in tl.range(program, tl.cdiv(I, GATE_UP_N), programs, disable_licm=True):
                        gate_up_tile(
                            tile,
                            hidden_ptr,
                            tensor_at(base_ptr, row_ptr, MLP_NORM_AT, UNIT),
                            tensor_at(base_ptr, row_ptr, GATE_UP_AT, UNIT),
                            tensor_at(base_ptr, row_ptr, GATE_UP_BIAS_AT, UNIT) if GATE_UP_BIAS else None,
                            inner_ptr,
                            M,
                            I,
                            K,
                            K,
                            K,
                            I,
                            eps,
                            BLOCK_M,
                            GATE_UP_N,
                            BLOCK_K,
                        )
                elif stage == HEAD:
                    x_ptr = adapted_ptr + (M - 1) * K  # the newest row alone
                    for tile in tl.range(program, tiles, programs, disable_licm=True):
                        if seed_ptr is None:
                            top1_tile(
                                tile,
                                tiles,
                                x_ptr,
                                head_norm_ptr,
                                head_ptr,
                                head_bias_ptr,
                                largest_ptr,
                                index_ptr,
                                sum_ptr,
                                1,
                                V,
                                K,
                                K,
                                K,
                                head_eps,
                                BLOCK_M,
                                HEAD_N,
                                BLOCK_K,
                            )
                        else:
                            sample_tile(
                                tile,
                                tiles,
                                (before + 2 + drafted).to(tl.int64),
                                tl.load(seed_ptr),
                                x_ptr,
                                head_norm_ptr,
                                head_ptr,
                                head_bias_ptr,
                                None,
                                score_ptr,
                                index_ptr,
                                largest_ptr,
                                sum_ptr,
                                stream,
                                tl.load(temperature_ptr),
                                1,
                                V,
                                K,
                                K,
                                K,
                                head_eps,
                                BLOCK_M,
                                HEAD_N,
                                BLOCK_K,
                            )
                else:
                    for row in tl.range(program, 1, programs, disable_licm=True):
                        merge_row(
                            row,
                            score_ptr,
                            index_ptr,
                            largest_ptr,
                            sum_ptr,
                            token_ptr + drafted,
                            confidence_ptr + drafted,
                            flags_ptr + drafted + 1,
                            threshold_ptr,
                            embedding_ptr,
                            newest_ptr,
                            tiles,
                            K,
                            K,
                            K,
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
                        if (stage != ATTEND) & (stage != MERGE) & (stage != CHOOSE):
                            prefetch_next(
                                stage,
                                program,
                                adapting,
                                base_ptr,
                                table_ptr,
                                row_ptr,
                                head_ptr,
                                tl.where(adapting, ADAPTER_GROUP * ADAPTER_HEAD_DIM, GROUP * HEAD_DIM) * kv_heads,
                                tl.where(block == LAYERS - 1, adapter_qkv_rows, qkv_rows),
                                V,
                                K,
                                I,
                                UNIT,
                                QKV_N,
                                LINEAR_N,
                                GATE_UP_N,
                                HEAD_N,
                                PREFETCH_ROWS,
                                BLOCK_K,
                                PREFETCHED,
                            )
                    turns = tl.where(wait(state_ptr, arrivals, polls, stage + 1), turns, 0)
        drafted += 1


def prepare_draft_loop(model: DraftModel, most: int) -> DraftLoop:
    """What ``draft_loop`` needs of ``model`` for up to ``most`` drafts a step."""
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
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    prepared: DraftLoop | None = None,
    out: Top1 | None = None,
) -> Top1:
    """Draft up to R tokens, in place; arguments and result as for ``reference.draft_loop``.

    With ``prepared`` (and numbers on the device) nothing is allocated but ``out``, and nothing waits for the device.
    """
    most = len(flags) - 1
    loop = DraftLoop(model, most) if prepared is None else prepared
    out = loop.check(model, flags, positions, newest, exit_hidden, out)
    sampled = temperature is not None
    if temperature is not None:
        check_sampling("draft_loop", temperature, top_k, top_p, seed, newest.device)
    vocab_size, K = model.embedding.shape
    if sampled and (real_filter(top_k, vocab_size) is not None or real_filter(top_p, 1.0) is not None):
        raise ValueError(
            f"draft_loop: top_k {top_k} and top_p {top_p} need a whole row of logits, which this kernel never has; "
            "draft with the stage kernels, or without a filter."
        )
    key = None if not sampled else seed if isinstance(seed, Tensor) else device_seed(seed, newest.device)
    on_gpu = newest.device.type != "cpu"
    head_n, tiles = loop.heads[sampled]
    shape, adapter = loop.shape, loop.adapter_shape
    draft_loop_kernel[(loop.grid,)](
        loop.base,
        loop.table,
        shape.phases,
        adapter.phases,
        model.norm,
        *loop.head,
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
        loop.mixed,
        loop.hidden,
        loop.inner,
        loop.adapted,
        tiles.scores,
        tiles.indices,
        tiles.largest,
        tiles.sums,
        loop.state,
        key,
        stream,
        None if temperature is None else device_number(temperature, newest.device),
        device_number(threshold, newest.device),
        len(model.layers),
        most,
        K,
        loop.inner.shape[1],
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
        **loop.biased,
        GROUP=shape.group,
        HEAD_DIM=shape.head_dim,
        BLOCK_D=shape.block_d,
        BLOCK_R=shape.block_rows,
        ADAPTER_GROUP=adapter.group,
        ADAPTER_HEAD_DIM=adapter.head_dim,
        ADAPTER_BLOCK_D=adapter.block_d,
        ADAPTER_BLOCK_R=adapter.block_rows,
        BLOCK_T=TILE[newest.element_size()],
        ATTENTION_STAGES=ATTENTION_STAGES,
        BLOCK_M=BLOCK_M,
        **loop.block_n,
        HEAD_N=head_n,
        BLOCK_K=step_of(newest.dtype),
        PREFETCHED=PREFETCHED_STEPS if on_gpu else 0,
        num_warps=loop.config.num_warps,
        num_stages=loop.config.num_stages,
        **loop.gpu_options,
    )
    return out
