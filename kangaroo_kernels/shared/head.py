"""What the two heads share: the merge of the vocabulary's tiles, and what a drafting step does with the winner.

Every tile of the vocabulary leaves, for each row, its best score with the lowest index that has it, its largest logit
and the sum of exp(logit - largest). The merge takes tiles in order, ``CHUNK`` at a time. A NaN counts as infinity: the
first of them is the token, as with ``torch.argmax``, and the confidence is NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import LEAST_DOUBT, DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.launch import device_number, launch_options
from kangaroo_kernels.shared.operands import Found, Matrix, TileParts, Trained
from kangaroo_kernels.shared.tiles import CHUNK, skipped

NO_INDEX = tl.constexpr(2**31 - 1)
"""Above every index of a head's row, so that it loses against each."""

DOUBT = tl.constexpr(LEAST_DOUBT)

MERGE_WARPS = 4
"""Warps of the merge: as many as ``draft_loop`` has, since the order of its sum depends on them."""


@triton.jit
def nan_wins(values):
    """``values`` with infinity for every NaN."""
    is_nan = values != values  # noqa: PLR0124 (a NaN differs from itself)
    return tl.where(is_nan, float("inf"), values)


@triton.jit
def first_best(scores, indices, axis: tl.constexpr):
    """The largest of ``scores`` along ``axis`` and the lowest of ``indices`` that has it."""
    best = tl.max(scores, axis=axis)
    is_best = scores == tl.expand_dims(best, axis)
    return best, tl.min(tl.where(is_best, indices, NO_INDEX), axis=axis)


@triton.jit
def exponential_sum(logits, largest, axis: tl.constexpr):
    """Sum of exp(logits - largest) along ``axis``; 0 where every logit is -inf."""
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.sum(tl.exp(logits - tl.expand_dims(pivot, axis)), axis=axis)


@triton.jit
def confidence_from(total):
    """The largest probability from the sum of exp(logit - largest); NaN where a logit was NaN, or every one -inf."""
    return 1.0 / tl.where(total > 0.0, total, float("nan"))


@triton.jit
def trained_confidence(row, probability, trained):
    """The trained confidence of ``row``; NaN where its probability or a number of its input is NaN."""
    squares, products = tl.zeros((CHUNK,), dtype=tl.float32), tl.zeros((CHUNK,), dtype=tl.float32)
    for first in range(0, trained.cols, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        there = offs < trained.cols
        wide = tl.load(trained.x_ptr + row * trained.row_stride + offs, mask=there, other=0.0).to(tl.float32)
        squares += wide * wide
        products += wide * tl.load(trained.weight_ptr + offs, mask=there, other=0.0)
    seen = tl.sum(products, axis=0) / tl.sqrt(tl.sum(squares, axis=0) / trained.cols + trained.eps)
    inside = tl.where(probability < DOUBT, DOUBT, tl.where(probability > 1.0 - DOUBT, 1.0 - DOUBT, probability))
    scale, bias = tl.load(trained.scale_bias_ptr), tl.load(trained.scale_bias_ptr + 1)
    return 1.0 / (1.0 + tl.exp(-(scale * (tl.log(inside) - tl.log(1.0 - inside)) + seen + bias)))


@triton.jit
def finish_row(row, token, probability, found):
    """Write what a head found, and whether it is sure; fetch the token's embedding for the next step.

    ``token`` is the number of the head's row that won; the best row with the lowest number has the lowest token.
    """
    confidence = probability
    if found.trained is not None:
        confidence = trained_confidence(row, probability, found.trained)
    if found.tokens_ptr is not None:
        token = tl.load(found.tokens_ptr + token)
    tl.store(found.token_ptr + row, token.to(tl.int64))
    tl.store(found.confidence_ptr + row, confidence)
    if found.threshold_ptr is not None:
        tl.store(found.sure_ptr, (confidence >= tl.load(found.threshold_ptr)).to(tl.int32))  # a NaN is unsure
    table, rows = found.embedding, found.embedded
    if table.ptr is not None:
        source = table.ptr + token.to(tl.int64) * table.row_stride
        for first in range(0, table.cols, CHUNK):
            offs = first + tl.arange(0, CHUNK)
            values = tl.load(source + offs, mask=offs < table.cols)
            tl.store(rows.ptr + row * rows.row_stride + offs, values, mask=offs < table.cols)


@triton.jit
def merge_row(row, parts, found):
    """Merge the tiles of ``row`` and finish it."""
    score = tl.full((), float("-inf"), dtype=tl.float32)
    token = tl.full((), NO_INDEX, dtype=tl.int32)
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    start = row * parts.count
    for first in range(0, parts.count, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        there = offs < parts.count
        scores = tl.load(parts.score_ptr + start + offs, mask=there, other=float("-inf"), cache_modifier=".cg")
        indices = tl.load(parts.index_ptr + start + offs, mask=there, other=NO_INDEX, cache_modifier=".cg")
        tops = tl.load(parts.largest_ptr + start + offs, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(parts.sum_ptr + start + offs, mask=there, other=0.0, cache_modifier=".cg")
        best, index = first_best(scores, indices, 0)
        token = tl.where(best > score, index, tl.where(best == score, tl.minimum(token, index), token))
        score = tl.maximum(score, best)
        higher = tl.maximum(largest, tl.max(tops, axis=0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - pivot) + tl.sum(sums * tl.exp(tops - pivot), axis=0)
        largest = higher
    finish_row(row, token, confidence_from(total), found)


@stable_key
@triton.jit(
    do_not_specialize_on_alignment=[
        "token_ptr",
        "confidence_ptr",
        "active_ptr",
        "sure_ptr",
        "threshold_ptr",
        "tokens_ptr",
        "scale_bias_ptr",
    ]
)
def merge_tiles_kernel(
    score_ptr,  # [M, tiles] float32, each tile's best score
    index_ptr,  # [M, tiles] int32, its lowest index
    largest_ptr,  # [M, tiles] float32, each tile's largest logit; the scores themselves for a greedy head
    sum_ptr,  # [M, tiles] float32
    token_ptr,  # [M] int64
    confidence_ptr,  # [M] float32
    active_ptr,  # [1] int32 or None
    sure_ptr,  # [1] int32 or None
    threshold_ptr,  # [1] float32 or None
    embedding_ptr,  # [V, K] or None
    embedded_ptr,  # [M, K] or None
    tokens_ptr,  # [V] int32 or None
    x_ptr,  # [M, K], as the five below, or None without a trained confidence
    trained_ptr,  # [K] float32
    scale_bias_ptr,  # [2] float32
    x_row_stride,
    x_cols,
    eps,
    TILES,
    embedding_row_stride,
    embedded_row_stride,
    K,
    CHAINED: tl.constexpr,
):
    """One program owns one row."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    embedding = Matrix(embedding_ptr, None, K, embedding_row_stride)
    embedded = Matrix(embedded_ptr, None, K, embedded_row_stride)
    trained = None if x_ptr is None else Trained(x_ptr, trained_ptr, scale_bias_ptr, x_row_stride, x_cols, eps)
    merge_row(
        tl.program_id(0),
        TileParts(score_ptr, index_ptr, largest_ptr, sum_ptr, TILES),
        Found(token_ptr, confidence_ptr, sure_ptr, threshold_ptr, embedding, embedded, tokens_ptr, trained),
    )


class TileResults:
    """The workspace between the two launches of a head: each tensor has one value per row and tile."""

    def __init__(self, rows: int, tiles: int, device: torch.device, sampled: bool) -> None:
        self.rows, self.tiles = rows, tiles

        def empty(dtype: torch.dtype) -> Tensor:  # each begins at an aligned address, whatever the number of rows
            return torch.empty((rows, tiles), dtype=dtype, device=device)

        self.largest, self.sums, self.indices = empty(torch.float32), empty(torch.float32), empty(torch.int32)
        self.scores = empty(torch.float32) if sampled else self.largest


def check_head(
    op: str,
    x: Tensor,
    out: Top1 | None,
    threshold: float | Tensor | None,
    sure: Tensor | None,
    embedding: Tensor | None,
    embedded: Tensor | None,
) -> Top1:
    """``out``, or a new one if it is None; raises where the settings of a drafting step do not fit each other."""
    rows = x.shape[0]
    if threshold is not None and (sure is None or rows != 1):
        raise ValueError(
            f"{op}: a threshold sets the flag of one drafted row; give active or sure, and an x of one row."
        )
    if (embedding is None) != (embedded is None):
        raise ValueError(f"{op}: give both embedding and embedded, or neither.")
    for name, table in (("embedding", embedding), ("embedded", embedded)):
        if table is not None and (table.stride(1) != 1 or table.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} is {list(table.shape)} {table.dtype}; it must be {x.dtype} with contiguous rows."
            )
    if embedding is not None and embedded is not None and embedding.shape[1] != embedded.shape[1]:
        raise ValueError(
            f"{op}: embedding has rows of {embedding.shape[1]} numbers, embedded of {embedded.shape[1]}; they must "
            "agree."
        )
    if embedded is not None and embedded.shape[0] != rows:
        raise ValueError(f"{op}: embedded has {embedded.shape[0]} rows, x {rows}; they must agree.")
    return check_top1(op, out, rows, x.device)


def check_top1(op: str, out: Top1 | None, rows: int, device: torch.device) -> Top1:
    """``out``, or a new one if it is None; raises unless it has ``rows`` rows."""
    if out is None:
        return Top1.empty(rows, device)
    if (out.token.dtype, out.confidence.dtype) != (torch.int64, torch.float32) or not (
        out.token.shape == out.confidence.shape == (rows,)
    ):
        raise ValueError(f"{op}: out must be Top1([{rows}] int64, [{rows}] float32).")
    return out


def check_vocabulary(
    op: str, matrix: Tensor, vocabulary: DraftVocabulary | None, embedding: Tensor | None
) -> Tensor | None:
    """The tokens of a head's rows, or None for all; raises where they do not fit the head ``[R, K]``."""
    if vocabulary is None:
        return None
    tokens, rows = vocabulary.tokens, matrix.shape[0]
    if tokens.shape != (rows,) or (tokens.dtype, tokens.device) != (torch.int32, matrix.device):
        raise ValueError(
            f"{op}: the vocabulary's tokens are {list(tokens.shape)} {tokens.dtype} on {tokens.device}; they must be "
            f"[{rows}] torch.int32 on {matrix.device}, one for each row of the weight."
        )
    if embedding is not None and embedding.shape[0] < vocabulary.size:
        raise ValueError(
            f"{op}: embedding has {embedding.shape[0]} rows; it must have one for each of {vocabulary.size} tokens."
        )
    return tokens.contiguous()


TrainedOperands = tuple[Tensor, Tensor, Tensor, int, int, float] | tuple[None, None, None, None, None, None]
"""What a merge is given for a trained confidence: input, weight, scale and bias, row stride, K, eps."""


def check_trained(op: str, x: Tensor, trained: TrainedConfidence | None, eps: float) -> TrainedOperands:
    """The operands of a trained confidence, or so many None; raises where it does not fit ``x`` ``[M, K]``."""
    if trained is None:
        return None, None, None, None, None, None
    for name, given, size in zip(trained._fields, trained, (x.shape[1], 2), strict=True):
        fits = given.shape == (size,) and given.is_contiguous()
        if not fits or (given.dtype, given.device) != (torch.float32, x.device):
            raise ValueError(
                f"{op}: the trained confidence's {name} is {list(given.shape)} {given.dtype} on {given.device}; "
                f"it must be [{size}] torch.float32 on {x.device}, contiguous."
            )
    return x, *trained, x.stride(0), x.shape[1], eps


def merge_tiles(
    tiles: TileResults,
    out: Top1,
    active: Tensor | None,
    threshold: float | Tensor | None,
    embedding: Tensor | None,
    embedded: Tensor | None,
    sure: Tensor | None,
    tokens: Tensor | None,
    trained: TrainedOperands,
) -> Top1:
    """Launch the merge."""
    merge_tiles_kernel[(tiles.rows,)](
        tiles.scores,
        tiles.indices,
        tiles.largest,
        tiles.sums,
        out.token,
        out.confidence,
        active,
        sure,
        None if threshold is None else device_number(threshold, out.token.device),
        embedding,
        embedded,
        tokens,
        *trained,
        tiles.tiles,
        0 if embedding is None else embedding.stride(0),
        0 if embedded is None else embedded.stride(0),
        0 if embedding is None else embedding.shape[1],
        num_warps=MERGE_WARPS,
        **launch_options(out.token),
    )
    return out
