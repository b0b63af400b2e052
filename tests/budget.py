"""Tolerances as error budgets: no further from the truth than PyTorch's own arithmetic, and a rounding or two."""

import torch
from torch import Tensor

SLACK = 8
"""Roundings of the largest element on top of PyTorch's own error: sums may be taken in another order."""


def assert_within_budget(ours: Tensor, truth: Tensor, straightforward: Tensor, slack: float = SLACK) -> None:
    """Hold ``ours`` against float64 ``truth``.

    Args:
        straightforward: the formula written down in PyTorch, in the dtype of ``ours``.
        slack: in units of the dtype's epsilon times the largest element of the truth.
    """
    assert truth.dtype == torch.float64
    assert ours.dtype == straightforward.dtype
    assert ours.shape == straightforward.shape == truth.shape
    assert torch.isfinite(ours).all()
    allowed = (straightforward.double() - truth).abs().max() + slack * torch.finfo(ours.dtype).eps * truth.abs().max()
    error = (ours.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, budget {allowed:.3g}"
