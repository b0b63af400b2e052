"""``sample_head`` in Triton: RMSNorm, LM head, and a sample by Gumbel-max, the noise made in registers.

Without a filter it is ``top1_head`` with a score beside every logit, and the logits are never written. Top-k and top-p
need to see a whole row: then the head's tiles write their logits (``4 * M * V`` bytes, which stay in the L2), many
programs look at each group of 32 of them, and one program per row finds the smallest logit that is kept and samples
(``shared/filters.py`` says how). It makes noise for the groups that hold a kept logit alone. Bytes moved: the head,
``V * K`` elements, once.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.launch_config import LaunchConfig, launch_config
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.shared.ancestors import places_of
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import fetch_ahead, follow
from kangaroo_kernels.shared.checks import check_ancestors, check_count, check_sampling
from kangaroo_kernels.shared.filters import (
    A_ROW_ALONE,
    FILTERED,
    GROUP,
    group,
    groups_in,
    kept_of,
    largest_of,
    noise_at,
    numbers_at,
    order_bits,
    places_at,
    real_filter,
    sum_over_groups,
)
from kangaroo_kernels.shared.head import (
    TileResults,
    check_head,
    check_trained,
    check_vocabulary,
    confidence_from,
    exponential_sum,
    finish_row,
    first_best,
    merge_tiles,
    nan_wins,
)
from kangaroo_kernels.shared.launch import (
    aligned_rows,
    check_operands,
    device_count,
    device_number,
    device_seed,
    launch_options,
    weight_and_bias,
)
from kangaroo_kernels.shared.noise import gumbel_of, gumbel_tile
from kangaroo_kernels.shared.operands import Found, Groups, Linear, Looked, Matrix, Noise, Norm, TileParts, Trained
from kangaroo_kernels.shared.tiles import BLOCK_M, add_bias, norm_project, skipped

NUMBERS = ["position_ptr", "seed_ptr", "active_ptr", "temperature_ptr", "tokens_ptr", "ancestors_ptr"]  # lie anywhere


@triton.jit
def sample_tile(tile, noise, x, norm, w, logits_ptr, parts, BLOCK_N: tl.constexpr):
    """All rows of tokens ``tile * BLOCK_N ..``: write their logits, [M, V] float32; if None, their ``parts``."""
    M, V = x.rows, w.rows
    first = tile * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    owned = tl.minimum(cols, V - 1)  # the last tile's columns beyond the end repeat the last one
    logits = norm_project(x, norm, w, owned, BLOCK_N)
    if w.bias_ptr is not None:
        logits = add_bias(logits, w.bias_ptr, cols, V)
    rows = tl.arange(0, BLOCK_M)
    if logits_ptr is not None:
        mask = (rows[:, None] < M) & (cols[None, :] < V)
        tl.store(logits_ptr + rows[:, None].to(tl.int64) * V + cols[None, :], logits, mask=mask)
    else:
        logits = tl.where(cols[None, :] < V, logits, float("-inf"))
        scores, positions = logits / noise.temperature, noise.position + places_of(rows, M, noise.ancestors_ptr)
        if noise.tokens_ptr is None:
            gumbels = gumbel_tile(noise.seed, noise.stream, positions, first, BLOCK_M, BLOCK_N)
        else:
            tokens = tl.load(noise.tokens_ptr + owned)
            gumbels = gumbel_of(noise.seed, noise.stream, positions, tokens, BLOCK_M, BLOCK_N)
        scores += gumbels
        score, index = first_best(nan_wins(scores), tl.broadcast_to(cols[None, :], (BLOCK_M, BLOCK_N)), 1)
        largest = tl.max(nan_wins(logits), axis=1)
        total = exponential_sum(logits, largest, 1)
        slots = rows * parts.count + tile
        tl.store(parts.score_ptr + slots, score, mask=rows < M)
        tl.store(parts.index_ptr + slots, index, mask=rows < M)
        tl.store(parts.largest_ptr + slots, largest, mask=rows < M)
        tl.store(parts.sum_ptr + slots, total, mask=rows < M)


@stable_key
@triton.jit(do_not_specialize=["M", "stream"], do_not_specialize_on_alignment=NUMBERS)
def sample_head_kernel(
    x_ptr,  # [M, K]
    norm_ptr,  # [K]
    w_ptr,  # [V, K]
    bias_ptr,  # [V] or None
    logits_ptr,  # [M, V] float32, or None: then the four below are written
    score_ptr,  # [M, tiles] float32
    index_ptr,  # [M, tiles] int32
    largest_ptr,  # [M, tiles] float32
    sum_ptr,  # [M, tiles] float32
    position_ptr,  # [1] int64: of the first row's new token
    seed_ptr,  # [1] int64
    active_ptr,  # [1] int32 or None
    tokens_ptr,  # [V] int32 or None
    ancestors_ptr,  # [M] int32 or None
    stream,
    temperature_ptr,  # [1] float32
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
    position = tl.load(position_ptr)  # early: they arrive while the weight streams
    seed = tl.load(seed_ptr)
    temperature = tl.load(temperature_ptr)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    sample_tile(
        tile,
        Noise(seed, stream, position, temperature, tokens_ptr, ancestors_ptr),
        Matrix(x_ptr, M, K, x_row_stride),
        Norm(norm_ptr, eps),
        Linear(w_ptr, bias_ptr, V, K, w_row_stride),
        logits_ptr,
        TileParts(score_ptr, index_ptr, largest_ptr, sum_ptr, tiles),
        BLOCK_N,
    )


@stable_key
@triton.jit(
    do_not_specialize=["stream"],
    do_not_specialize_on_alignment=[
        *NUMBERS,
        "token_ptr",
        "confidence_ptr",
        "sure_ptr",
        "threshold_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "scale_bias_ptr",
    ],
)
def filtered_sample_kernel(
    logits_ptr,  # [M, V] float32
    largest_ptr,  # [M, groups] float32
    sum_ptr,  # [M, groups] float32
    mass_ptr,  # [M, groups] float32, or None: for a top-p alone
    listed_ptr,  # [M, groups] int32
    position_ptr,  # [1] int64
    seed_ptr,  # [1] int64
    token_ptr,  # [M] int64
    confidence_ptr,  # [M] float32
    active_ptr,  # [1] int32 or None
    sure_ptr,  # [1] int32 or None
    threshold_ptr,  # [1] float32 or None
    embedding_ptr,  # [V, K] or None
    embedded_ptr,  # [M, K] or None
    tokens_ptr,  # [V] int32 or None
    ancestors_ptr,  # [M] int32 or None
    x_ptr,  # [M, K], as the five below, or None without a trained confidence
    trained_ptr,  # [K] float32
    scale_bias_ptr,  # [2] float32
    x_row_stride,
    x_cols,
    eps,
    stream,
    temperature_ptr,  # [1] float32
    top_k_ptr,  # [1] int64 or None
    top_p_ptr,  # [1] float32 or None
    V,
    embedding_row_stride,
    embedded_row_stride,
    K,
    CHAINED: tl.constexpr,
):
    """One program owns one row."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    temperature = tl.load(temperature_ptr)
    row = tl.program_id(0)
    row_ptr, start = logits_ptr + row.to(tl.int64) * V, row * groups_in(V)
    masses_ptr = None if mass_ptr is None else mass_ptr + start
    groups = Groups(largest_ptr + start, sum_ptr + start, masses_ptr, listed_ptr + start, groups_in(V))
    largest = largest_of(groups)
    total = sum_over_groups(groups, groups.sum_ptr, largest, 1.0)
    kept, listed = kept_of(row_ptr, V, groups, largest, temperature, top_k_ptr, top_p_ptr)

    positions = tl.load(position_ptr) + places_of(row, row + 1, ancestors_ptr) + tl.zeros((1,), dtype=tl.int64)
    seed = tl.load(seed_ptr)
    looked = Looked(row_ptr, V, groups.listed_ptr, listed * GROUP)
    score = tl.full((), float("-inf"), dtype=tl.float32)
    token = tl.zeros((), dtype=tl.int32)  # of a row of nothing but -inf
    for first in range(0, looked.count, FILTERED):
        logits, places = numbers_at(looked, first), places_at(looked, first)
        noise = noise_at(seed, stream, positions, looked, first, tokens_ptr)
        scores = tl.where(order_bits(logits) >= kept, nan_wins(logits / temperature + noise), float("-inf"))
        best, index = first_best(tl.reshape(scores, (FILTERED,)), tl.reshape(places, (FILTERED,)), 0)
        token = tl.where(best > score, index, tl.where(best == score, tl.minimum(token, index), token))
        score = tl.maximum(score, best)
    embedding = Matrix(embedding_ptr, None, K, embedding_row_stride)
    embedded = Matrix(embedded_ptr, None, K, embedded_row_stride)
    trained = None if x_ptr is None else Trained(x_ptr, trained_ptr, scale_bias_ptr, x_row_stride, x_cols, eps)
    found = Found(token_ptr, confidence_ptr, sure_ptr, threshold_ptr, embedding, embedded, tokens_ptr, trained)
    finish_row(row, token, confidence_from(total), found)


def launch(
    config: LaunchConfig,
    x: Tensor,
    norm_weight: Tensor,
    weight: tuple[Tensor, Tensor | None],
    logits: Tensor | None,
    results: TileResults | None,
    noise: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, Tensor],
    eps: float,
) -> None:
    """Launch the kernel that writes ``logits`` or, for ``results``, samples in tiles.

    ``noise`` is what a token is drawn by: position, seed, ``active``, the tokens of the weight's rows, ``ancestors``,
    stream and temperature.
    """
    (matrix, bias), (position, seed, active, tokens, ancestors, stream, temperature) = weight, noise
    sample_head_kernel[(triton.cdiv(matrix.shape[0], config.block_n),)](
        x,
        norm_weight,
        matrix,
        bias,
        logits,
        results and results.scores,
        results and results.indices,
        results and results.largest,
        results and results.sums,
        position,
        seed,
        active,
        tokens,
        ancestors,
        stream,
        temperature,
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


def sample_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    position: int | Tensor,
    *,
    eps: float,
    temperature: float | Tensor,
    seed: int | Tensor,
    stream: int = TARGET_STREAM,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
    trained: TrainedConfidence | None = None,
    ancestors: Tensor | None = None,
    threshold: float | Tensor | None = None,
    active: Tensor | None = None,
    sure: Tensor | None = None,
    embedding: Tensor | None = None,
    embedded: Tensor | None = None,
    out: Top1 | None = None,
) -> Top1:
    """Sample a token for each row; arguments and result as for ``reference.sample_head``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("sample_head", x, norm_weight, matrix, active)
    x = aligned_rows(x)
    check_count("sample_head", "position", position, x.device)
    check_sampling("sample_head", temperature, top_k, top_p, seed, x.device)
    check_ancestors("sample_head", ancestors, len(x), x.device)
    sure = active if sure is None else sure
    out = check_head("sample_head", x, out, threshold, sure, embedding, embedded)
    tokens = check_vocabulary("sample_head", matrix, vocabulary, embedding)
    operands = check_trained("sample_head", x, trained, eps)
    rows, vocab_size = x.shape[0], matrix.shape[0]
    top_k, top_p = real_filter(top_k, vocab_size), real_filter(top_p, 1.0)
    filtered = top_k is not None or top_p is not None
    where = device_count(position, x.device)
    key = device_seed(seed, x.device)
    degrees = device_number(temperature, x.device)
    config = launch_config("sample_head", vocab_size, matrix.shape[1], x)
    logits = torch.empty((rows, vocab_size), dtype=torch.float32, device=x.device) if filtered else None
    tiles = triton.cdiv(vocab_size, config.block_n)
    results = None if filtered else TileResults(rows, tiles, x.device, sampled=True)
    noise = where, key, active, None if filtered else tokens, None if filtered else ancestors, stream, degrees
    launch(config, x, norm_weight, (matrix, bias), logits, results, noise, eps)
    if results is not None:
        return merge_tiles(results, out, active, threshold, embedding, embedded, sure, tokens, operands)
    groups = group(cast(Tensor, logits), active, degrees, with_sums=True, with_masses=top_k is None)
    filtered_sample_kernel[(rows,)](
        logits,
        *groups,
        where,
        key,
        out.token,
        out.confidence,
        active,
        sure,
        None if threshold is None else device_number(threshold, x.device),
        embedding,
        embedded,
        tokens,
        ancestors,
        *operands,
        stream,
        degrees,
        None if top_k is None else device_count(top_k, x.device),
        None if top_p is None else device_number(top_p, x.device),
        vocab_size,
        0 if embedding is None else embedding.stride(0),
        0 if embedded is None else embedded.stride(0),
        0 if embedding is None else embedding.shape[1],
        **A_ROW_ALONE,
        **launch_options(x),
    )
    return out


def lm_head(x: Tensor, norm_weight: Tensor, weight: Weight, *, eps: float, active: Tensor | None = None) -> Tensor:
    """The logits that ``sample_head`` samples from, ``[M, V]`` float32; arguments as for ``reference.lm_head``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("lm_head", x, norm_weight, matrix, active)
    x, unused = aligned_rows(x), device_count(0, x.device)
    config = launch_config("sample_head", matrix.shape[0], matrix.shape[1], x)
    logits = torch.empty((x.shape[0], matrix.shape[0]), dtype=torch.float32, device=x.device)
    no_noise = (unused, unused, active, None, None, TARGET_STREAM, unused.view(torch.float32))
    launch(config, x, norm_weight, (matrix, bias), logits, None, no_noise, eps)
    return logits
