"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): ``x / sqrt(mean(x^2) + eps) * weight``.

The first step of ``qkv_rope``, ``gate_up`` and the heads, never an operation of its own.
"""

from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import PackedWeight, Weight


@lru_cache(maxsize=64)
def _constants(size: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.float32, device=device)
    return zero, zero + sqrt(size * eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """RMSNorm over the last dimension, computed in float32.

    Args:
        x: ``[M, K]``, any float dtype.
        weight: ``[K]``, same dtype.
        eps: added to the mean square.
        scale: a power of two by which the result is multiplied.

    Returns:
        ``[M, K]``, dtype of ``x``.
    """
    size = x.shape[-1]
    zero, root_eps = _constants(size, eps, x.device)
    values = x if x.dtype == torch.float32 else x.float()
    # sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(K * eps)) / sqrt(K): four small calls where F.rms_norm makes seven
    norm = torch.hypot(torch.linalg.vector_norm(values, dim=-1, keepdim=True), root_eps)
    normed = torch.addcdiv(zero, values, norm, value=sqrt(size) * scale)
    return (normed if x.dtype == torch.float32 else normed.to(x.dtype)).mul_(weight)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    """``x`` ``[M, K]`` normalised, times ``weight`` ``[N, K]`` transposed: ``[M, N]``; the norm does the scaling."""
    if isinstance(weight, PackedWeight):
        return weight.of_scaled(rms_norm(x, norm_weight, eps, weight.scale))
    return torch.nn.functional.linear(rms_norm(x, norm_weight, eps), weight)
