"""How a text begins, whichever loop goes on with it: room in the caches, and one pass over the prompt."""

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..drafters.protocol import Drafter
from ..target.llama import Llama
from .state import TextState


def reach_of(length: int) -> int:
    """Positions that a text of ``length`` tokens may write: drafts beyond the limit still write their rows."""
    return length + MAX_SPECULATIVE_TOKENS + 1


def prefill(target: Llama, drafter: Drafter | None, text: TextState, length: int, kept: int) -> None:
    """Fill all caches for every token but the last, and make room for a text of ``length`` tokens.

    The first ``kept`` tokens, at most all but two, are in the caches from the text before.
    """
    reach = reach_of(length)  # the same for any number of drafts, so that they all find the same memory
    text.cache.reserve(reach, length, kept)
    hidden = target.embed(text.tokens[kept:-1]) if len(text.tokens) > 1 else None
    first = 0 if drafter is None else drafter.first_layer
    if hidden is not None:
        hidden = target.run(hidden, text.cache, kept, 0, first)
        final = target.run(hidden, text.cache, kept, first, target.config.num_hidden_layers)
    if drafter is not None:
        text.final = None if hidden is None else final
        drafter.prefill(text, hidden, reach, length)
