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

from kangaroo_kernels.packed_weight import Weight, linear
from kangaroo_kernels.rms_norm_ref import rms_norm


def interleave_rope(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, ``[H * D, ...]``, from half-split to adjacent pairs."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def rope_table(inv_freq: Tensor, length: int, scaling: float = 1.0) -> Tensor:
    """``exp(i * position * inv_freq) * scaling`` for positions ``[0, length)``: ``[length, 1, D / 2]`` complex64."""
    angles = torch.arange(length, device=inv_freq.device, dtype=torch.float32)[:, None, None] * inv_freq
    return torch.polar(torch.full_like(angles, scaling), angles)


def qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int,
    *,
    eps: float,
) -> Tensor:
    """Project M tokens at ``position, position + 1, ...`` and append their keys and values.

    Args:
        x: ``[M, K]`` hidden states.
        norm_weight: ``[K]``, same dtype.
        weight: ``[(H + 2 * H_kv) * D, K]``, rows q, k, v, the first two with ``interleave_rope`` applied.
        table: ``[T, 1, D / 2]`` complex64 from ``rope_table``.
        k_cache: ``[H_kv, T, D]``, any strides; rows ``position .. position + M`` are written.
        v_cache: likewise.
        position: absolute position of the first row.
        eps: of the norm.

    Returns:
        The turned queries, ``[M, H, D]``: a view of the projection's output.
    """
    rows, last = x.shape[0], position + x.shape[0]
    kv_heads, _, head_dim = k_cache.shape
    qkv = linear(rms_norm(x, norm_weight, eps), weight).view(rows, -1, head_dim)
    turned: Tensor
    turned, new_values = qkv.split((qkv.shape[1] - kv_heads, kv_heads), dim=1)
    phases = table[position:last]
    if qkv.dtype == torch.float32:
        torch.view_as_complex(turned.view(rows, -1, head_dim // 2, 2)).mul_(phases)
    else:
        pairs = torch.view_as_complex(turned.float().view(rows, -1, head_dim // 2, 2))
        turned.copy_(torch.view_as_real(pairs * phases).flatten(-2))
    queries: Tensor
    queries, new_keys = turned.split((turned.shape[1] - kv_heads, kv_heads), dim=1)
    k_cache[:, position:last].copy_(new_keys.transpose(0, 1))
    v_cache[:, position:last].copy_(new_values.transpose(0, 1))
    return queries
