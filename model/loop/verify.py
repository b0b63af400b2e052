"""Verify: the remaining layers and the LM head over all drafted positions at once."""

import torch
from torch import Tensor

from ..sampling import Chooser
from ..target.llama import Llama
from .state import TextState


def verify(
    target: Llama,
    state: TextState,
    chooser: Chooser,
    exit_layer: int,
    exit_hidden: Tensor,
    draft_tokens: Tensor,
    draft_distributions: Tensor | None,
) -> Tensor:
    """The target's tokens after the newest token and after every draft.

    Args:
        exit_hidden: ``[k + 1, hidden]``, from the drafter; the shallow layers are not run again.
        draft_tokens: ``[k]`` int64.
        draft_distributions: ``[k, V]`` for rejection sampling, else None.

    Returns:
        ``[k + 1]`` int64.
    """
    position, config, weights = state.newest, target.config, target.weights
    hidden = target.run(exit_hidden, state.cache, position, exit_layer, config.num_hidden_layers)
    if chooser.sampling.rejects:
        if draft_distributions is None:
            draft_distributions = torch.empty(0, config.vocab_size, device=target.device)
        return chooser.reject(draft_tokens, draft_distributions, target.logits(hidden), position + 1)
    return chooser.target(hidden, weights.norm, weights.head, config.rms_norm_eps, position + 1)
