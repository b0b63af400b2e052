"""What changes a row of logits before a token is chosen from it, and the log-probabilities of a row as it was.

The order and the definitions are those of transformers' ``generate``: first the biases, then the repetition penalty
(Keskar et al., arXiv 1909.05858), then the ends that come too early. A row's result depends on that row and on the text
before it alone; rows are worked on one by one, so it has the same bits whatever stands beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .results import TokenLogprobs


@dataclass(frozen=True)
class Shaping:
    """Changes of logits that depend on tokens and on the text.

    Attributes:
        logit_bias: what is added to the logits of single tokens.
        repetition_penalty: the logit of a token that the text holds is divided by it where it is positive, and
            multiplied where it is negative; 1 changes nothing.
        ends: tokens that end the text.
        ends_from: the first position at which one of ``ends`` may be chosen.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repetition_penalty: float = 1.0
    ends: frozenset[int] = frozenset()
    ends_from: int = 0

    @property
    def idle(self) -> bool:
        """Whether it leaves every row as it is."""
        return not self.logit_bias and self.repetition_penalty == 1 and not (self.ends and self.ends_from)

    def __call__(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """The logits ``[1, V]`` of the token after ``text``, changed, as a new tensor."""
        logits = logits.clone()
        device = logits.device
        if self.logit_bias:
            tokens = torch.tensor(list(self.logit_bias), device=device)
            biases = torch.tensor(list(self.logit_bias.values()), dtype=logits.dtype, device=device)
            logits[0, tokens] += biases
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(text)), device=device)
            known = logits[0, seen]
            penalised = torch.where(known < 0, known * self.repetition_penalty, known / self.repetition_penalty)
            logits[0, seen] = penalised
        if len(text) < self.ends_from and self.ends:
            logits[0, torch.tensor(sorted(self.ends), device=device)] = -torch.inf
        return logits


NO_SHAPING = Shaping()
"""Leaves every row as it is."""


def logprobs_of(logits: Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprobs]:
    """Log-probabilities of a token a row and of the ``most`` likely ones: from logits ``[M, V]``, row by row."""
    found = []
    for row, token in enumerate(tokens):
        probabilities = torch.log_softmax(logits[row : row + 1], dim=-1)[0]
        values, indices = torch.topk(probabilities, min(most, len(probabilities)))
        top = dict(zip(indices.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprobs(token, float(probabilities[token]), top))
    return found
