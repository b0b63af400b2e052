"""Trees of drafts from Kangaroo's drafter: several guesses for one place, so that more of them stand.

A tree grows in rounds. In each, the adapter and the head rank what may follow the rows of the round before, and the
likeliest of all candidates so far become rows, wherever they hang. What a candidate is worth is its share: the product
of the probabilities along its branch, by the drafter's own distribution (as in EAGLE-2, arXiv 2406.16858). The
threshold means what it means for a chain: behind a row whose own probability is below it, nothing is drafted. Where
that holds for all rows of a round, the tree is done.

Where tokens are sampled, drafter and target share the noise of a position. So candidates are ranked with that noise,
and their probabilities are those of the noisy scores: what the target will choose is nearly decided by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..errors import KangarooError
from ..spans import span
from ..target.cache import Branches
from ..target.llama import Llama
from .adapter import Adapter
from .kangaroo import AdapterMemory, KangarooDrafter
from .protocol import Draft

if TYPE_CHECKING:
    from ..loop.state import TextState
    from ..sampling import Chooser

CHILDREN = 4
"""The most candidates behind a row, and the most rows of a round."""

LEAST_SHARE = 0.02
"""Below it a candidate is not worth its row."""


@dataclass
class TreeMemory(AdapterMemory):
    """What the drafter keeps of one text.

    Attributes:
        ran: rows of the latest tree that the adapter has run on, the first ones.
    """

    ran: int = 0


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

    def take(self, first: int, count: int) -> Tensor:
        """Make rows of the ``count`` best candidates, from row ``first`` on, the best first.

        Returns:
            ``[count]`` bool, which of them are worth it; the others come last, and are to be overwritten.
        """
        rows = torch.arange(first, first + count, device=self.tokens.device)
        offers = self.offers.view(-1)
        shares, places = offers.topk(count)
        worth = shares >= LEAST_SHARE
        offers[places] = offers[places].masked_fill(worth, 0.0)
        parents = places // CHILDREN
        self.tokens[rows], self.parents[rows] = self.offered.view(-1)[places], parents
        self.shares[rows], self.confidences[rows] = shares, self.chances.view(-1)[places]
        self.masks[rows] = self.masks[parents] | (1 << rows).int()
        return worth


class TreeDrafter(KangarooDrafter):
    """Kangaroo's drafter, drafting trees.

    Args:
        target: the model.
        adapter: trained for it.
        rows: the most drafts of a tree, 1 to 15.

    Raises:
        KangarooError: another number of drafts, an adapter with a deep state, a float16 cache beside float32
            arithmetic, or a target whose loop lives on the device.
    """

    def __init__(self, target: Llama, adapter: Adapter, rows: int) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows <= MAX_SPECULATIVE_TOKENS:
            raise KangarooError(
                f"draft_tree is {rows!r}; it must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}, or None."
            )
        if target.backend.resident:
            raise KangarooError(
                "draft_tree needs the loop that the host leads, which the kernels do not use; load the target with "
                "kernels='reference', or leave draft_tree out."
            )
        if adapter.state is not None:
            raise KangarooError("the adapter has a deep state, which is fed along a chain; leave draft_tree out.")
        if target.kv_dtype != target.dtype:
            raise KangarooError(
                "in a float16 cache a tree's rows have other bits than plain decoding's; leave kv_dtype or draft_tree "
                "out."
            )
        super().__init__(target, adapter)
        self.tree, self.auto = rows, False

    def new_memory(self) -> TreeMemory:
        """As for chains, with a count of its own."""
        memory = super().new_memory()
        return TreeMemory(memory.cache, memory.length, memory.exit_hidden)

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft a tree of at most ``most`` rounds; rows less sure than ``threshold`` have nothing behind them."""
        if not most:
            return super().propose(text, chooser, most, threshold)
        memory: TreeMemory = text.memory
        tree, first, last = Tree(self.tree, self.target.device), 0, 1
        self.shallow(text, tree, first, last)
        for count in widths(self.tree, most):
            sure = [row for row in range(first, last) if tree.confidences[row] >= threshold or not row]
            if not sure:
                break
            with span("kangaroo/draft/step"):
                self.rank(text, chooser, tree, first, last, sure)
            first, memory.ran = last, last
            last = first + int(tree.take(first, count).sum())
            if first == last:
                break
            self.shallow(text, tree, first, last)
        return Draft(
            tree.tokens[1:last],
            memory.exit_hidden[1 : 1 + last],
            confidences=tuple(tree.confidences[1:last].tolist()),
            parents=tuple(tree.parents[1:last].tolist()),
        )

    def shallow(self, text: "TextState", tree: Tree, first: int, last: int) -> None:
        """The target's first layers on some rows of the tree."""
        with span("kangaroo/draft/shallow"):
            tokens = tree.tokens[first:last].tolist() if first else text.tokens[-1:]
            where = Branches(text.newest + first, tree.masks[first:last]) if first else text.newest
            hidden = self.target.run(self.target.embed(tokens), text.cache, where, 0, self.first_layer)
            text.memory.exit_hidden[1 + first : 1 + last] = hidden

    def rank(self, text: "TextState", chooser: "Chooser", tree: Tree, first: int, last: int, sure: list[int]) -> None:
        """Adapter on the rows of a round, head on the ``sure`` ones of them: what may follow these.

        The adapter runs on all of them, so that its cache has no hole that a later row's attention would read.
        """
        adapter, memory = self.adapter, text.memory
        rows = memory.exit_hidden[1 + first : 1 + last]
        if first:
            where = Branches(text.newest + first, tree.masks[first:last])
            hidden = adapter.run(rows, memory.cache, where)[[row - first for row in sure]]
        else:  # behind the rows that it missed, as in a chain
            hidden = adapter.run(torch.cat((*memory.missed, rows)), memory.cache, memory.length)[-1:]
            memory.missed, memory.length = [], text.newest + 1
        logits = chooser.logits(hidden, adapter.norm, adapter.head, adapter.config.llama.rms_norm_eps)
        drafted = tree.tokens[1:last].tolist()
        scores = chooser.scores(logits, text.newest + 1, drafted, tree.masks[sure], adapter.vocabulary)
        best, tokens = torch.softmax(scores, dim=-1).topk(min(CHILDREN, scores.shape[1]))
        tokens = tokens if adapter.vocabulary is None else adapter.vocabulary.tokens_of(tokens)
        tree.offer(torch.tensor(sure, device=tokens.device), tokens, best)

    def straighten(self, text: "TextState", path: Tensor, position: int | Tensor) -> None:
        """Move the adapter's keys and values, and the exit layer's rows."""
        memory: TreeMemory = text.memory
        move = self.target.backend.straighten
        move(path, position, memory.cache.rows)
        move(path, 1, memory.exit_hidden[None])
        ran = 0
        for row in path.tolist():
            if row >= memory.ran:
                break
            ran += 1
        memory.length = text.newest + ran
