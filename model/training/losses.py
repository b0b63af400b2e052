"""How far the drafter's distribution is from the target's, chunk by chunk: no matrix of logits is ever whole.

The head is most of a training step. Two things make it small. The loss tells only the data's most frequent tokens
apart, and joins all others in one class, whose share in the drafter's denominator is estimated from a sample of them
(importance sampling; Bengio and Senecal, 2008), drawn anew in every step. And each chunk's gradient is taken at once
(as in cut cross-entropy, arXiv 2411.09009), so its logits are gone when the next chunk's come. A head that the drafter
has of its own, and a confidence that it learns, get their gradients here, too.

Cross-entropy is the paper's loss (arXiv 2404.18911, section 3.1). One minus the total variation distance is the
probability that a draft is accepted (arXiv 2211.17192), so the distance is what decoding pays for.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kangaroo_kernels.contract import LEAST_DOUBT

from ..drafters.vocabulary import most_frequent

CHUNK = {"cpu": 256, "cuda": 2048}
"""Positions at once: on a CPU their logits over 8,192 tokens take 8 MB, which caches hold."""
SAMPLED = 1024
"""Tokens of the joined class that a step looks at."""


def log_odds(probability: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of probabilities, as a trained confidence takes it."""
    return probability.clamp(LEAST_DOUBT, 1 - LEAST_DOUBT).logit()


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
        own: ``[V, r]``, the drafter's head where it has one of its own.
        confidence: tells from a guess and the log-odds of its probability whether it is right, where that is learned.
        drafted: the tokens that may be drafted, among which a guess has its probability; None means all.
    """

    def __init__(
        self,
        head: Tensor,
        counts: Tensor,
        vocabulary: int,
        total_variation: float,
        own: nn.Parameter | None = None,
        confidence: nn.Linear | None = None,
        drafted: Tensor | None = None,
    ) -> None:
        order = most_frequent(counts, len(counts)).to(head.device)
        self.order, self.vocabulary = order, vocabulary
        self.apart = head[order[:vocabulary]].bfloat16()
        self.joined = head[order[vocabulary:]].bfloat16()
        self.total_variation, self.own, self.confidence = total_variation, own, confidence
        self.barred = None if drafted is None else ~torch.isin(order[:vocabulary], drafted.to(order.device))

    def backward(
        self, guesses: Tensor, normed: Tensor, log_total: Tensor, generator: torch.Generator, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The mean loss over some positions, and its gradient for ``guesses``, both times ``weight``.

        The parameters that the drafter has here get theirs as well.

        Args:
            guesses: ``[P, hidden]``, the adapter's output, or ``[P, r]`` with a head of its own.
            normed: ``[P, hidden]``, the target's.
            log_total: ``[P]``, as in ``Lesson``.
            generator: draws the sample of the joined class, on the CPU.
            weight: of these positions among those of a step.

        Returns:
            The loss, a float32 scalar on the device (without that of the confidence), and a tensor as ``guesses``.
        """
        sample = torch.randint(max(len(self.joined), 1), (min(SAMPLED, len(self.joined)),), generator=generator)
        rows = self.order[: self.vocabulary], self.order[self.vocabulary :][sample.to(guesses.device)]
        doubted = [] if self.confidence is None else [*self.confidence.parameters()]
        own = [] if self.own is None else [self.own.detach()[each].requires_grad_() for each in rows]
        apart, joined = own or (self.apart, self.joined[sample.to(guesses.device)])
        learned = [*own, *doubted]
        loss, gradient = guesses.new_zeros((), dtype=torch.float32), torch.empty_like(guesses)
        gradients = [torch.zeros_like(each) for each in learned]
        for part in in_chunks(guesses):
            guess = guesses[part].detach().requires_grad_()
            with torch.enable_grad():
                losses = self.losses(guess, normed[part], log_total[part], apart.bfloat16(), joined.bfloat16())
                chunk, doubt = (weight * each.sum() / len(guesses) for each in losses)
            gradient[part], *more = torch.autograd.grad(chunk + doubt, (guess, *learned), materialize_grads=True)
            gradients = [total + each for total, each in zip(gradients, more, strict=True)]
            loss += chunk.detach()
        if self.own is not None:
            self.own.grad = torch.zeros_like(self.own) if self.own.grad is None else self.own.grad
            for each, change in zip(rows, gradients[: len(own)], strict=True):
                self.own.grad.index_add_(0, each, change)
        for parameter, change in zip(doubted, gradients[len(own) :], strict=True):
            parameter.grad = change if parameter.grad is None else parameter.grad + change
        return loss, gradient

    def losses(
        self, guess: Tensor, normed: Tensor, log_total: Tensor, apart: Tensor, joined: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of each position, ``[P]`` float32, and that of its confidence.

        ``apart`` and ``joined`` are rows of the drafter's head, in bf16.
        """
        given, guess = guess, guess.bfloat16()
        target = (F.linear(normed, self.apart).float() - log_total[:, None]).exp()
        logits = F.linear(guess, apart).float()
        if len(joined):
            target = torch.cat((target, (1 - target.sum(-1, keepdim=True)).clamp(min=0)), dim=-1)
            rest = F.linear(guess, joined).float().logsumexp(-1, keepdim=True)
            logits = torch.cat((logits, rest + math.log(len(self.joined) / len(joined))), dim=-1)
        log_guess = logits.log_softmax(-1)
        loss = -(target * log_guess).sum(-1)
        if self.total_variation:
            distance = (target - log_guess.exp()).abs().sum(-1) / 2
            loss = torch.lerp(loss, distance, self.total_variation)
        doubt = torch.zeros_like(loss)
        if self.confidence is not None:
            doubt = self.doubt(given.detach(), log_guess.detach(), target)
        return loss, doubt

    def doubt(self, guess: Tensor, log_guess: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of the confidence in each guess, ``[P]``; a guess is right where the target agrees.

        ``log_guess`` and ``target`` are over the tokens that are told apart, and perhaps the joined class. Of that only
        the sum is known: where it exceeds every other one, the target's first token counts as one of the class.
        """
        assert self.confidence is not None
        drafted = log_guess[:, : len(self.apart)]
        if self.barred is not None:
            drafted = drafted.masked_fill(self.barred, -torch.inf).log_softmax(-1)
        likeliest, choice = drafted.exp().max(-1)
        told = torch.cat((guess.float(), log_odds(likeliest)[:, None]), dim=-1)
        right = choice == target.argmax(-1)
        return F.binary_cross_entropy_with_logits(self.confidence(told)[:, 0], right.float(), reduction="none")
