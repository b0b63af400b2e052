"""``gate_up``: RMSNorm, the gate and up projections, and ``silu(gate) * up`` (SwiGLU, arXiv 2002.05202).

Bytes moved: the packed weight, ``2 * I * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, linear
from kangaroo_kernels.rms_norm_ref import rms_norm


def gate_up(x: Tensor, norm_weight: Tensor, weight: Weight, *, eps: float) -> Tensor:
    """The MLP up to its down projection.

    Args:
        x: ``[M, K]``.
        norm_weight: ``[K]``, same dtype.
        weight: ``[2 * I, K]``, the gate's rows first.
        eps: of the norm.

    Returns:
        ``[M, I]``.
    """
    gate, up = linear(rms_norm(x, norm_weight, eps), weight).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
