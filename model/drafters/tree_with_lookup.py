"""Trees of drafts beside prompt lookup: a sure match is drafted alone, any other one is a branch of the tree.

Lookup and adapter foresee different tokens, so a tree that has both stands where either is right. Where ``weigh``
expects more of a match than of the tree, its tokens are the draft, and the adapter rests, as beside chains.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import NO_TOKEN, USUAL_WEIGHT, Experience, Hint

from ..target.llama import Llama
from .adapter import DraftNetwork
from .kangaroo_with_lookup import MATCHES, USUAL, KangarooWithLookup, LookupMemory
from .tree import TreeDrafter

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState


SHORT, USUAL_OF_SHORT = (1, 2), (0.15, 0.45)
"""Shorter matches than are drafted alone, and how often what followed them stood in SmolLM2's answers."""


class TreeWithLookup(KangarooWithLookup, TreeDrafter):
    """Drafts a match that is sure enough, else a tree in which the match is a branch, however short it is.

    Args:
        target: the model.
        adapter: trained for it.
        rows: the most drafts of a tree, and of a match, 1 to 15.
        num_draft_steps: the most rounds of a tree, 1 to 15; None takes the adapter's number of drafts.

    Raises:
        KangarooError: as ``TreeDrafter``.
    """

    least_match, matches, usual = min(SHORT), (*SHORT, *MATCHES), (*USUAL_OF_SHORT, *USUAL)

    def __init__(self, target: Llama, adapter: DraftNetwork, rows: int, num_draft_steps: int | None = None) -> None:
        TreeDrafter.__init__(self, target, adapter, rows)
        self._beside_lookup(num_draft_steps)

    def rounds(self, most: int) -> int:
        """The adapter takes no more steps than its own number."""
        return min(most, self.num_draft_steps)

    def at_hand(self, text: "TextState", most: int, threshold: float) -> bool:
        """As beside chains; a match is worth no more drafts than a tree has rows."""
        return super().at_hand(text, min(most, self.rows(most)), threshold)

    def hint(self, text: "TextState") -> Hint | None:
        """What was looked up, since it was not sure enough to be drafted alone."""
        memory: LookupMemory = text.memory
        if memory.match is None:
            return None
        tokens, matched = memory.match
        return Hint(tokens, matched, sureness(memory.experience, matched))

    def hint_on_device(self, iteration: "Iteration") -> Hint | None:
        """The same, where looking up left it."""
        memory: LookupMemory = iteration.text.memory
        matched = memory.found.matched
        return Hint(iteration.buffers.drafts.token, matched, sureness(memory.experience, matched))

    def hand_on(self, iteration: "Iteration", tokens: Tensor, ancestors: Tensor) -> None:
        """The tree, or looked-up tokens where these are the draft: a tree of padding has a chain's masks."""
        buffers = iteration.buffers
        made = buffers.at_hand > 0
        looked_up = torch.where(made, buffers.drafts.token, NO_TOKEN)
        super().hand_on(iteration, torch.where(made[:1], looked_up, tokens), ancestors)


def sureness(experience: Experience, matched: Tensor) -> Tensor:
    """How likely a token is to stand that followed a match, as ``weigh`` counts it: ``[1]`` float32; 0 for no match."""
    kind = (experience.kinds <= matched).sum(dim=0, keepdim=True) - 1
    usual, stood, tried = (each[kind.clamp(min=0)] for each in (experience.usual, experience.stood, experience.tried))
    sure = (USUAL_WEIGHT * usual + stood) / (USUAL_WEIGHT + tried)
    return torch.where(kind >= 0, sure, 0.0).float()
