"""Rejection sampling (Leviathan et al., arXiv 2211.17192): the text has the target's distribution, whatever drafts."""

import torch
from torch import Tensor

from kangaroo_kernels.contract import ACCEPT_STREAM, TARGET_STREAM
from kangaroo_kernels.reference.noise import gumbel_rows, uniform


def reject(draft: Tensor, draft_distribution: Tensor, target_logits: Tensor, position: int, seed: int) -> Tensor:
    """The rule, written as the tokens that the target "would have said".

    With the target's distribution ``p_i`` and the draft's ``q_i``, draft ``d_i`` is accepted with probability
    ``min(1, p_i(d_i) / q_i(d_i))``. Otherwise a sample of ``max(p_i - q_i, 0)`` (normalised) takes its place, which is
    never ``d_i``. So the rule for acceptance stays prefix equality.

    Args:
        draft: ``[k]`` int64, the tokens at ``position, ...``.
        draft_distribution: ``[k, V]`` float32, what each was drawn from.
        target_logits: ``[k + 1, V]`` float32, filtered.
        position: of the first draft.
        seed: of the noise.

    Returns:
        ``[k + 1]`` int64.
    """
    count, device = len(draft), target_logits.device
    noise = gumbel_rows(seed, TARGET_STREAM, position, count + 1, target_logits.shape[1], device)
    tokens = (target_logits + noise).argmax(dim=-1)
    if count == 0:
        return tokens
    p = torch.softmax(target_logits[:count], dim=-1)
    residual = (p - draft_distribution).clamp_(min=0)
    exhausted = residual.sum(dim=-1, keepdim=True) <= 0  # p equals q up to rounding: any rejection is rounding too
    weights = torch.where(exhausted, p, residual)
    replaced = (weights.log() + noise[:count]).argmax(dim=-1)
    u = uniform(seed, ACCEPT_STREAM, torch.arange(position, position + count, device=device), 1)[:, 0]
    p_draft = p.gather(1, draft[:, None])[:, 0]
    q_draft = draft_distribution.gather(1, draft[:, None])[:, 0]
    tokens[:count] = torch.where(u * q_draft < p_draft, draft, replaced)
    return tokens
