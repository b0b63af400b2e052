"""``attention``: M query rows over the KV cache, causal among the rows in flight.

    out[m] = softmax(scale * q[m] @ K[:position + m + 1]^T) @ V[:position + m + 1]

Rows of a tree see the text before it and, of the tree, the rows on their own path.
Grouped queries (GQA) are packed into the rows, so the cache is read once for all of a group.
Bytes moved: ``2 * H_kv * (position + M) * D`` elements.

A cache may be of another dtype than the queries: float16 beside float32. It is converted as it is read, so every
product and sum is a float32 one.
"""

from functools import lru_cache, partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import pad

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.reference.ancestors import rows_ahead, seen_rows
from kangaroo_kernels.reference.qkv_rope import paged_rows
from kangaroo_kernels.shared.checks import check_ancestors, check_max_length

MANY_ROWS = 64
"""From this many rows on (a prefill), PyTorch's fused attention repays its overhead on a CPU."""

FUSED_ON = "cuda"
"""Where every prefill takes PyTorch's fused attention, a short one behind a long text, too."""

ROWS, POSITIONS = 8, 384
"""What ``_attend_alike`` fills rows and positions up to multiples of."""


@lru_cache(maxsize=8)
def _unused(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``baddbmm`` takes where there is nothing to add."""
    return torch.empty((), dtype=dtype, device=device)


@lru_cache(maxsize=4)  # all layers of a pass ask for one, the next pass for another one
def _causal_mask(rows: int, length: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive, ``group`` times over: row m of the last ``rows`` positions sees ``length - rows + m + 1`` keys."""
    mask = torch.full((rows, length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(length - rows + 1).repeat(group, 1)


@lru_cache(maxsize=64)
def _unseen(rows: int, positions: int, group: int, device: torch.device) -> Tensor:
    """Which of ``positions``, from the first row's own one on, row m does not see, ``group`` times over."""
    return torch.ones(rows, positions, dtype=torch.bool, device=device).triu_(1).repeat(group, 1)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    block_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    arrivals: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from M rows at ``position, position + 1, ...``, each to the cache up to its own position.

    Args:
        q: ``[M, H, D]``, any strides.
        k_cache: ``[H_kv, T, D]``, any strides (the kernel: 1 along D), any dtype (the kernel: that of ``q``); ``H`` is
            a multiple of ``H_kv``. With a block table, ``[blocks, H_kv, block_size, D]``.
        v_cache: as ``k_cache``. Rows from ``position + M`` on have no effect.
        position: absolute position of the first query row; a tensor ``[1]`` int64 for a kernel that must not ask the
            host. A chain's row that lies before position 0 sees nothing, and its result is 0.
        scale: of the scores, ``D ** -0.5`` for Llama.
        max_length: bound of ``position + M``, for the kernel's grid; None means the caches' capacity.
        block_table: ``[T / block_size]`` int32, the blocks of a paged cache in the order of positions.
        ancestors: ``[M]`` int32, for rows that are a tree (``reference/ancestors.py``): row m lies in slot
            ``position + m`` of the cache. The kernel adds up what a row sees in the order of the text, wherever it
            lies, so the row has the bits that it has in a chain.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        arrivals: ``[>= H]`` int32, all 0, which the kernel counts in and leaves 0. Launches that may run at the same
            time must not share them: they belong to one text. None makes new ones, at the price of another launch.
        out: ``[M, H * D]``, made if None.

    Returns:
        ``out``, ``[M, H * D]``, dtype of ``q``.

    Raises:
        ValueError: a ``max_length`` below ``position + M``, where the position is a number.
    """
    check_max_length(max_length, position, q.shape[0])
    check_ancestors("attention", ancestors, q.shape[0], q.device)
    if active is not None and not active:
        return q.new_empty(q.shape[0], q.shape[1] * q.shape[2]) if out is None else out
    position = int(position)
    if position < 0:
        placed = attention(q[-position:], k_cache, v_cache, 0, scale=scale, block_table=block_table)
        result = pad(placed, (0, 0, -position, 0))
        return result if out is None else out.copy_(result)
    length = position + q.shape[0]
    keys, values = k_cache, v_cache
    if block_table is not None:
        blocks, slots = paged_rows(block_table, 0, length, k_cache.shape[2])
        keys, values = k_cache[blocks, :, slots].transpose(0, 1), v_cache[blocks, :, slots].transpose(0, 1)
    if keys.dtype != q.dtype and q.shape[0] < MANY_ROWS:
        result = _attend_alike(q, keys, values, position, scale, ancestors)
    else:
        result = _attend(q, keys[:, :length].to(q.dtype), values[:, :length].to(q.dtype), position, scale, ancestors)
    return result if out is None else out.copy_(result)


def _tree_mask(ancestors: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """As ``_causal_mask`` for the rows of a tree, whose last row is the last of the ``length`` slots."""
    rows = len(ancestors)
    tree = rows_ahead(ancestors) + rows
    mask = torch.zeros(rows, length, dtype=dtype, device=ancestors.device)
    mask[:, length - tree :].masked_fill_(~seen_rows(ancestors)[:, :tree], float("-inf"))
    return mask.repeat(group, 1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float, ancestors: Tensor | None) -> Tensor:
    """``attention`` over the rows of the cache that the text has: ``[H_kv, position + M, D]``."""
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    if q.device.type == FUSED_ON and rows > MAX_ROWS and ancestors is None:
        return _prefill_on_gpu(q, keys, values, scale)
    if rows >= MANY_ROWS:
        whole = position == 0  # else the mask is made anew: it is as large as the text, and rarely wanted again
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=None if whole else _causal_mask.__wrapped__(rows, length, 1, q.dtype, q.device),
            is_causal=whole,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        return out[0].transpose(0, 1).reshape(rows, -1)
    group = heads // kv_heads
    keys = keys.transpose(1, 2)
    if rows == 1 and ancestors is None:  # most of decoding: nothing is masked, and the heads lie in order already
        packed = q.view(kv_heads, group, head_dim)
        scores = torch.baddbmm(_unused(q.dtype, q.device), packed, keys, beta=0, alpha=scale)
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(1, -1)
    packed = q.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, group * rows, head_dim)
    if ancestors is None:
        mask = _causal_mask(rows, length, group, q.dtype, q.device)
    else:
        mask = _tree_mask(ancestors, length, group, q.dtype)
    scores = torch.baddbmm(mask, packed, keys, alpha=scale)
    out = torch.bmm(torch.softmax(scores, dim=-1), values)
    return out.view(kv_heads, group, rows, head_dim).permute(2, 0, 1, 3).reshape(rows, -1)


def _prefill_on_gpu(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """``_attend`` for more rows than the kernels take, whose scores a GPU never holds whole, nor rounds to 16 bits.

    Fused kernels take no mask made of numbers, but know of rows that are the last of a longer text. The one for 16-bit
    numbers takes groups; the one for float32 does not, so each query head gets its own copy of keys and values.
    """
    bias = import_module("torch.nn.attention.bias")  # which imports Triton, so it is fetched where it is used
    rows, heads, _ = q.shape
    if q.dtype == torch.float32 and len(keys) < heads:
        keys, values = (each.repeat_interleave(heads // len(each), dim=0) for each in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=bias.causal_lower_right(rows, keys.shape[1]),
        scale=scale,
        enable_gqa=len(keys) < heads,
    )
    return out[0].transpose(0, 1).reshape(rows, -1)


@lru_cache(maxsize=8)
def rows_are_alike(group: int, head_dim: int) -> bool:
    """Whether, over a float16 cache, rows at once have the bits that each has alone on this machine; it is tried.

    ``group`` is the number of query heads that share a key-value head.
    """
    most, scale, random = 16, head_dim**-0.5, partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for position in (0, POSITIONS - 7, 3 * POSITIONS - 3):
        q = random(most, 2 * group, head_dim, dtype=torch.float32)
        keys, values = random(2, 2, position + most, head_dim).half().unbind()
        alone = [attention(q[row : row + 1], keys, values, position + row, scale=scale) for row in range(most)]
        for rows in (2, 3, 5, most):
            if not torch.equal(attention(q[:rows], keys, values, position, scale=scale), torch.cat(alone[:rows])):
                return False
    return True


def _attend_alike(
    q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float, ancestors: Tensor | None
) -> Tensor:
    """``attention`` over contiguous positions, where a row has the same bits whatever is computed beside it.

    Where a last bit differed, a later layer's key could round to another float16 number: a difference in the fourth
    digit between plain decoding and verification. MKL, PyTorch's library on x86, keeps a row's bits where rows come in
    eights and positions in blocks of 384 (seen on an Intel Xeon with AMX; AMD's Zen 5 is content with fours and 192):
    what is left over takes other paths, and long sums are cut by their length. So both are filled up, which costs
    little, as the cache is copied anyway to be converted. ``rows_are_alike`` says whether that suffices on this
    machine. A tree's rows have other bits than a chain's, since what they do not see lies between.
    """
    rows, heads, head_dim = q.shape
    kv_heads, length = keys.shape[0], position + rows
    group, filled = heads // kv_heads, length + -length % POSITIONS
    used = group * rows
    packed = q.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, used, head_dim)
    packed = pad(packed, (0, 0, 0, -used % ROWS))
    converted = q.new_empty(kv_heads, filled, head_dim)  # keys, then values: memory that the processor still holds
    converted[:, length:] = 0
    converted[:, :length] = keys[:, :length]
    scores = torch.baddbmm(_unused(q.dtype, q.device), packed, converted.transpose(1, 2), beta=0, alpha=scale)
    if ancestors is None:
        begin, unseen = position, _unseen(rows, filled - position, group, q.device)
    else:
        begin = position - rows_ahead(ancestors)
        unseen = pad(~seen_rows(ancestors)[:, : length - begin], (0, filled - length), value=True).repeat(group, 1)
    scores[:, :used, begin:].masked_fill_(unseen, float("-inf"))
    converted[:, :length] = values[:, :length]
    out = torch.bmm(torch.softmax(scores, dim=-1), converted)
    return out[:, :used].view(kv_heads, group, rows, head_dim).permute(2, 0, 1, 3).reshape(rows, -1)
