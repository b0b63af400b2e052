"""Kangaroo's drafter and prompt lookup by turns: each step is drafted by whichever expects more of its drafts to stand.

The longer a match, the surer what followed it (SAM Decoding, arXiv 2411.10666, decides so between a lookup and another
drafter), and to draft it costs one pass of the shallow layers, whatever its length. Elsewhere the adapter drafts.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..spans import span
from ..target.llama import Llama
from .adapter import Adapter
from .kangaroo import AdapterMemory, KangarooDrafter
from .prompt_lookup import LEAST_MATCH
from .protocol import Draft, Drafter

if TYPE_CHECKING:
    from ..loop.state import TextState
    from ..sampling import Chooser

MATCHES, USUAL = (3, 5, 9, 15), (0.7, 0.75, 0.85, 0.97)
"""Matched tokens from which on a match counts as longer, and how often what followed it stood in SmolLM2's answers."""

WEIGHT = 3.0
"""So many tokens of the text itself weigh as much as ``USUAL``."""

MEMORY = 0.95
"""What an observation counts for after the next step, so a kind of match that failed is tried again later."""


@dataclass
class Experience:
    """What became of the latest drafts of one text.

    Attributes:
        stood: looked-up tokens that stood, by the length of the match; older steps count less and less.
        tried: those that were compared: all that stood, and the first of a draft that did not.
        adapter: how many of the adapter's drafts stood in a step.
    """

    stood: list[float] = field(default_factory=lambda: [0.0] * len(MATCHES))
    tried: list[float] = field(default_factory=lambda: [0.0] * len(MATCHES))
    adapter: float = 1.0

    def sure(self, matched: int) -> float:
        """How likely a token is to stand that follows a match of ``matched`` tokens."""
        kind = bisect_right(MATCHES, matched) - 1
        return (WEIGHT * USUAL[kind] + self.stood[kind]) / (WEIGHT + self.tried[kind])

    def learn(self, matched: int, drafted: int, agreed: int) -> None:
        """A step is done: the length of its match, 0 where the adapter drafted, its drafts, and how many stood."""
        self.stood, self.tried = ([MEMORY * count for count in counts] for counts in (self.stood, self.tried))
        if matched:
            kind = bisect_right(MATCHES, matched) - 1
            self.stood[kind] += agreed
            self.tried[kind] += min(agreed + 1, drafted)
        elif drafted:
            self.adapter += (1 - MEMORY) * (agreed - self.adapter)


@dataclass
class LookupMemory(AdapterMemory):
    """What the drafter keeps of one text.

    Attributes:
        experience: of this text.
        latest: the length of the match and the number of drafts of the step under way.
    """

    experience: Experience = field(default_factory=Experience)
    latest: tuple[int, int] = (0, 0)


class KangarooWithLookup(KangarooDrafter):
    """Drafts what followed the text's last tokens before, where that promises more than the adapter.

    A match of m tokens is worth m drafts, up to the request's number; the adapter drafts up to the number of its own
    configuration. The confidence of a looked-up token is how often such tokens stood lately. The adapter catches up on
    what it did not draft, as after steps without drafts.

    Args:
        target: the model.
        adapter: trained for it.
    """

    stages = Drafter.stages  # type: ignore[assignment]  # none: the loop on the device cannot run it

    def __init__(self, target: Llama, adapter: Adapter) -> None:
        super().__init__(target, adapter)
        self.most_of_adapter, self.num_speculative_tokens = self.num_speculative_tokens, MAX_SPECULATIVE_TOKENS

    def new_memory(self) -> LookupMemory:
        """The adapter's, and no experience."""
        return LookupMemory(**vars(super().new_memory()))

    def prefill(self, text: "TextState", hidden: Tensor | None, reach: int, length: int) -> None:
        """As ``KangarooDrafter``; what is drafted depends on this text alone."""
        super().prefill(text, hidden, reach, length)
        text.memory.experience = Experience()

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """At most ``most`` tokens by lookup or by the adapter; a match that is less sure than ``threshold`` is none."""
        memory: LookupMemory = text.memory
        tokens, matched = self._look_up(text, most)
        if matched:
            sure = memory.experience.sure(matched)
            expected = sum(sure**place for place in range(1, len(tokens) + 1))
            if sure < threshold or expected <= memory.experience.adapter:
                matched = 0
        if matched:
            draft = self._draft_of(tokens, sure, text)
        else:
            draft = super().propose(text, chooser, min(most, self.most_of_adapter), threshold)
        memory.latest = matched, len(draft.tokens)
        return draft

    def commit(self, text: "TextState", count: int) -> None:
        """As ``KangarooDrafter``, and learn from what stood."""
        super().commit(text, count)
        text.memory.experience.learn(*text.memory.latest, agreed=count - 1)

    def _look_up(self, text: "TextState", most: int) -> tuple[Tensor, int]:
        """What followed the text's longest match, and the length of the match; 0 where there is none."""
        with span("kangaroo/draft/lookup"):
            known = torch.tensor(text.tokens, device=self.target.device)
            found = self.target.backend.look_up(known, len(known), MAX_SPECULATIVE_TOKENS, LEAST_MATCH)
            matched = int(found.matched)  # as many are worth drafting
            return found.tokens[: min(matched, most)], matched if most else 0

    def _draft_of(self, tokens: Tensor, sure: float, text: "TextState") -> Draft:
        """Run the shallow layers over the newest token and looked-up ones."""
        with span("kangaroo/draft/shallow"):
            rows = self.target.embed([text.tokens[-1], *tokens.tolist()])
            hidden = self.target.run(rows, text.cache, text.newest, 0, self.first_layer)
        text.memory.exit_hidden[1 : 1 + len(hidden)] = hidden
        return Draft(tokens, hidden, confidences=(sure,) * len(tokens))
