"""Two optimizers under one schedule: Muon updates the matrices, AdamW the rest.

Muon (Jordan et al., 2024) has its update scaled as in arXiv 2502.16982.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

APART_RATE = 1e-3
"""Of the parameters that learn apart, at its height."""


class Optimizers:
    """Muon for some matrices of a module and AdamW for all its other parameters.

    Some may learn apart from the others: their gradients are clipped by themselves, and their rate is their own.

    Args:
        module: what is trained.
        matrices: Muon's share of its parameters.
        rates: Muon's learning rate and AdamW's, at their height.
        weight_decay: of the matrices.
        fused: AdamW in one kernel, for a GPU.
        apart: parameters that learn apart, by AdamW.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Iterable[nn.Parameter],
        rates: tuple[float, float],
        weight_decay: float = 0.0,
        fused: bool = False,
        apart: Iterable[nn.Parameter] = (),
    ) -> None:
        self.module, self.rates = module, (*rates, APART_RATE)
        matrices, apart = list(matrices), list(apart)
        known = {id(parameter) for parameter in (*matrices, *apart)}
        others = [parameter for parameter in module.parameters() if id(parameter) not in known]
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.clipped = [group for group in ([*matrices, *others], apart) if group]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rates[0], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            adamw(others, lr=rates[1]),
            *([adamw(apart, lr=APART_RATE)] if apart else []),
        ]

    def step(self, factor: float, clip: float = 1.0) -> None:
        """One step at ``factor`` times the rates; gradients are first clipped to norm ``clip``, and then dropped."""
        for parameters in self.clipped:
            nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer, rate in zip(self.all, self.rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        self.module.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What a stopped run needs to go on."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from what ``state_dict`` gave."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def rise_and_fall(share: float) -> float:
    """The adapter's schedule: what part of its height the rate has when this share of the run has passed."""
    return max(0.0, min(share / 0.02 + 0.01, 1 - share))
