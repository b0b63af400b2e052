"""``rank`` in Triton: the likeliest tokens behind each row of logits, for a tree of drafts.

A program owns a row. It writes the row's noisy scores once, with their sum, and then finds the best of them one after
the other, each the best below the one before. Top-k and top-p are found as for ``sample_head``. Bytes moved:
``4 * M * V``, ``C + 3`` times, which stay in the L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftVocabulary, Ranked
from kangaroo_kernels.sample_head import NUMBERS
from kangaroo_kernels.shared.ancestors import places_of
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_rank
from kangaroo_kernels.shared.filters import (
    A_ROW_ALONE,
    FILTERED,
    GroupResults,
    group,
    groups_in,
    kept_of,
    largest_of,
    numbers_at,
    order_bits,
    real_filter,
)
from kangaroo_kernels.shared.head import NO_INDEX, first_best, nan_wins
from kangaroo_kernels.shared.launch import (
    check_flag,
    device_count,
    device_number,
    device_seed,
    launch_options,
    require_interpreter,
)
from kangaroo_kernels.shared.noise import gumbel_of, gumbel_tile
from kangaroo_kernels.shared.operands import Groups, Looked
from kangaroo_kernels.shared.tiles import skipped


@triton.jit
def noise_of(seed, stream, position, first, V, tokens_ptr):
    """The noise of ``FILTERED`` rows of the head from ``first`` on."""
    positions = position + tl.zeros((1,), dtype=tl.int64)
    if tokens_ptr is None:
        noise = gumbel_tile(seed, stream, positions, first, 1, FILTERED)
    else:
        tokens = tl.load(tokens_ptr + tl.minimum(first + tl.arange(0, FILTERED), V - 1))
        noise = gumbel_of(seed, stream, positions, tokens, 1, FILTERED)
    return tl.reshape(noise, (FILTERED,))


@stable_key
@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=[*NUMBERS, "top_k_ptr", "top_p_ptr"])
def rank_kernel(
    logits_ptr,  # [M, V] float32
    scores_ptr,  # [M, V] float32
    largest_ptr,  # [M, groups] float32; this and the next two None without top-k and top-p
    mass_ptr,  # [M, groups] float32, or None: for a top-p alone
    listed_ptr,  # [M, groups] int32
    position_ptr,  # [1] int64
    seed_ptr,  # [1] int64
    active_ptr,  # [1] int32 or None
    tokens_ptr,  # [V] int32 or None
    ancestors_ptr,  # [M] int32 or None
    temperature_ptr,  # [1] float32, or None: greedy
    top_k_ptr,  # [1] int64 or None
    top_p_ptr,  # [1] float32 or None
    ranked_ptr,  # [M, C] int64
    confidence_ptr,  # [M, C] float32
    stream,
    V,
    C,
    CHAINED: tl.constexpr,
):
    """One program owns one row."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    row = tl.program_id(0)
    row_ptr, scored_ptr = logits_ptr + row.to(tl.int64) * V, scores_ptr + row.to(tl.int64) * V
    logits, scored = Looked(row_ptr, V, None, V), Looked(scored_ptr, V, None, V)
    seed = tl.load(seed_ptr)
    position = tl.load(position_ptr) + places_of(row, row + 1, ancestors_ptr)
    temperature = 1.0
    kept = tl.zeros((), dtype=tl.uint32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr)
        if listed_ptr is not None:
            start = row * groups_in(V)
            masses_ptr = None if mass_ptr is None else mass_ptr + start
            groups = Groups(largest_ptr + start, None, masses_ptr, listed_ptr + start, groups_in(V))
            kept, _ = kept_of(row_ptr, V, groups, largest_of(groups), temperature, top_k_ptr, top_p_ptr)

    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for first in range(0, V, FILTERED):
        offs = first + tl.arange(0, FILTERED)
        scores = numbers_at(logits, first)
        if temperature_ptr is not None:
            noisy = scores / temperature + noise_of(seed, stream, position, first, V, tokens_ptr)
            scores = tl.where((order_bits(scores) >= kept) & (offs < V), noisy, float("-inf"))
        tl.store(scored_ptr + offs, scores, mask=offs < V)
        higher = tl.maximum(largest, tl.max(nan_wins(scores), axis=0))
        pivot = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)  # a NaN counts as infinite, and total is NaN
        total = total * tl.exp(largest - pivot) + tl.sum(tl.exp(scores - pivot), axis=0)
        largest = higher
    tl.debug_barrier()  # all of the program's threads have written

    pivot = tl.where(largest == float("inf"), 0.0, largest)
    below, after = tl.full((), float("inf"), dtype=tl.float32), tl.full((), -1, dtype=tl.int32)
    for place in range(C):
        best, index = tl.full((), float("-inf"), dtype=tl.float32), tl.full((), NO_INDEX, dtype=tl.int32)
        for first in range(0, V, FILTERED):
            offs = first + tl.arange(0, FILTERED)
            scores = nan_wins(numbers_at(scored, first))
            left = (scores < below) | ((scores == below) & (offs > after))
            score, found = first_best(tl.where(left & (offs < V), scores, float("-inf")), offs, 0)
            index = tl.where(score > best, found, index)
            best = tl.maximum(best, score)
        token = tl.minimum(index, V - 1)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + token)
        tl.store(ranked_ptr + row * C + place, token.to(tl.int64))
        tl.store(confidence_ptr + row * C + place, tl.exp(best - pivot) / total)
        below, after = best, index


def rank(
    logits: Tensor,
    count: int,
    position: int | Tensor,
    *,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    out: Ranked | None = None,
) -> Ranked:
    """Name the best tokens behind each row; arguments and result as for ``reference.rank``."""
    require_interpreter("rank", logits)
    check_rank(logits, count, position, temperature, seed, ancestors, vocabulary, out)
    (rows, size), device = logits.shape, logits.device
    check_flag("rank", active, device)
    if out is None:
        out = Ranked.empty(rows, count, device)
    top_k, top_p = real_filter(top_k, size), real_filter(top_p, 1.0)
    degrees = None if temperature is None else device_number(temperature, device)
    groups: GroupResults | None = None
    if degrees is not None and (top_k is not None or top_p is not None):
        groups = group(logits, active, degrees, with_sums=False, with_masses=top_k is None)
    rank_kernel[(rows,)](
        logits,
        torch.empty_like(logits),
        None if groups is None else groups.largest,
        None if groups is None else groups.masses,
        None if groups is None else groups.listed,
        device_count(position, device),
        device_seed(seed, device),
        active,
        None if vocabulary is None else vocabulary.tokens,
        ancestors,
        degrees,
        None if top_k is None else device_count(top_k, device),
        None if top_p is None else device_number(top_p, device),
        out.tokens,
        out.confidences,
        TARGET_STREAM,
        size,
        count,
        **A_ROW_ALONE,
        **launch_options(logits),
    )
    return out
