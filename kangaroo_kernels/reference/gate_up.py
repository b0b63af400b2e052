"""``gate_up``: RMSNorm, the gate and up projections, and ``silu(gate) * up`` (SwiGLU, arXiv 2002.05202).

Bytes moved: the packed weight, ``2 * I * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, out_features
from kangaroo_kernels.reference.rms_norm import norm_linear


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    *,
    eps: float,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The MLP up to its down projection.

    Args:
        x: ``[M, K]``.
        norm_weight: ``[K]``, same dtype.
        weight: ``[2 * I, K]``, the gate's rows first.
        eps: of the norm.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        out: ``[M, I]``, made if None.

    Returns:
        ``out``, ``[M, I]``.
    """
    if active is not None and not active:
        return x.new_empty(x.shape[0], out_features(weight) // 2) if out is None else out
    gate, up = norm_linear(x, norm_weight, eps, weight).chunk(2, dim=-1)
    result = torch.nn.functional.silu(gate).mul_(up)
    return result if out is None else out.copy_(result)
