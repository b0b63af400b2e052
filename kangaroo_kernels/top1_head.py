"""``top1_head`` in Triton: RMSNorm, LM head, top-1 token and its softmax probability; the logits are never written.

Two launches: a program owns ``BLOCK_N`` tokens of the vocabulary and leaves three numbers per row; then one program per
row merges them. In a drafting step the merge also says in the flag ``sure`` whether the confidence reaches the
threshold, and copies the token's embedding to where the next step begins. Where the head has the rows of some tokens
alone, "token" means a row until the merge has the winner, and looks up its token. Bytes moved: the head, ``V * K``
elements, once, and ``24 * M`` bytes per tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import fetch_ahead, follow
from kangaroo_kernels.shared.head import (
    TileResults,
    check_head,
    check_trained,
    check_vocabulary,
    exponential_sum,
    first_best,
    merge_tiles,
    nan_wins,
)
from kangaroo_kernels.shared.launch import aligned_rows, check_operands, launch_options, weight_and_bias
from kangaroo_kernels.shared.operands import Linear, Matrix, Norm, TileParts
from kangaroo_kernels.shared.tiles import BLOCK_M, add_bias, norm_project, skipped


@triton.jit
def top1_tile(tile, x, norm, w, parts, BLOCK_N: tl.constexpr):
    """All rows of tokens ``tile * BLOCK_N ..``: write their ``parts``."""
    M, V = x.rows, w.rows
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = tl.minimum(cols, V - 1)  # the last tile's columns beyond the end repeat the last one
    logits = norm_project(x, norm, w, owned, BLOCK_N)
    if w.bias_ptr is not None:
        logits = add_bias(logits, w.bias_ptr, cols, V)
    logits = tl.where(cols[None, :] < V, logits, float("-inf"))
    largest, index = first_best(nan_wins(logits), tl.broadcast_to(cols[None, :], (BLOCK_M, BLOCK_N)), 1)
    total = exponential_sum(logits, largest, 1)
    rows = tl.arange(0, BLOCK_M)
    slots = rows * parts.count + tile
    tl.store(parts.largest_ptr + slots, largest, mask=rows < M)
    tl.store(parts.index_ptr + slots, index, mask=rows < M)
    tl.store(parts.sum_ptr + slots, total, mask=rows < M)


@stable_key
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["active_ptr"])
def top1_head_kernel(
    x_ptr,  # [M, K]
    norm_ptr,  # [K]
    w_ptr,  # [V, K]
    bias_ptr,  # [V] or None
    largest_ptr,  # [M, tiles] float32
    index_ptr,  # [M, tiles] int32
    sum_ptr,  # [M, tiles] float32
    active_ptr,  # [1] int32 or None
    M,
    V,
    K,
    x_row_stride,
    w_row_stride,
    eps,
    BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns all rows of ``BLOCK_N`` tokens."""
    fetch_ahead(w_ptr, w_row_stride, V, K, active_ptr, BLOCK_N, CHAINED)
    follow(CHAINED)
    if skipped(active_ptr):
        return
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    top1_tile(
        tile,
        Matrix(x_ptr, M, K, x_row_stride),
        Norm(norm_ptr, eps),
        Linear(w_ptr, bias_ptr, V, K, w_row_stride),
        TileParts(None, index_ptr, largest_ptr, sum_ptr, tiles),
        BLOCK_N,
    )


def top1_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    *,
    eps: float,
    vocabulary: DraftVocabulary | None = None,
    trained: TrainedConfidence | None = None,
    threshold: float | Tensor | None = None,
    active: Tensor | None = None,
    sure: Tensor | None = None,
    embedding: Tensor | None = None,
    embedded: Tensor | None = None,
    out: Top1 | None = None,
) -> Top1:
    """The most likely token of each row; arguments and result as for ``reference.top1_head``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("top1_head", x, norm_weight, matrix, active)
    x = aligned_rows(x)
    sure = active if sure is None else sure
    out = check_head("top1_head", x, out, threshold, sure, embedding, embedded)
    tokens = check_vocabulary("top1_head", matrix, vocabulary, embedding)
    operands = check_trained("top1_head", x, trained, eps)
    config = launch_config("top1_head", matrix.shape[0], matrix.shape[1], x)
    tiles = TileResults(x.shape[0], triton.cdiv(matrix.shape[0], config.block_n), x.device, sampled=False)
    top1_head_kernel[(tiles.tiles,)](
        x,
        norm_weight,
        matrix,
        bias,
        tiles.largest,
        tiles.indices,
        tiles.sums,
        active,
        x.shape[0],
        matrix.shape[0],
        matrix.shape[1],
        x.stride(0),
        matrix.stride(0),
        eps,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return merge_tiles(tiles, out, active, threshold, embedding, embedded, sure, tokens, operands)
