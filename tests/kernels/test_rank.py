"""``rank``: the first of its tokens is the one that the sampling head would draw, and the others come next."""

import random

import pytest
import torch
from trees import masks_of, path_of, shapes

from kangaroo_kernels.contract import DraftVocabulary, Ranked
from kangaroo_kernels.rank import rank as kernel
from kangaroo_kernels.reference.noise import gumbel
from kangaroo_kernels.reference.rank import rank as reference
from kangaroo_kernels.reference.sample_head import filter_logits

EITHER = pytest.mark.parametrize("rank", [reference, kernel], ids=["reference", "kernel"])
FILTERS = pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 9}, {"temperature": 0.9, "top_k": 30, "top_p": 0.8}],
    ids=str,
)
NAN = float("nan")


def draw(rows: int, size: int, device: torch.device) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(device)


@EITHER
@FILTERS
@pytest.mark.parametrize("size", [5, 97, 5000])
def test_the_best_scores_in_order(device, rank, sampling, size):
    """Row by row, at the position of its depth, with the noise of the whole vocabulary where the head has some."""
    for parents in shapes(random.Random(size), 8)[5:]:
        rows, whole = len(parents) + 1, 2 * size + 1
        logits = draw(rows, size, device)
        tokens = torch.arange(1, whole, 2, dtype=torch.int32, device=device)
        vocabulary = DraftVocabulary(tokens, whole) if rows % 2 else None
        settings = {"seed": 2**64 - 5, "vocabulary": vocabulary, "ancestors": masks_of(parents, device), **sampling}
        found = rank(logits, 4, torch.tensor([30], device=device), **settings)
        for row in range(rows):
            scores = logits[row : row + 1].double()
            if sampling:
                place = torch.tensor([30 + len(path_of(parents, row)) - 1], device=device)
                noise = gumbel(2**64 - 5, 0, place, whole if vocabulary else size)
                filters = sampling["temperature"], sampling.get("top_k"), sampling.get("top_p")
                scores = filter_logits(scores, *filters) + (noise[:, tokens.long()] if vocabulary else noise)
            best, index = torch.softmax(scores, dim=-1).topk(4)
            wanted = tokens[index].long() if vocabulary else index
            seen = best[0] > 0  # what a filter leaves out has no order
            assert found.tokens[row][seen].tolist() == wanted[0][seen].tolist()
            torch.testing.assert_close(found.confidences[row].double(), best[0], rtol=1e-4, atol=1e-6)


@EITHER
def test_ties_nan_and_rows_that_a_flag_leaves_out(device, rank):
    logits = torch.zeros(3, 6, device=device)
    logits[0, 2], logits[1, 4] = 1.0, NAN
    out = Ranked(torch.full((3, 3), -7, device=device), torch.full((3, 3), NAN, device=device))
    off = torch.zeros(1, dtype=torch.int32, device=device)
    rank(logits, 3, 0, active=off, out=out)
    assert (out.tokens == -7).all()
    assert rank(logits, 3, 0, active=off + 1, out=out).tokens is out.tokens
    assert out.tokens[0, 0] == 2
    assert out.confidences[1].isnan().all()
    assert out.confidences[2].tolist() == pytest.approx([1 / 6] * 3)
    assert len(set(out.tokens[2].tolist())) == 3


@EITHER
def test_what_does_not_fit_is_said(device, rank):
    logits = torch.zeros(3, 6, device=device)
    for given, words in (
        ((logits.double(), 3, 0), r"rank: logits is \[3, 6\] torch.float64"),
        ((logits.t(), 3, 0), "strides"),
        ((logits, 7, 0), "rank: count is 7; it must be a whole number from 1 to 6"),
        ((logits, 0, 0), "rank: count is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            rank(*given)
    with pytest.raises(ValueError, match=r"rank: ancestors is \[2\]"):
        rank(logits, 3, 0, ancestors=torch.ones(2, dtype=torch.int32, device=device))
