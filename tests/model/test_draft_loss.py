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


@pytest.mark.parametrize("known", [20, VOCABULARY])
def test_a_head_of_its_own_gets_its_gradient(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tokens told apart and of joined ones alike, weighted and added to what is there."""
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 5})
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.arange(high)[: size[0]])
    head, _, final, log_total = states()
    own, guesses = torch.nn.Parameter(torch.randn(VOCABULARY, 7)), torch.randn(POSITIONS, 7)
    loss = DraftLoss(head, torch.arange(VOCABULARY), known, 0.3, own)
    found = [loss.backward(guesses, final.float(), log_total, torch.Generator(), weight) for weight in (0.5, 1.0)]
    target, guess = (final.float() @ head.T).softmax(-1), (guesses.requires_grad_() @ own.T).softmax(-1)
    split = VOCABULARY - known
    if split:
        target, guess = (torch.cat((p[:, split:], p[:, :split].sum(-1, keepdim=True)), -1) for p in (target, guess))
    cross_entropy = -(target * guess.log()).sum(-1)
    wanted = (0.7 * cross_entropy + 0.3 * (target - guess).abs().sum(-1) / 2).mean()
    gradients = torch.autograd.grad(wanted, (guesses, own))
    for weight, (value, gradient) in zip((0.5, 1.0), found, strict=True):
        torch.testing.assert_close(value, weight * wanted.detach(), atol=0.0, rtol=1e-5)
        torch.testing.assert_close(gradient, weight * gradients[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(own.grad, 1.5 * gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("few", [False, True])
def test_the_confidence_learns_whether_a_guess_is_right(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is that of the cross-entropy; the drafter's own loss and gradient know nothing of it.

    With a draft vocabulary the probability is that among its tokens.
    """
    monkeypatch.setattr(losses, "CHUNK", {"cpu": 5})
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    head, guesses, final, log_total = states()
    final = (final.float() + guesses) / 2  # half of the guesses are right
    log_total = (final @ head.T).logsumexp(-1)
    given = guesses, final, log_total, torch.Generator()
    confidence = torch.nn.Linear(HIDDEN + 1, 1)
    counts = torch.arange(VOCABULARY)
    without = DraftLoss(head, counts, VOCABULARY, 0.0).backward(*given)
    drafted = torch.arange(10, VOCABULARY) if few else None
    found = DraftLoss(head, counts, VOCABULARY, 0.0, None, confidence, drafted).backward(*given)
    assert all(torch.equal(*each) for each in zip(without, found, strict=True))
    logits = guesses @ head.T
    if few:
        logits[:, :10] = -math.inf
    probabilities = logits.softmax(-1)
    right = (probabilities.argmax(-1) == (final @ head.T).argmax(-1)).float()
    assert 3 < right.sum() < POSITIONS - 3
    told = confidence(torch.cat((guesses, probabilities.amax(-1).logit(eps=1e-6)[:, None]), dim=-1))[:, 0]
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(told, right)
    for parameter, gradient in zip(
        confidence.parameters(), torch.autograd.grad(wanted, [*confidence.parameters()]), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_where_others_outweigh_what_is_known_no_guess_is_right() -> None:
    """The target's likeliest token may be among the joined ones, of which only the sum is known."""
    confidence = torch.nn.Linear(2 + 1, 1)
    torch.nn.init.zeros_(confidence.weight)
    torch.nn.init.constant_(confidence.bias, 1.0)
    loss = DraftLoss(torch.zeros(9, 2), torch.arange(9), 3, 0.0, confidence=confidence)
    log_guess = torch.tensor([[0.5, 0.2, 0.1, 0.2]] * 3).log()
    target = torch.tensor([[0.6, 0.1, 0.0, 0.3], [0.2, 0.1, 0.0, 0.7], [0.1, 0.6, 0.0, 0.3]])
    sure, unsure = math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))
    wanted = torch.tensor([sure, unsure, unsure])
    torch.testing.assert_close(loss.doubt(torch.zeros(3, 2), log_guess, target).detach(), wanted)
