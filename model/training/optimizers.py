"""Two optimizers under one schedule: Muon updates the matrices, AdamW the rest.

Muon (Jordan et al., 2024) has its update scaled as in arXiv 2502.16982.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Optimizers:
    """Muon for some matrices of a module and AdamW for all its other parameters.

    Args:
        module: what is trained.
        matrices: Muon's share of its parameters.
        rates: Muon's learning rate and AdamW's, at their height.
        weight_decay: of the matrices.
        fused: AdamW in one kernel, for a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Iterable[nn.Parameter],
        rates: tuple[float, float],
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.module, self.rates = module, rates
        matrices = list(matrices)
        known = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in module.parameters() if id(parameter) not in known]
        self.both: tuple[torch.optim.Optimizer, torch.optim.Optimizer] = (
            torch.optim.Muon(matrices, lr=rates[0], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
        )

    def step(self, factor: float, clip: float = 1.0) -> None:
        """One step at ``factor`` times the rates; gradients are first clipped to norm ``clip``, and then dropped."""
        nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        for optimizer, rate in zip(self.both, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        self.module.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What a stopped run needs to go on."""
        return [optimizer.state_dict() for optimizer in self.both]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from what ``state_dict`` gave."""
        for optimizer, state in zip(self.both, states, strict=True):
            optimizer.load_state_dict(state)


def rise_and_fall(share: float) -> float:
    """The adapter's schedule: what part of its height the rate has when this share of the run has passed."""
    return max(0.0, min(share / 0.02 + 0.01, 1 - share))
