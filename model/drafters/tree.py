"""Trees of drafts from Kangaroo's drafter: several guesses for one place, so that more of them stand.

A tree grows in rounds. In each, the adapter and the head rank what may follow the rows of the round before, and the
operation ``grow`` makes rows of the likeliest of all candidates so far, wherever they hang (as in EAGLE-2, arXiv
2406.16858). The threshold means what it means for a chain: behind a row whose own probability is below it, nothing is
drafted. Where that holds for all rows of a round, the tree is done.

Where tokens are sampled, drafter and target share the noise of a position. So candidates are ranked with that noise,
and their probabilities are those of the noisy scores: what the target will choose is nearly decided by it.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_CHILDREN, MAX_SPECULATIVE_TOKENS, NO_TOKEN, Hint, Ranked, Tree

from ..errors import KangarooError
from ..number import is_whole
from ..spans import span
from ..target.cache import Branches
from ..target.llama import Llama
from .adapter import DraftNetwork
from .growth import parents_of, widths
from .kangaroo import AdapterMemory, KangarooDrafter
from .protocol import Draft, Stage
from .ways import Way, check_way

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser


class TreeDrafter(KangarooDrafter):
    """Kangaroo's drafter, drafting trees.

    Args:
        target: the model.
        adapter: trained for it.
        rows: the most drafts of a tree, 1 to 15.

    Raises:
        KangarooError: another number of drafts, an adapter that cannot draft trees, or a float16 cache beside float32
            arithmetic.
    """

    def __init__(self, target: Llama, adapter: DraftNetwork, rows: int) -> None:
        if not is_whole(rows) or not 1 <= rows <= MAX_SPECULATIVE_TOKENS:
            raise KangarooError(
                f"draft_tree is {rows!r}; it must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}."
            )
        check_way(adapter.config.parts, Way(rows), target.kv_dtype == target.dtype)
        super().__init__(target, adapter)
        self.draft_tree, self.auto = rows, False

    # ---- led by the host

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft a tree of at most ``most`` rounds; rows less sure than ``threshold`` have nothing behind them."""
        if not most:
            return super().propose(text, chooser, most, threshold)
        memory, device = text.memory, self.target.device
        tree, hint = Tree.root(self.draft_tree + 1, device), self.hint(text)
        least = torch.full((1,), threshold, device=device)
        first, last, sure, steps = 0, 1, [True], 0
        self.shallow_rows(text, tree, first, last)
        for count in widths(self.draft_tree, most):
            if not any(sure):
                break
            with span("kangaroo/draft/step"):
                ranked = self.rank(text, chooser, tree, first, last, sure)
                self.target.backend.grow(tree, ranked, first, count, least, hint=hint)
            first, memory.ran, steps = last, last, steps + 1
            last = first + int((tree.tokens[first : first + count] != NO_TOKEN).sum())
            if first == last:
                break
            sure = (tree.confidences[first:last] >= least).tolist()
            self.shallow_rows(text, tree, first, last)
        return Draft(
            tree.tokens[1:last],
            memory.exit_hidden[1 : 1 + last],
            confidences=tuple(tree.confidences[1:last].tolist()),
            parents=parents_of(tree.ancestors[:last].tolist()),
            steps=steps,
        )

    def hint(self, text: "TextState") -> Hint | None:
        """Looked-up tokens that are candidates besides, on the loop led by the host; here there are none."""
        return None

    def hint_on_device(self, iteration: "Iteration") -> Hint | None:
        """The same on the resident loop."""
        return None

    def shallow_rows(self, text: "TextState", tree: Tree, first: int, last: int) -> None:
        """The target's first layers on some rows of the tree."""
        with span("kangaroo/draft/shallow"):
            tokens = tree.tokens[first:last].tolist() if first else text.tokens[-1:]
            where = Branches(text.newest + first, tree.ancestors[first:last]) if first else text.newest
            hidden = self.target.run(self.target.embed(tokens), text.cache, where, 0, self.first_layer)
            text.memory.exit_hidden[1 + first : 1 + last] = hidden

    def rank(
        self, text: "TextState", chooser: "Chooser", tree: Tree, first: int, last: int, sure: list[bool]
    ) -> Ranked:
        """Adapter on the rows of a round, head on the ``sure`` ones of them: what may follow these.

        The adapter runs on all of them, so that its cache has no hole that a later row's attention would read.
        """
        adapter, memory = self.adapter, text.memory
        rows, masks = memory.exit_hidden[1 + first : 1 + last], tree.ancestors[first:last]
        if first:
            hidden = adapter.run(rows, memory.cache, Branches(text.newest + first, masks))
        else:  # behind the rows that it missed, as in a chain
            hidden = self.run_adapter(memory, rows)
        kept = torch.tensor(sure, device=hidden.device).nonzero()[:, 0]
        logits, vocabulary = chooser.logits(hidden[kept], adapter.head), adapter.head.vocabulary
        drafted = tree.tokens[1:last].tolist()
        scores = chooser.scores(logits, adapter.head, text.newest + 1, drafted, masks[kept])
        best, tokens = torch.softmax(scores, dim=-1).topk(min(MAX_CHILDREN, scores.shape[1]))
        tokens = tokens if vocabulary is None else vocabulary.tokens_of(tokens)
        size = last - first, tokens.shape[1]
        return Ranked(*(each.new_zeros(size).index_copy(0, kept, each) for each in (tokens, best)))

    def straighten(self, text: "TextState", path: Tensor, position: int | Tensor) -> None:
        """Move the adapter's keys and values and, where the host leads, the exit layer's rows."""
        memory: AdapterMemory = text.memory
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
        return sum(widths(self.draft_tree, self.rounds(most)))

    def rounds(self, most: int) -> int:
        """How many rounds a tree grows in, where a step may draft ``most`` tokens behind each other."""
        return most

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """The shallow layers on the newest token; then, round by round, candidates and the shallow layers on the best.

        A round that does not take place is skipped like a step behind the early exit, under the flag of its rows.
        """
        growth = Growth(self, iteration, reach)
        yield Stage("kangaroo/tree/shallow", growth.begin)
        first, last = 0, 1
        for number, count in enumerate(widths(self.draft_tree, self.rounds(iteration.longest)), start=1):
            yield Stage("kangaroo/tree/step", partial(growth.rank, number, first, last))
            first, last = last, last + count
            yield Stage("kangaroo/tree/shallow", partial(growth.grow, number, first, last))
        yield Stage("kangaroo/tree/done", growth.finish)

    def hand_on(self, iteration: "Iteration", tokens: Tensor, ancestors: Tensor) -> None:
        """A tree is what verification looks at."""
        buffers = iteration.buffers
        assert buffers.ancestors is not None, "an iteration whose drafter has a tree makes them"
        buffers.drafts.token.copy_(tokens)
        buffers.ancestors.copy_(ancestors)


class Growth:
    """The work of a tree in an iteration on the device.

    Args:
        drafter: whose tree it is.
        iteration: whose buffers are read and written.
        reach: no position is beyond it.

    Attributes:
        hint: what lookup expects behind the newest token; None without it.
        ranked: what may follow the rows of the latest round.
    """

    hint: Hint | None
    ranked: Ranked

    def __init__(self, drafter: TreeDrafter, iteration: "Iteration", reach: int) -> None:
        self.drafter, self.iteration, self.reach = drafter, iteration, reach
        self.target, self.buffers, device = drafter.target, iteration.buffers, drafter.target.device
        rows = iteration.max_drafts
        rounds = min(rows, drafter.rounds(iteration.longest))

        def make() -> tuple[Tree, Tensor]:
            return Tree.root(rows + 1, device), torch.zeros(rounds + 1, dtype=torch.int32, device=device)

        self.tree, self.going = iteration.runner.keep(f"tree of {rows} in {rounds} rounds", make)

    def begin(self) -> None:
        """The newest token's row. ``going[i]`` says whether round i + 1 takes place; there may be no room for it."""
        self.hint = self.drafter.hint_on_device(self.iteration)
        self.drafter.shallow(self.iteration, 0, self.reach)
        room = self.buffers.limit - self.buffers.length
        self.going.copy_(room > torch.arange(1, len(self.going) + 1, device=room.device))
        self.going[:1].mul_(self.buffers.flags[:1])

    def rank(self, number: int, first: int, last: int) -> None:
        """Adapter and head on the rows of the round before: candidates for round ``number``."""
        adapter, buffers, tree = self.drafter.adapter, self.buffers, self.tree
        active, sampling = self.going[number - 1 : number], self.iteration.chooser.numbers
        cache, masks = self.iteration.text.memory.cache, tree.ancestors[first:last]
        if first:
            rows, where = buffers.hidden(first, last), Branches(buffers.position(first), masks)
            hidden = adapter.run(rows, cache, where, reach=self.reach, active=active)
        else:  # with the row before, which it may not have seen
            rows = buffers.hidden(-1, 1)
            hidden = adapter.run(rows, cache, buffers.position(-1), reach=self.reach, active=active)[-1:]
        backend, head = self.target.backend, adapter.head
        narrowed = head.narrow(hidden, backend, active)
        logits = backend.lm_head(narrowed, head.norm, head.weight, eps=head.eps, active=active)
        greedy = self.iteration.chooser.sampling.greedy
        self.ranked = backend.rank(
            logits,
            min(MAX_CHILDREN, logits.shape[1]),
            buffers.position(1),
            temperature=None if greedy else sampling.temperature,
            seed=sampling.seed,
            top_k=None if greedy else sampling.top_k,
            top_p=None if greedy else sampling.top_p,
            vocabulary=head.vocabulary,
            ancestors=masks,
            active=active,
        )

    def grow(self, number: int, first: int, last: int) -> None:
        """The rows of round ``number``, and the shallow layers on them."""
        buffers, tree, target = self.buffers, self.tree, self.target
        target.backend.grow(
            tree,
            self.ranked,
            first - len(self.ranked.tokens),
            last - first,
            buffers.threshold(0),
            hint=self.hint,
            active=self.going[number - 1 : number],
            flags=buffers.flags[first - 1 : last - 1],
            following=self.going[number : number + 1],
        )
        target.run(
            target.weights.embedding[tree.tokens[first:last].clamp(min=0)],
            self.iteration.text.cache,
            Branches(buffers.position(first), tree.ancestors[first:last]),
            0,
            self.drafter.first_layer,
            reach=self.reach,
            active=buffers.present(first),
            out=buffers.hidden(first, last),
        )

    def finish(self) -> None:
        """Hand the tree on to verification."""
        torch.sum(self.going[:-1], dim=0, keepdim=True, dtype=torch.int64, out=self.buffers.draft_steps)
        self.drafter.hand_on(self.iteration, self.tree.tokens[1:], self.tree.ancestors)
