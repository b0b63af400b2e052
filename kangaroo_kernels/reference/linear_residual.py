"""``linear_residual``: the output or down projection plus the residual stream, ``x @ W^T + b + residual``.

Bytes moved: the weight, ``N * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, linear


def linear_residual(
    x: Tensor,
    weight: Weight,
    residual: Tensor,
    *,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project and add.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        residual: ``[M, N]``, same dtype; left as it was unless it is ``out``.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        out: ``[M, N]``, made if None; may be ``residual``.

    Returns:
        ``out``, ``[M, N]``.
    """
    if active is not None and not active:
        return torch.empty_like(residual) if out is None else out
    result = linear(x, weight).add_(residual)
    return result if out is None else out.copy_(result)
