"""How a tree of drafts grows: in rounds, the likeliest candidates first, in memory of fixed size on the device.

A row has candidates of two kinds: those that the adapter ranks and, where the text's end stood in it before, the token
that followed there (``Tree.hint``). Nothing here asks the host, so both loops use it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import NO_TOKEN

CHILDREN = 4
"""The most candidates behind a row that the adapter ranks, and the most rows of a round."""

LEAST_SHARE = 0.02
"""Below it a candidate is not worth its row."""


def widths(rows: int, rounds: int) -> Iterator[int]:
    """How many rows each round may add: ``rows`` in all, shared out evenly, the first rounds having more."""
    rounds = min(rows, rounds)
    for index in range(rounds):
        yield min(CHILDREN, rows // rounds + (index < rows % rounds))


class Hint(NamedTuple):
    """What a lookup expects behind the newest token.

    Attributes:
        tokens: ``[>= R]`` int64, in their order, for a tree of R drafts.
        matched: ``[1]`` int64, the length of the match; as many of the tokens are expected.
        sure: ``[1]`` float32, how likely each is to stand behind the one before.
    """

    tokens: Tensor
    matched: Tensor
    sure: Tensor


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
        offers: ``[rows + 1, CHILDREN + 1]`` float32, the shares of the candidates behind each row; 0 where there is
            none.
        offered: ``[rows + 1, CHILDREN + 1]`` int64, their tokens.
        chances: ``[rows + 1, CHILDREN + 1]`` float32, their confidences.
        hint: looked-up tokens, each a candidate behind the one before it; None without.
        said: ``[rows + 1]`` int64, how many of these each row's branch says; -1 where it says others.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.parents, self.said = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self.masks = torch.ones(rows + 1, dtype=torch.int32, device=device)
        self.confidences, self.shares = torch.ones(2, rows + 1, device=device)
        self.offers, self.chances = torch.zeros(2, rows + 1, CHILDREN + 1, device=device)
        self.offered = torch.zeros(rows + 1, CHILDREN + 1, dtype=torch.int64, device=device)
        self.hint: Hint | None = None

    def offer(self, rows: Tensor, tokens: Tensor, confidences: Tensor, wanted: Tensor | None = None) -> None:
        """Candidates behind some rows: ``[m, CHILDREN]`` each, or fewer columns; the hint adds its own.

        ``wanted``, ``[m, 1]`` bool, says which rows have any; None means all.
        """
        confidences = torch.nan_to_num(confidences)
        if self.hint is not None:
            tokens, confidences = self._with_hint(rows, tokens, confidences, self.hint)
        if wanted is not None:
            tokens, confidences = torch.where(wanted, tokens, 0), torch.where(wanted, confidences, 0.0)
        count = tokens.shape[1]
        self.offers[rows, :count] = self.shares[rows, None] * confidences
        self.chances[rows, :count] = confidences
        self.offered[rows, :count] = tokens

    def _with_hint(self, rows: Tensor, tokens: Tensor, confidences: Tensor, hint: Hint) -> tuple[Tensor, Tensor]:
        """One candidate more; where the adapter ranks it, too, it is one, as sure as the surer of the two says."""
        expected = self._expected(rows, hint)[:, None]
        both = tokens == expected
        confidences = torch.where(both, torch.maximum(confidences, hint.sure), confidences)
        alone = (expected != NO_TOKEN) & ~both.any(dim=1, keepdim=True)
        sure = torch.where(alone, hint.sure, 0.0)
        return torch.cat((tokens, expected), dim=1), torch.cat((confidences, sure), dim=1)

    def _expected(self, rows: Tensor, hint: Hint) -> Tensor:
        """The hint's token behind each row, ``[m]`` int64; ``NO_TOKEN`` where it has none."""
        said = self.said[rows]
        return torch.where((said >= 0) & (said < hint.matched), hint.tokens[said.clamp(min=0)], NO_TOKEN)

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
        parents = places // self.offers.shape[1]
        self.tokens[rows] = torch.where(worth, self.offered.view(-1)[places], NO_TOKEN)
        self.parents[rows], self.shares[rows] = parents, shares
        self.confidences[rows] = self.chances.view(-1)[places]
        own = self.masks[rows] = self.masks[parents] | (1 << rows).int()
        last = worth.sum(dim=0, keepdim=True) + first - 1  # the row that padding follows
        padding = self.masks[last] | ((2 << rows) - (2 << last)).int()
        self.masks[rows] = torch.where(worth, own, padding)
        if self.hint is not None:
            follows = worth & (self.tokens[rows] == self._expected(parents, self.hint))
            self.said[rows] = torch.where(follows, self.said[parents] + 1, -1)
        return worth
