"""``linear_residual``: the output or down projection plus the residual stream, ``x @ W^T + b + residual``.

Without a residual it is the projection alone. Bytes moved: the weight, ``N * K`` elements, once.
"""

from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, linear, out_features


def linear_residual(
    x: Tensor,
    weight: Weight,
    residual: Tensor | None,
    *,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project and add.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``.
        residual: ``[M, N]``, same dtype; left as it was unless it is ``out``. None adds nothing.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        out: ``[M, N]``, made if None; may be ``residual``.

    Returns:
        ``out``, ``[M, N]``.
    """
    if active is not None and not active:
        return x.new_empty(len(x), out_features(weight)) if out is None else out
    result = linear(x, weight)
    if residual is not None:
        result.add_(residual)
    return result if out is None else out.copy_(result)
