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
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..errors import KangarooError
from ..number import is_whole
from ..spans import span
from ..target.cache import Branches
from ..target.llama import Llama
from .adapter import DraftNetwork
from .growth import CHILDREN, Tree, widths
from .kangaroo import AdapterMemory, KangarooDrafter
from .protocol import Draft, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser


@dataclass
class TreeMemory(AdapterMemory):
    """What the drafter keeps of one text.

    Attributes:
        ran: rows of the latest tree that the adapter has run on, the first ones.
    """

    ran: int = 0


class TreeDrafter(KangarooDrafter):
    """Kangaroo's drafter, drafting trees.

    Args:
        target: the model.
        adapter: trained for it.
        rows: the most drafts of a tree, 1 to 15.

    Raises:
        KangarooError: another number of drafts, an adapter with a deep state, or a float16 cache beside float32
            arithmetic.
    """

    def __init__(self, target: Llama, adapter: DraftNetwork, rows: int) -> None:
        if not is_whole(rows) or not 1 <= rows <= MAX_SPECULATIVE_TOKENS:
            raise KangarooError(
                f"draft_tree is {rows!r}; it must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}."
            )
        if adapter.state is not None:
            raise KangarooError("the adapter has a deep state, which is fed along a chain; leave draft_tree out.")
        if target.kv_dtype != target.dtype:
            raise KangarooError(
                "in a float16 cache a tree's rows have other bits than plain decoding's; leave kv_dtype or draft_tree "
                "out."
            )
        super().__init__(target, adapter)
        self.draft_tree, self.auto = rows, False

    def new_memory(self) -> TreeMemory:
        """As for chains, with a count of its own."""
        memory = super().new_memory()
        return TreeMemory(memory.cache, memory.length, memory.exit_hidden)

    # ---- led by the host

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft a tree of at most ``most`` rounds; rows less sure than ``threshold`` have nothing behind them."""
        if not most:
            return super().propose(text, chooser, most, threshold)
        memory: TreeMemory = text.memory
        tree, first, last, steps = Tree(self.draft_tree, self.target.device), 0, 1, 0
        self.shallow_rows(text, tree, first, last)
        for count in widths(self.draft_tree, most):
            sure = [row for row in range(first, last) if tree.confidences[row] >= threshold or not row]
            if not sure:
                break
            with span("kangaroo/draft/step"):
                self.rank(text, chooser, tree, first, last, sure)
            first, memory.ran, steps = last, last, steps + 1
            last = first + int(tree.take(first, count).sum())
            if first == last:
                break
            self.shallow_rows(text, tree, first, last)
        return Draft(
            tree.tokens[1:last],
            memory.exit_hidden[1 : 1 + last],
            confidences=tuple(tree.confidences[1:last].tolist()),
            parents=tuple(tree.parents[1:last].tolist()),
            steps=steps,
        )

    def shallow_rows(self, text: "TextState", tree: Tree, first: int, last: int) -> None:
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
        logits, vocabulary = chooser.logits(hidden, adapter.head), adapter.head.vocabulary
        drafted = tree.tokens[1:last].tolist()
        scores = chooser.scores(logits, adapter.head, text.newest + 1, drafted, tree.masks[sure])
        best, tokens = torch.softmax(scores, dim=-1).topk(min(CHILDREN, scores.shape[1]))
        tokens = tokens if vocabulary is None else vocabulary.tokens_of(tokens)
        tree.offer(torch.tensor(sure, device=tokens.device), tokens, best)

    def straighten(self, text: "TextState", path: Tensor, position: int | Tensor) -> None:
        """Move the adapter's keys and values and, where the host leads, the exit layer's rows."""
        memory: TreeMemory = text.memory
        move = self.target.backend.straighten
        move(path, position, memory.cache.rows)
        if isinstance(position, Tensor):
            return
        move(path, 1, memory.exit_hidden[None])
        ran = 0
        for row in path.tolist():
            if row >= memory.ran:
                break
            ran += 1
        memory.length = text.newest + ran

    # ---- on the device

    def rows(self, most: int) -> int:
        """Drafts of a tree whose branches have at most ``most`` tokens."""
        return sum(widths(self.draft_tree, most))

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """The shallow layers on the newest token; then, round by round, candidates and the shallow layers on the best.

        A round that does not take place is skipped like a step behind the early exit, under the flag of its rows.
        """
        growth = Growth(self, iteration, reach)
        yield Stage("kangaroo/tree/shallow", growth.begin)
        first, last = 0, 1
        for number, count in enumerate(widths(self.draft_tree, iteration.longest), start=1):
            yield Stage("kangaroo/tree/step", partial(growth.rank, number, first, last))
            first, last = last, last + count
            yield Stage("kangaroo/tree/shallow", partial(growth.grow, number, first, last))
        yield Stage("kangaroo/tree/done", growth.finish)


class Growth:
    """The work of a tree in an iteration on the device.

    Args:
        drafter: whose tree it is.
        iteration: whose buffers are read and written.
        reach: no position is beyond it.
    """

    def __init__(self, drafter: TreeDrafter, iteration: "Iteration", reach: int) -> None:
        self.drafter, self.iteration, self.reach = drafter, iteration, reach
        self.target, self.buffers, device = drafter.target, iteration.buffers, drafter.target.device
        rows, rounds = iteration.max_drafts, iteration.longest

        def make() -> tuple[Tree, Tensor]:
            return Tree(rows, device), torch.zeros(rounds + 1, dtype=torch.int32, device=device)

        self.tree, self.going = iteration.runner.keep(f"tree of {rows} in {rounds} rounds", make)

    def begin(self) -> None:
        """The newest token's row. ``going[i]`` says whether round i + 1 takes place; there may be no room for it."""
        self.tree.reset()
        self.drafter.shallow(self.iteration, 0, self.reach)
        room = self.buffers.limit - self.buffers.length
        self.going.zero_()
        self.going[:1] = self.buffers.flags[:1] * (room > 1).int()

    def rank(self, number: int, first: int, last: int) -> None:
        """Adapter and head on the rows of the round before: candidates for round ``number``."""
        adapter, buffers, tree = self.drafter.adapter, self.buffers, self.tree
        active, sampling = self.going[number - 1 : number], self.iteration.chooser.numbers
        cache, masks = self.iteration.text.memory.cache, tree.masks[first:last]
        if first:
            rows, where = buffers.hidden(first, last), Branches(buffers.position(first), masks)
            hidden = adapter.run(rows, cache, where, reach=self.reach, active=active)
        else:  # with the row before, which it may not have seen
            rows = buffers.hidden(-1, 1)
            hidden = adapter.run(rows, cache, buffers.position(-1), reach=self.reach, active=active)[-1:]
        backend, head = self.target.backend, adapter.head
        logits = backend.lm_head(hidden, head.norm, head.weight, eps=head.eps, active=active)
        greedy = self.iteration.chooser.sampling.greedy
        ranked = backend.rank(
            logits,
            min(CHILDREN, logits.shape[1]),
            buffers.position(1),
            temperature=None if greedy else sampling.temperature,
            seed=sampling.seed,
            top_k=None if greedy else sampling.top_k,
            top_p=None if greedy else sampling.top_p,
            vocabulary=head.vocabulary,
            ancestors=masks,
            active=active,
        )
        sure = (tree.confidences[first:last] >= buffers.threshold(0)) if first else active > 0
        counts = (sure & (active > 0))[:, None]
        rows = torch.arange(first, last, device=logits.device)
        tokens = torch.where(counts, ranked.tokens, 0)
        tree.offer(rows, tokens, torch.where(counts, ranked.confidences, 0.0))

    def grow(self, number: int, first: int, last: int) -> None:
        """The rows of round ``number``, and the shallow layers on them."""
        buffers, tree, target = self.buffers, self.tree, self.target
        worth = tree.take(first, last - first, self.going[number - 1 : number] > 0)
        buffers.flags[first - 1 : last - 1] = worth.int()
        sure = (worth & (tree.confidences[first:last] >= buffers.threshold(0))).any(dim=0, keepdim=True)
        room = buffers.limit - buffers.length
        self.going[number : number + 1] = (sure & (room > number + 1)).int()
        target.run(
            target.weights.embedding[tree.tokens[first:last].clamp(min=0)],
            self.iteration.text.cache,
            Branches(buffers.position(first), tree.masks[first:last]),
            0,
            self.drafter.first_layer,
            reach=self.reach,
            active=buffers.present(first),
            out=buffers.hidden(first, last),
        )

    def finish(self) -> None:
        """Hand the tree on to verification."""
        buffers = self.buffers
        assert buffers.ancestors is not None, "an iteration whose drafter has a tree makes them"
        buffers.drafts.token.copy_(self.tree.tokens[1:])
        buffers.ancestors.copy_(self.tree.masks)
        rounds = self.going[: min(self.iteration.max_drafts, self.iteration.longest)]  # no round follows the last
        torch.sum(rounds, dim=0, keepdim=True, dtype=torch.int64, out=buffers.draft_steps)
