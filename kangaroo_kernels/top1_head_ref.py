"""``top1_head``: RMSNorm, LM head, top-1 token and its softmax probability, without keeping the logits.

Ties go to the lowest index, as ``torch.argmax`` has it. Bytes moved: the head, ``V * K`` elements, once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight, linear
from kangaroo_kernels.rms_norm_ref import rms_norm


class Top1(NamedTuple):
    """The winning token of each row.

    Attributes:
        token: ``[M]`` int64.
        confidence: ``[M]`` float32, the token's softmax probability; NaN where the row holds a NaN.
    """

    token: Tensor
    confidence: Tensor


def lm_head(x: Tensor, norm_weight: Tensor, weight: Weight, *, eps: float) -> Tensor:
    """The logits themselves, ``[M, V]`` float32, for callers that need every one of them."""
    return linear(rms_norm(x, norm_weight, eps), weight).float()


def confidence_of(logits: Tensor) -> Tensor:
    """The top-1 softmax probability of each row: ``[M, V]`` to ``[M]`` float32."""
    return torch.softmax(logits, dim=-1).amax(dim=-1)


def top1_head(x: Tensor, norm_weight: Tensor, weight: Weight, *, eps: float) -> Top1:
    """The most likely token of each row and how sure the head is of it.

    Args:
        x: ``[M, K]`` hidden states before the final norm.
        norm_weight: ``[K]``, same dtype.
        weight: ``[V, K]``.
        eps: of the norm.
    """
    logits = lm_head(x, norm_weight, weight, eps=eps)
    return Top1(logits.argmax(dim=-1), confidence_of(logits))
