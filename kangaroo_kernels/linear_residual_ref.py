"""``linear_residual``: the output or down projection plus the residual stream, ``x @ W^T + b + residual``.

Bytes moved: the weight, ``N * K`` elements, once.
"""

from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, linear


def linear_residual(x: Tensor, weight: Weight, residual: Tensor) -> Tensor:
    """Project and add; ``residual`` is left as it was.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        residual: ``[M, N]``, same dtype.

    Returns:
        A new ``[M, N]``.
    """
    return linear(x, weight).add_(residual)
