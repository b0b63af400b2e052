"""``sample_head``: RMSNorm, LM head, and a sample by Gumbel-max, ``argmax(filter(logits) / T + noise)``.

Top-k and top-p (Holtzman et al., arXiv 1904.09751) act on the tempered distribution, top-k first, as transformers has
it. Bytes moved: the head, ``V * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.top1_head_ref import Top1, confidence_of, lm_head


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """``logits / temperature`` with -inf outside of the top-k and top-p sets: ``[M, V]`` float32, a new tensor.

    Top-k keeps every token that ties with the k-th. Top-p keeps the fewest most likely tokens whose probabilities
    reach ``top_p``, at least one.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        descending, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(descending, dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        dropped[:, 0] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits


def sample_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    noise: Tensor,
    *,
    eps: float,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Top1:
    """Sample a token for each row; the confidence is that of the un-tempered, unfiltered distribution.

    Args:
        x: ``[M, K]`` hidden states before the final norm.
        norm_weight: ``[K]``, same dtype.
        weight: ``[V, K]``.
        noise: ``[M, V]`` float32 from ``gumbel``.
        eps: of the norm.
        temperature: above 0.
        top_k: keep this many tokens; None keeps all.
        top_p: keep this share of the probability; None keeps all.
    """
    logits = lm_head(x, norm_weight, weight, eps=eps)
    token = filter_logits(logits, temperature, top_k, top_p).add_(noise).argmax(dim=-1)
    return Top1(token, confidence_of(logits))
