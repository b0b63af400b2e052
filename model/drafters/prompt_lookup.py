"""Prompt lookup: draft what followed the text's last tokens where they stood before. It needs no training.

The longest match decides (as in SuffixDecoding, arXiv 2411.04975), and it bounds the draft: a match of m tokens is
worth m drafts. Text that repeats itself, or its prompt, gains; in fresh text nothing matches, and a step costs what a
step of plain decoding costs.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from .protocol import Draft, Drafter, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser
    from ..target.llama import Llama

LEAST_MATCH = 3
"""Tokens that must match: shorter matches are chance, and their drafts cost more than they bring."""
NO_TOKEN = -1
"""Stands before the text's beginning: no token equals it."""


def look_up(text: Tensor, length: Tensor | int, most: int) -> tuple[Tensor, Tensor]:
    """Find the longest match of the text's end, and of several the last; nothing asks the host.

    Args:
        text: ``[capacity]`` int64; what lies beyond ``length`` is not looked at.
        length: tokens of the text, a number or ``[1]`` int64.
        most: how many tokens are wanted.

    Returns:
        ``[most]`` int64, what followed the match, which is gone through again where the text ends; and ``[1]`` int64,
        how many of these tokens are worth drafting.
    """
    device, reach = text.device, MAX_SPECULATIVE_TOKENS
    places = torch.arange(len(text), device=device)  # a place is where the token after a match stands
    padded = pad(text, (reach, 0), value=NO_TOKEN)
    end = padded[length + torch.arange(reach, device=device)]
    same = padded.unfold(0, reach, 1)[: len(text)] == end  # [capacity, reach], the nearest token last
    matched = same.flip(1).cumprod(1).sum(1)
    rank = torch.where(places < length, matched * len(text) + places, 0).max(dim=0, keepdim=True).values
    place, matched = rank % len(text), rank // len(text)
    period = (length - place).clamp(min=1)
    drafts = text[place + torch.arange(most, device=device) % period]
    return drafts, torch.where(matched >= LEAST_MATCH, matched, 0).clamp(max=most)


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
        tokens = torch.tensor(text.tokens, device=self.target.device)
        drafts, count = look_up(tokens, len(tokens), most)
        drafts = drafts[: int(count)]
        hidden = self.target.embed([text.tokens[-1], *drafts.tolist()])  # first_layer is 0: verification begins there
        return Draft(drafts, hidden)

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """One stage of fixed shapes."""
        yield Stage("kangaroo/lookup", lambda: self._draft(iteration))

    def _draft(self, iteration: "Iteration") -> None:
        buffers, most = iteration.buffers, iteration.max_drafts
        drafts, count = look_up(buffers.text, buffers.length, most)
        made = torch.arange(most, device=count.device) < count * buffers.flags[:1]
        buffers.drafts.token.copy_(drafts)
        buffers.flags[:most].copy_(made)
        buffers.hidden(0, 1).copy_(buffers.newest)
        buffers.hidden(1, most + 1).copy_(self.target.weights.embedding[drafts])
