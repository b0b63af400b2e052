"""How a tree of drafts grows: in rounds, the likeliest candidates first, in memory of fixed size on the device.

Nothing here asks the host, so both loops use it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kangaroo_kernels.contract import NO_TOKEN

CHILDREN = 4
"""The most candidates behind a row, and the most rows of a round."""

LEAST_SHARE = 0.02
"""Below it a candidate is not worth its row."""


def widths(rows: int, rounds: int) -> Iterator[int]:
    """How many rows each round may add: ``rows`` in all, shared out evenly, the first rounds having more."""
    rounds = min(rows, rounds)
    for index in range(rounds):
        yield min(CHILDREN, rows // rounds + (index < rows % rounds))


class Tree:
    """A tree while it grows, on the device. Row 0 is the newest token, every other row a draft.

    Args:
        rows: the most drafts.
        device: where it lies.

    Attributes:
        tokens: ``[rows + 1]`` int64; what lies in row 0 means nothing.
        parents: ``[rows + 1]`` int64, the row that each follows.
        masks: ``[rows + 1]`` int32, the ``ancestors`` of each.
        confidences: ``[rows + 1]`` float32, the probability of each row's token behind its parent.
        shares: ``[rows + 1]`` float32, the product of these along a row's branch.
        offers: ``[rows + 1, CHILDREN]`` float32, the shares of the candidates behind each row; 0 where there is none.
        offered: ``[rows + 1, CHILDREN]`` int64, their tokens.
        chances: ``[rows + 1, CHILDREN]`` float32, their confidences.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.parents = torch.zeros_like(self.tokens)
        self.masks = torch.ones(rows + 1, dtype=torch.int32, device=device)
        self.confidences, self.shares = torch.ones(2, rows + 1, device=device)
        self.offers, self.chances = torch.zeros(2, rows + 1, CHILDREN, device=device)
        self.offered = torch.zeros(rows + 1, CHILDREN, dtype=torch.int64, device=device)

    def offer(self, rows: Tensor, tokens: Tensor, confidences: Tensor) -> None:
        """Candidates behind some rows: ``[m, CHILDREN]`` each, or fewer columns."""
        count, confidences = tokens.shape[1], torch.nan_to_num(confidences)
        self.offers[rows, :count] = self.shares[rows, None] * confidences
        self.chances[rows, :count] = confidences
        self.offered[rows, :count] = tokens

    def reset(self) -> None:
        """Begin anew."""
        for ones in (self.masks, self.confidences, self.shares):
            ones.fill_(1)
        self.offers.zero_()

    def take(self, first: int, count: int, wanted: Tensor | None = None) -> Tensor:
        """Make rows of the ``count`` best candidates, from row ``first`` on, the best first.

        Args:
            first: the number of the first one.
            count: how many.
            wanted: ``[1]`` bool, whether there shall be any; None means yes.

        Returns:
            ``[count]`` bool, which of them are worth it. The others come last, and are padding: rows without a token
            that follow the one before them, so that they add no path to the tree.
        """
        rows = torch.arange(first, first + count, device=self.tokens.device)
        offers = self.offers.view(-1)
        shares, places = offers.topk(count)
        worth: Tensor = shares >= LEAST_SHARE
        if wanted is not None:
            worth = worth & wanted
        offers[places] = shares.masked_fill(worth, 0.0)
        parents = places // CHILDREN
        self.tokens[rows] = torch.where(worth, self.offered.view(-1)[places], NO_TOKEN)
        self.parents[rows], self.shares[rows] = parents, shares
        self.confidences[rows] = self.chances.view(-1)[places]
        own = self.masks[rows] = self.masks[parents] | (1 << rows).int()
        last = worth.sum(dim=0, keepdim=True) + first - 1  # the row that padding follows
        padding = self.masks[last] | ((2 << rows) - (2 << last)).int()
        self.masks[rows] = torch.where(worth, own, padding)
        return worth
