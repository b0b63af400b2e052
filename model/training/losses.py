"""How far the drafter's distribution is from the target's, chunk by chunk: no matrix of logits is ever whole.

The head is most of a training step. Two things make it small. The loss tells only the data's most frequent tokens
apart, and joins all others in one class, whose share in the drafter's denominator is estimated from a sample of them
(importance sampling; Bengio and Senecal, 2008), drawn anew in every step. And each chunk's gradient is taken at once
(as in cut cross-entropy, arXiv 2411.09009), so its logits are gone when the next chunk's come.

Cross-entropy is the paper's loss (arXiv 2404.18911, section 3.1). One minus the total variation distance is the
probability that a draft is accepted (arXiv 2211.17192), so the distance is what decoding pays for.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drafters.vocabulary import most_frequent

CHUNK = {"cpu": 256, "cuda": 2048}
"""Positions at once: on a CPU their logits over 8,192 tokens take 8 MB, which caches hold."""
SAMPLED = 1024
"""Tokens of the joined class that a step looks at."""


def in_chunks(rows: Tensor) -> Iterator[slice]:
    """Ranges of at most ``CHUNK`` rows."""
    count, size = len(rows), CHUNK[rows.device.type]
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class DraftLoss:
    """The loss of the drafter's distribution against the target's.

    Args:
        head: the target's ``[V, hidden]``.
        counts: ``[V]``, how often each token stands in the data.
        vocabulary: how many tokens are told apart.
        total_variation: the share of the total variation distance; the rest is cross-entropy.
    """

    def __init__(self, head: Tensor, counts: Tensor, vocabulary: int, total_variation: float) -> None:
        order = most_frequent(counts, len(counts)).to(head.device)
        self.apart = head[order[:vocabulary]].bfloat16()
        self.joined = head[order[vocabulary:]].bfloat16()
        self.total_variation = total_variation

    def backward(
        self, guesses: Tensor, normed: Tensor, log_total: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The mean loss over some positions, and its gradient for ``guesses``.

        Args:
            guesses: ``[P, hidden]``, the adapter's output.
            normed: ``[P, hidden]``, the target's.
            log_total: ``[P]``, as in ``Lesson``.
            generator: draws the sample of the joined class, on the CPU.

        Returns:
            The loss, a float32 scalar on the device, and ``[P, hidden]``.
        """
        sample = torch.randint(max(len(self.joined), 1), (min(SAMPLED, len(self.joined)),), generator=generator)
        joined = self.joined[sample.to(guesses.device)]
        loss, gradient = guesses.new_zeros((), dtype=torch.float32), torch.empty_like(guesses)
        for part in in_chunks(guesses):
            guess = guesses[part].detach().requires_grad_()
            with torch.enable_grad():
                chunk = self.distance(guess.bfloat16(), normed[part], log_total[part], joined).sum() / len(guesses)
            (gradient[part],) = torch.autograd.grad(chunk, guess)
            loss += chunk.detach()
        return loss, gradient

    def distance(self, guess: Tensor, normed: Tensor, log_total: Tensor, joined: Tensor) -> Tensor:
        """The loss of each position, ``[P]`` float32; the arguments are bf16."""
        target = (F.linear(normed, self.apart).float() - log_total[:, None]).exp()
        logits = F.linear(guess, self.apart).float()
        if len(joined):
            target = torch.cat((target, (1 - target.sum(-1, keepdim=True)).clamp(min=0)), dim=-1)
            rest = F.linear(guess, joined).float().logsumexp(-1, keepdim=True)
            logits = torch.cat((logits, rest + math.log(len(self.joined) / len(joined))), dim=-1)
        log_guess = logits.log_softmax(-1)
        loss = -(target * log_guess).sum(-1)
        if self.total_variation:
            distance = (target - log_guess.exp()).abs().sum(-1) / 2
            loss = torch.lerp(loss, distance, self.total_variation)
        return loss
