"""Prompt lookup: draft what followed the text's last tokens where they stood before. It needs no training.

The longest match decides (as in SuffixDecoding, arXiv 2411.04975), and it bounds the draft: a match of m tokens is
worth m drafts. Text that repeats itself, or its prompt, gains; in fresh text nothing matches, and a step costs what a
step of plain decoding costs.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, Match

from .protocol import Draft, Drafter, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser
    from ..target.llama import Llama

LEAST_MATCH = 3
"""Tokens that must match: shorter matches are chance, and their drafts cost more than they bring."""


class Found(NamedTuple):
    """What looking up on the device keeps beside an iteration's drafts.

    Attributes:
        arrivals: ``[2]`` int64, where the kernel's programs meet; zeros between launches.
        matched: ``[1]`` int64, the length of the latest match.
    """

    arrivals: Tensor
    matched: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> "Found":
        """Before the first look."""
        return cls(*(torch.zeros(size, dtype=torch.int64, device=device) for size in (2, 1)))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.arrivals.nbytes + self.matched.nbytes


def look_up_drafts(iteration: "Iteration", found: Found, flags: Tensor | None = None, least: int = LEAST_MATCH) -> None:
    """The iteration's drafts by lookup, and the embeddings of the newest token and of all drafts as its rows.

    ``flags`` are written where they are given; a match of fewer than ``least`` tokens is none.
    """
    buffers, target, most = iteration.buffers, iteration.target, iteration.max_drafts
    match = Match(buffers.drafts.token, found.matched)
    where = buffers.text, buffers.length, most, least
    target.backend.look_up(*where, flags=flags, arrivals=found.arrivals, out=match)
    buffers.hidden(0, 1).copy_(buffers.newest)
    torch.index_select(target.weights.embedding, 0, match.tokens, out=buffers.hidden(1, most + 1))


class PromptLookup(Drafter):
    """Drafts what followed the longest match of the text's last tokens. It runs on any checkpoint, on both loops.

    Args:
        target: the model that it drafts for.
    """

    num_speculative_tokens = MAX_SPECULATIVE_TOKENS
    auto = True  # how often a match is right depends on the text alone

    def __init__(self, target: "Llama") -> None:
        self.target = target
        self.nothing = torch.tensor([], dtype=torch.int64, device=target.device)

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """At most ``most`` tokens; the threshold does not matter, since a match has no probability."""
        if not most:
            return Draft(self.nothing, self.target.embed(text.tokens[-1:]))
        found = self.target.backend.look_up(text.on_device(), len(text.tokens), most, LEAST_MATCH)
        drafts = found.tokens[: int(found.matched)]
        hidden = self.target.embed([text.tokens[-1], *drafts.tolist()])  # first_layer is 0: verification begins there
        return Draft(drafts, hidden, steps=0)

    def new_memory(self) -> Found:
        """A few words on the device, which the resident loop works on."""
        return Found.nothing(self.target.device)

    def attach(self, iteration: "Iteration") -> None:
        """No program is at the meeting place yet, though an iteration that broke off may have left one there."""
        iteration.text.memory.arrivals.zero_()
        iteration.buffers.draft_steps.zero_()

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """One stage of fixed shapes: three launches, and two more where ``auto`` bounds how much is drafted."""
        yield Stage("kangaroo/lookup", partial(self.draft, iteration))

    def draft(self, iteration: "Iteration") -> None:
        """The drafts, and which of them are made."""
        buffers = iteration.buffers
        look_up_drafts(iteration, iteration.text.memory, buffers.flags)
        if iteration.auto:
            buffers.forbid(iteration.max_drafts)
