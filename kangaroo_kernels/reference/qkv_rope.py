"""``qkv_rope``: RMSNorm, the QKV projection, RoPE, and the append of K and V to the cache.

    n = rms_norm(x);  q, k, v = split(n @ W^T + b);  q, k = rope(q), rope(k);  cache[position:position + M] = k, v

RoPE (Su et al., arXiv 2104.09864) turns the pair ``(x[2i], x[2i + 1])`` of every head by the angle
``position * inv_freq[i]``: one complex product. Checkpoints in Hugging Face's order keep the pair at
``(i, i + D / 2)``; ``interleave_rope`` reorders their rows once at load, after which a pair lies in one tile of the
projection.

Bytes moved: the weight, ``K * (H + 2 * H_kv) * D`` elements, once; everything else is M rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kangaroo_kernels.packed_weight import Weight, out_features
from kangaroo_kernels.reference.ancestors import depths, rows_ahead
from kangaroo_kernels.reference.rms_norm import norm_linear
from kangaroo_kernels.shared.checks import check_ancestors


def interleave_rope(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, ``[H * D, ...]``, from half-split to adjacent pairs."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def separate_rope(rows: Tensor, head_dim: int) -> Tensor:
    """``interleave_rope`` undone: rows ``[H * D, ...]`` from adjacent pairs to half-split."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def rope_table(inv_freq: Tensor, length: int, scaling: float = 1.0) -> Tensor:
    """``exp(i * position * inv_freq) * scaling`` for positions ``[0, length)``: ``[length, 1, D / 2]`` complex64."""
    angles = torch.arange(length, device=inv_freq.device, dtype=torch.float32)[:, None, None] * inv_freq
    return torch.polar(torch.full_like(angles, scaling), angles)


def paged_rows(block_table: Tensor, first: int, last: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Block and slot of positions ``first .. last`` of a paged cache: two ``[last - first]`` int64."""
    positions = torch.arange(first, last, device=block_table.device)
    return block_table.long()[positions // block_size], positions % block_size


def cached(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys and values as a cache of ``dtype`` keeps them. What overflows there is NaN, which later rows notice."""
    return rows if rows.dtype == dtype else overflow_as_nan(rows.to(dtype))


def overflow_as_nan(rows: Tensor) -> Tensor:
    """Put NaN in the place of infinity, in place.

    A query or key of infinity can give a score of minus infinity, and a position would pass unseen.
    """
    nan = float("nan")
    return rows.nan_to_num_(nan=nan, posinf=nan, neginf=nan)


def qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    eps: float,
    block_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project M tokens at ``position, position + 1, ...`` and append their keys and values.

    Args:
        x: ``[M, K]`` hidden states.
        norm_weight: ``[K]``, same dtype.
        weight: ``[(H + 2 * H_kv) * D, K]``, rows q, k, v, the first two with ``interleave_rope`` applied.
        table: ``[T, 1, D / 2]`` complex64 from ``rope_table``, or the same as ``[T, 1, D / 2, 2]`` float32.
        k_cache: ``[H_kv, T, D]``, any strides (the kernel: 1 along D), any dtype (the kernel: of ``x``); rows
            ``position .. position + M`` are written. With a block table, ``[blocks, H_kv, block_size, D]``.
        v_cache: as ``k_cache``.
        position: absolute position of the first row; a tensor ``[1]`` int64 for a kernel that must not ask the host.
            Of a chain's rows that lie before position 0 nothing is written, and their queries mean nothing; one row
            at least lies at position 0 or behind it.
        eps: of the norm.
        block_table: ``[T / block_size]`` int32, the blocks of a paged cache in the order of positions.
        ancestors: ``[M]`` int32, for rows that are a tree (``reference/ancestors.py``): ``position`` is then the first
            row's slot in the cache, and each row is turned by its own place in the text.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        out: ``[M, H, D]``, made if None.

    Returns:
        The turned queries, ``[M, H, D]``: ``out``, or a view of the projection's output.
    """
    check_ancestors("qkv_rope", ancestors, x.shape[0], x.device)
    kv_heads, head_dim = k_cache.shape[-3], k_cache.shape[-1]
    if active is not None and not active:
        heads = out_features(weight) // head_dim - 2 * kv_heads
        return x.new_empty(x.shape[0], heads, head_dim) if out is None else out
    position = int(position)
    if position < 0:
        placed = qkv_rope(
            x[-position:], norm_weight, weight, table, k_cache, v_cache, 0, eps=eps, block_table=block_table
        )
        queries = pad(placed, (0, 0, 0, 0, -position, 0))
        return queries if out is None else out.copy_(queries)
    rows, last = x.shape[0], position + x.shape[0]
    qkv = norm_linear(x, norm_weight, eps, weight).view(rows, -1, head_dim)
    turned = qkv[:, :-kv_heads]
    phases = table if table.is_complex() else torch.view_as_complex(table)
    if ancestors is None:
        phases = phases[position:last]
    else:
        phases = phases[position - rows_ahead(ancestors) + depths(ancestors)]
    if qkv.dtype == torch.float32:
        torch.view_as_complex(turned.view(rows, -1, head_dim // 2, 2)).mul_(phases)
    else:
        pairs = torch.view_as_complex(turned.float().view(rows, -1, head_dim // 2, 2))
        turned.copy_(torch.view_as_real(pairs * phases).flatten(-2))
    if qkv.dtype == torch.float16:
        overflow_as_nan(qkv)
    queries, new = qkv.split_with_sizes((qkv.shape[1] - 2 * kv_heads, 2 * kv_heads), dim=1)
    new_keys, new_values = cached(new, k_cache.dtype).split(kv_heads, dim=1)
    if block_table is None:
        k_cache[:, position:last].copy_(new_keys.transpose(0, 1))
        v_cache[:, position:last].copy_(new_values.transpose(0, 1))
    else:
        blocks, slots = paged_rows(block_table, position, last, k_cache.shape[2])
        k_cache[blocks, :, slots], v_cache[blocks, :, slots] = new_keys, new_values
    return queries if out is None else out.copy_(queries)
