"""Operands in bundles: kernels pass them to the functions that they call.

A kernel's own parameters stay apart, since Triton specialises them one by one; the kernel bundles them where it calls.
Fields in capitals are known at compile time. Assigning a bundle to a variable would make tensors of them, so a bundle
with such a field is made in the call itself, or declared ``tl.constexpr`` if it has no other fields. No field is called
``values`` or ``type``, since Triton's own tuples have these names. Strides count elements, sizes are int32, a row is
contiguous along its last dimension.
"""

from typing import NamedTuple

import triton.language as tl


class Matrix(NamedTuple):
    """Rows of hidden states, ``[rows, cols]`` of the model's dtype.

    Attributes:
        ptr: the first element.
        rows: M; rows beyond are zeros where they are read and are not written. None where a program knows its row.
        cols: K or N.
        row_stride: from row to row.
    """

    ptr: tl.tensor
    rows: tl.tensor | None
    cols: tl.tensor
    row_stride: tl.tensor


class Linear(NamedTuple):
    """A weight that rows are multiplied by, ``[rows, cols]``, and its bias.

    Attributes:
        ptr: the first element, of the model's dtype.
        bias_ptr: ``[rows]`` of the same dtype, or None.
        rows: N, or V for a head, or 2 * I for gate and up.
        cols: K.
        row_stride: from row to row.
    """

    ptr: tl.tensor
    bias_ptr: tl.tensor | None
    rows: tl.tensor
    cols: tl.tensor
    row_stride: tl.tensor


class Norm(NamedTuple):
    """An RMSNorm.

    Attributes:
        ptr: its weight, ``[K]`` of the model's dtype.
        eps: float32, added to the mean of squares.
    """

    ptr: tl.tensor
    eps: tl.tensor


class Queries(NamedTuple):
    """The query heads of M rows, ``[M, H, D]`` of the model's dtype.

    Attributes:
        ptr: the first element.
        rows: M.
        heads: H.
        row_stride: from row to row.
        head_stride: from head to head.
        ancestors_ptr: ``[M]`` int32, the rows of a tree that each row sees; None where the rows are a chain.
    """

    ptr: tl.tensor
    rows: tl.tensor
    heads: tl.tensor
    row_stride: tl.tensor
    head_stride: tl.tensor
    ancestors_ptr: tl.tensor | None


class Cache(NamedTuple):
    """Keys or values, ``[H_kv, T, D]`` or ``[blocks, H_kv, block_size, D]`` of the model's dtype.

    Attributes:
        ptr: the first element.
        block_stride: from block to block.
        head_stride: from head to head.
        row_stride: from position to position.
    """

    ptr: tl.tensor
    block_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor


class Caches(NamedTuple):
    """The keys and values of an attention block.

    Attributes:
        k: the keys.
        v: the values.
        table_ptr: the block table, ``[T / block_size]`` int32; None for contiguous caches.
        heads: H_kv.
        positions: T, how many positions they hold.
        BLOCK_SIZE: positions per block; 0 for contiguous caches.
    """

    k: Cache
    v: Cache
    table_ptr: tl.tensor | None
    heads: tl.tensor
    positions: tl.tensor
    BLOCK_SIZE: tl.constexpr


class Heads(NamedTuple):
    """The tiles of attention heads, all known at compile time.

    Attributes:
        GROUP: query heads per key-value head.
        DIM: D.
        BLOCK_D: a power of 2 that holds D.
        BLOCK_R: packed rows of a tile.
    """

    GROUP: tl.constexpr
    DIM: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_R: tl.constexpr


class Work(NamedTuple):
    """A program's share of attention.

    Attributes:
        split: the number of the split of the positions.
        kv_head: the number of the key-value head.
        block: the number of the block of ``BLOCK_R`` packed rows.
        start: the position where the split begins.
    """

    split: tl.tensor
    kv_head: tl.tensor
    block: tl.tensor
    start: tl.tensor


class Parts(NamedTuple):
    """What the splits of attention leave, who has arrived, and where the result goes.

    Attributes:
        sums_ptr: unnormalised sums, ``[splits, M, H, D]`` float32; None where there is only one split, whose program
            then writes the result itself.
        stats_ptr: ``[splits, M, H, 2]`` float32: maximum of base-2 scores, denominator; None where ``sums_ptr`` is.
        arrivals_ptr: ``[blocks, H_kv]`` int32, the splits of a block of packed rows that are done; 0 again when all
            are. None where ``sums_ptr`` is.
        out_ptr: the result, ``[M, H * D]`` of the model's dtype.
        out_row_stride: from row to row.
    """

    sums_ptr: tl.tensor | None
    stats_ptr: tl.tensor | None
    arrivals_ptr: tl.tensor | None
    out_ptr: tl.tensor
    out_row_stride: tl.tensor


class TileParts(NamedTuple):
    """What the tiles of a head leave, ``[M, count]`` each.

    Attributes:
        score_ptr: float32, a tile's best score; None where the score is the logit and nothing reads it.
        index_ptr: int32, the lowest token that has it.
        largest_ptr: float32, a tile's largest logit.
        sum_ptr: float32, the sum of exp(logit - largest).
        count: how many tiles there are.
    """

    score_ptr: tl.tensor | None
    index_ptr: tl.tensor
    largest_ptr: tl.tensor
    sum_ptr: tl.tensor
    count: tl.tensor


class Groups(NamedTuple):
    """What is known of each group of neighbouring logits of a row, ``[count]`` each.

    Attributes:
        largest_ptr: float32, the largest logit, infinity for a NaN.
        sum_ptr: float32, the sum of exp(logit - largest); None where nothing asks for it.
        mass_ptr: float32, the sum of exp((logit - largest) / T); None where nothing asks for it.
        listed_ptr: int32, the groups in which all kept logits lie.
        count: groups of the row.
    """

    largest_ptr: tl.tensor
    sum_ptr: tl.tensor | None
    mass_ptr: tl.tensor | None
    listed_ptr: tl.tensor
    count: tl.tensor


class Looked(NamedTuple):
    """Numbers that a filter looks at.

    Attributes:
        ptr: the first of all, float32.
        size: how many there are.
        listed_ptr: int32, the groups of them that are looked at; None for all.
        count: how many are looked at.
    """

    ptr: tl.tensor
    size: tl.tensor
    listed_ptr: tl.tensor | None
    count: tl.tensor


class Trained(NamedTuple):
    """What a trained confidence is made of, beside the probability.

    Its input is no ``Matrix``: Triton 3.6 loses a bundle that is two bundles deep.

    Attributes:
        x_ptr: the head's input, ``[M, K]`` of the model's dtype.
        weight_ptr: ``[K]`` float32.
        scale_bias_ptr: ``[2]`` float32.
        row_stride: from row to row of x.
        cols: K.
        eps: of the head's norm.
    """

    x_ptr: tl.tensor
    weight_ptr: tl.tensor
    scale_bias_ptr: tl.tensor
    row_stride: tl.tensor
    cols: tl.tensor
    eps: tl.tensor


class Found(NamedTuple):
    """Where the result of a head goes, and what a drafting step does with it.

    Attributes:
        token_ptr: ``[M]`` int64.
        confidence_ptr: ``[M]`` float32.
        sure_ptr: ``[1]`` int32, the flag; None without a threshold.
        threshold_ptr: ``[1]`` float32, or None.
        embedding: ``[V, K]``; its pointer is None where no further step needs an embedding.
        embedded: ``[M, K]``, where the tokens' embeddings go; its pointer is None where that of ``embedding`` is.
        tokens_ptr: ``[V]`` int32, the token of each of the head's rows; None where a row's number is its token.
        trained: what the confidence is made of; None where it is the probability itself.
    """

    token_ptr: tl.tensor
    confidence_ptr: tl.tensor
    sure_ptr: tl.tensor | None
    threshold_ptr: tl.tensor | None
    embedding: Matrix
    embedded: Matrix
    tokens_ptr: tl.tensor | None
    trained: Trained | None


class Noise(NamedTuple):
    """What a sample's noise is a function of, and what divides the logits.

    Attributes:
        seed: int64.
        stream: int32.
        position: int64, of the first row's new token.
        temperature: float32.
        tokens_ptr: ``[V]`` int32, the token of each of the head's rows; None where a row's number is its token.
        ancestors_ptr: ``[M]`` int32, the rows of a tree that each row sees; None where the rows are a chain.
    """

    seed: tl.tensor
    stream: tl.tensor
    position: tl.tensor
    temperature: tl.tensor
    tokens_ptr: tl.tensor | None
    ancestors_ptr: tl.tensor | None
