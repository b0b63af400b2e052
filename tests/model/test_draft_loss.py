"""The loss in chunks over a part of the vocabulary, against the whole softmax."""

import math

import pytest
import torch
from torch import Tensor

from kangaroo_kernels.model.training import losses
from kangaroo_kernels.model.training.losses import DraftLoss

VOCABULARY, HIDDEN, POSITIONS = 61, 16, 23


def states() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head, guesses, final states and their log totals; all numbers are bf16's."""
    generator = torch.Generator().manual_seed(0)
    head, guesses, final = (
        torch.randn(rows, HIDDEN, generator=generator).bfloat16().float() for rows in (VOCABULARY, POSITIONS, POSITIONS)
    )
    return head, guesses, final.bfloat16(), (final @ head.T).logsumexp(-1)


def whole(head: Tensor, guesses: Tensor, final: Tensor, share: float, classes: list[list[int]]) -> Tensor:
    """The loss over classes of tokens, from whole matrices of logits."""
    target, guess = ((x.float() @ head.T).softmax(-1) for x in (final, guesses))
    target, guess = (torch.stack([p[:, group].sum(-1) for group in classes], -1) for p in (target, guess))
    cross_entropy = -(target * guess.log()).sum(-1)
    return ((1 - share) * cross_entropy + share * (target - guess).abs().sum(-1) / 2).mean()


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("known", [20, VOCABULARY])
def test_chunks_give_the_loss_of_the_whole(known: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every joined token in the sample, the joined class is exact."""
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 5})
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.arange(high)[: size[0]])
    head, guesses, final, log_total = states()
    counts = torch.arange(VOCABULARY)  # the last tokens are the most frequent
    loss, gradient = DraftLoss(head, counts, known, share).backward(
        guesses, final.float(), log_total, torch.Generator()
    )
    apart = [[token] for token in range(VOCABULARY - known, VOCABULARY)]
    joined = [list(range(VOCABULARY - known))] if known < VOCABULARY else []
    guesses.requires_grad_()
    wanted = whole(head, guesses, final, share, apart + joined)
    (wanted_gradient,) = torch.autograd.grad(wanted, guesses)
    torch.testing.assert_close(loss, wanted.detach(), atol=0.0, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-6, rtol=1e-4)


def test_the_sample_stands_for_all_joined_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all joined tokens are alike, a sample of three gives the class's whole share."""
    monkeypatch.setattr(losses, "SAMPLED", 3)
    head = torch.zeros(VOCABULARY, HIDDEN)
    guesses, final = torch.randn(2, HIDDEN), torch.zeros(2, HIDDEN).bfloat16()
    loss = DraftLoss(head, torch.arange(VOCABULARY), 11, 0.0)
    uniform, _ = loss.backward(guesses, final, torch.full((2,), math.log(VOCABULARY)), torch.Generator())
    share = (VOCABULARY - 11) / VOCABULARY
    wanted = 11 / VOCABULARY * math.log(VOCABULARY) - share * math.log(share)
    assert float(uniform) == pytest.approx(wanted, rel=1e-5)
