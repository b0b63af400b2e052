"""Kangaroo's drafter and prompt lookup by turns: each step is drafted by whichever expects more of its drafts to stand.

To draft what followed a match costs one pass of the shallow layers, whatever its length, and the longer the match, the
surer its tokens (``weigh`` has the rule). Elsewhere the adapter drafts. Both loops have the same operations choose, so
their drafts are the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, Experience, Match, Weighed

from ..spans import span
from ..target.llama import Llama
from .adapter import DraftNetwork
from .kangaroo import AdapterMemory, KangarooDrafter
from .prompt_lookup import LEAST_MATCH, Found, look_up_drafts
from .protocol import AS_DRAFTED, Draft, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser

MATCHES, USUAL = (LEAST_MATCH, 5, 9, 15), (0.7, 0.75, 0.85, 0.97)
"""Matched tokens from which on a match counts as longer, and how often what followed it stood in SmolLM2's answers."""


@dataclass
class LookupMemory(AdapterMemory):
    """What the drafter keeps of one text.

    Attributes:
        experience: of this text.
        found: what looking up on the device keeps.
        thresholds: ``[15]`` float32, on the device: the request's own. They hold for looked-up tokens, whatever
            ``auto`` finds for the adapter's.
        match: led by the host, what was looked up for the next step.
        at_hand: of these, the tokens that are drafts, and how sure they are; None where the adapter is to draft.
    """

    experience: Experience = field(kw_only=True)
    found: Found = field(kw_only=True)
    thresholds: Tensor = field(kw_only=True)
    match: Match | None = None
    at_hand: tuple[Tensor, tuple[float, ...]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return super().nbytes + self.found.nbytes + sum(each.nbytes for each in (*self.experience, self.thresholds))


class KangarooWithLookup(KangarooDrafter):
    """Drafts what followed the text's last tokens before, where that promises more than the adapter.

    A match of m tokens is worth m drafts, up to the request's number; the adapter drafts up to ``num_draft_steps``, or
    as ``auto`` finds best. The confidence of a looked-up token is how often such tokens stood lately.
    The adapter catches up on what it did not draft.

    Args:
        target: the model.
        adapter: trained for it.
        num_draft_steps: the most drafts a step that the adapter makes, 1 to 15; None takes its configuration's number.

    Attributes:
        least_match: tokens that must match.
        matches: how many of them make a match of each kind.
        usual: how often a token stands that follows such a match, before the text has shown it.
    """

    least_match: int = LEAST_MATCH
    matches: Sequence[int] = MATCHES
    usual: Sequence[float] = USUAL

    def __init__(self, target: Llama, adapter: DraftNetwork, num_draft_steps: int | None = None) -> None:
        super().__init__(target, adapter)
        self._beside_lookup(num_draft_steps)

    def _beside_lookup(self, num_draft_steps: int | None) -> None:
        """The adapter's number of drafts becomes that of its steps; a match may be longer."""
        self.num_draft_steps = self.num_speculative_tokens if num_draft_steps is None else num_draft_steps
        self.num_speculative_tokens = MAX_SPECULATIVE_TOKENS

    def new_memory(self) -> LookupMemory:
        """The adapter's, and no experience."""
        device = self.target.device
        return LookupMemory(
            **vars(super().new_memory()),
            experience=Experience.none(self.matches, self.usual, device),
            found=Found.nothing(device),
            thresholds=torch.zeros(MAX_SPECULATIVE_TOKENS, device=device),
        )

    def prefill(self, text: "TextState", hidden: Tensor | None, reach: int, length: int) -> None:
        """As ``KangarooDrafter``; what is drafted depends on this text alone."""
        super().prefill(text, hidden, reach, length)
        text.memory.experience.forget()

    # ---- led by the host

    def at_hand(self, text: "TextState", most: int, threshold: float) -> bool:
        """Whether a match promises more than the adapter; one that is less sure than ``threshold`` is none."""
        memory: LookupMemory = text.memory
        with span("kangaroo/draft/lookup"):
            match = memory.match = self._look_up(text)
            thresholds, length = torch.full((most,), threshold, device=self.target.device), len(text.tokens)
            weighed = self.target.backend.weigh(match.matched, thresholds, length, length + most + 1, memory.experience)
            count = int(weighed.made.sum())
        memory.at_hand = (match.tokens[:count], tuple(weighed.sure[:count].tolist())) if count else None
        return count > 0

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """What is at hand, or at most ``most`` tokens by the adapter."""
        memory: LookupMemory = text.memory
        if memory.at_hand is None:
            return super().propose(text, chooser, most, threshold)
        tokens, sure = memory.at_hand
        with span("kangaroo/draft/shallow"):
            rows = self.target.embed([text.tokens[-1], *tokens.tolist()])
            hidden = memory.exit_hidden[1 : 2 + len(tokens)]
            hidden.copy_(self.target.run(rows, text.cache, text.newest, 0, self.first_layer))
        return Draft(tokens, hidden, confidences=sure)

    def _look_up(self, text: "TextState") -> Match:
        return self.target.backend.look_up(text.on_device(), len(text.tokens), MAX_SPECULATIVE_TOKENS, self.least_match)

    # ---- on the device

    def attach(self, iteration: "Iteration") -> None:
        """As ``KangarooDrafter``; no program is at the meeting place yet."""
        super().attach(iteration)
        memory: LookupMemory = iteration.text.memory
        memory.found.arrivals.zero_()
        longest = min(iteration.longest, iteration.max_drafts)  # a tree has more rows than a branch, or fewer
        memory.thresholds.fill_(math.inf)
        memory.thresholds[:longest] = iteration.buffers.thresholds[:longest]

    def longest_chain(self, iteration: "Iteration") -> int:
        """The adapter drafts no more than its own number."""
        return min(iteration.max_drafts, self.num_draft_steps)

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """Look up and choose; then the shallow layers on all looked-up tokens, or the adapter's chain.

        Flags leave one of the two out, as they do with steps behind the early exit.
        """
        yield Stage("kangaroo/lookup", partial(self.choose, iteration))
        yield Stage("kangaroo/lookup/shallow", partial(self.shallow_all, iteration, reach))
        yield from super().stages(iteration, reach)
        yield Stage("kangaroo/lookup/made", partial(self.raise_flags, iteration))

    def choose(self, iteration: "Iteration") -> None:
        """Whether looked-up tokens are drafted; then the first flag falls, and the adapter makes no draft."""
        buffers, memory = iteration.buffers, iteration.text.memory
        look_up_drafts(iteration, memory.found, least=self.least_match)
        self.target.backend.weigh(
            memory.found.matched,
            memory.thresholds[: iteration.max_drafts],
            buffers.length,
            buffers.limit,
            memory.experience,
            flags=buffers.flags,
            out=Weighed(buffers.at_hand, buffers.drafts.confidence),
        )

    def shallow_all(self, iteration: "Iteration", reach: int) -> None:
        """The shallow layers on the newest token and all drafts by lookup, if there are any."""
        buffers = iteration.buffers
        rows = buffers.hidden(0, iteration.max_drafts + 1)
        self.target.run(
            rows,
            iteration.text.cache,
            buffers.position(0),
            0,
            self.first_layer,
            reach=reach,
            active=buffers.at_hand[:1],
            out=rows,
        )

    def raise_flags(self, iteration: "Iteration") -> None:
        """Say which drafts there are; where the adapter drafted, its steps have done so."""
        buffers = iteration.buffers
        buffers.flags[: iteration.max_drafts].add_(buffers.at_hand)
        if not self.draft_tree:  # which has counted its rounds
            torch.add(buffers.at_hand[:1], AS_DRAFTED, out=buffers.draft_steps)  # 0 where they are at hand

    def observations(self, iteration: "Iteration") -> Iterator[Stage]:
        """As ``KangarooDrafter``, and show the adapter what it did not draft."""
        yield from super().observations(iteration)
        yield Stage("kangaroo/lookup/adapter", partial(self.catch_up, iteration))

    def catch_up(self, iteration: "Iteration") -> None:
        """Keys and values of the adapter for the row before the newest token and all rows but the last.

        The next iteration takes that one, where it becomes the row before the newest token, as the adapter's own first
        step does. So the adapter lags by one row at most, whoever drafts.
        """
        buffers, memory, rows = iteration.buffers, iteration.text.memory, iteration.max_drafts
        states = None
        if memory.states is not None:
            states = memory.states.index_select(0, buffers.positions[: rows + 1].clamp(min=0))
        hidden, active = buffers.hidden(-1, rows), buffers.at_hand[:1]
        self.adapter.append(hidden, memory.cache, buffers.position(-1), states, active=active)
