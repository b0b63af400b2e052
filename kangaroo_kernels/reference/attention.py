"""``attention``: M query rows over the KV cache, causal among the rows in flight.

    out[m] = softmax(scale * q[m] @ K[:position + m + 1]^T) @ V[:position + m + 1]

Rows of a tree see the text before it and, of the tree, the rows on their own path.
Grouped queries (GQA) are packed into the rows, so the cache is read once for all of a group.
Bytes moved: ``2 * H_kv * (position + M) * D`` elements.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kangaroo_kernels.reference.ancestors import rows_ahead, seen_rows
from kangaroo_kernels.reference.qkv_rope import paged_rows
from kangaroo_kernels.shared.checks import check_ancestors, check_max_length

MANY_ROWS = 64
"""From this many rows on (a prefill), PyTorch's fused attention repays its overhead."""


@lru_cache(maxsize=8)
def _unused(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``baddbmm`` takes where there is nothing to add."""
    return torch.empty((), dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _causal_mask(rows: int, length: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive, ``group`` times over: row m of the last ``rows`` positions sees ``length - rows + m + 1`` keys."""
    mask = torch.full((rows, length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(length - rows + 1).repeat(group, 1)


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
        k_cache: ``[H_kv, T, D]``, any strides (the kernel: 1 along D); ``H`` is a multiple of ``H_kv``. With a block
            table, ``[blocks, H_kv, block_size, D]``.
        v_cache: as ``k_cache``. Rows from ``position + M`` on have no effect.
        position: absolute position of the first query row; a tensor ``[1]`` int64 for a kernel that must not ask the
            host.
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
    length = position + q.shape[0]
    if block_table is None:
        keys, values = k_cache[:, :length], v_cache[:, :length]
    else:
        blocks, slots = paged_rows(block_table, 0, length, k_cache.shape[2])
        keys, values = k_cache[blocks, :, slots].transpose(0, 1), v_cache[blocks, :, slots].transpose(0, 1)
    result = _attend(q, keys, values, position, scale, ancestors)
    return result if out is None else out.copy_(result)


def _tree_mask(ancestors: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """As ``_causal_mask`` for the rows of a tree, whose last row is the last of the ``length`` slots."""
    rows = len(ancestors)
    tree = rows_ahead(ancestors) + rows
    mask = torch.zeros(rows, length, dtype=dtype, device=ancestors.device)
    mask[:, length - tree :].masked_fill_(~seen_rows(ancestors)[:, :tree], float("-inf"))
    return mask.repeat(group, 1)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float, ancestors: Tensor | None = None
) -> Tensor:
    """``attention`` over the rows of the cache that the text has: ``[H_kv, position + M, D]``."""
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
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
