"""``accept``: which drafted tokens stand, and what the verification step commits.

    accepted = length of the longest prefix with draft[i] == target[i];  committed = target[:accepted + 1]

The last committed token is the target's own (the bonus token). A stop token or the length limit ends the commit early.
The rule is Kangaroo's (arXiv 2404.18911, section 3) for greedy decoding; with coupled noise it serves sampling too.
"""

from typing import NamedTuple

from torch import Tensor


class Acceptance(NamedTuple):
    """What one verification step decided.

    Attributes:
        accepted: drafted tokens that the target agreed with, before any early end.
        committed: tokens to append to the text, ``1 .. accepted + 1``, fewer only at a stop or the limit.
        stopped: whether the last committed token is a stop token.
    """

    accepted: int
    committed: list[int]
    stopped: bool


def accept(draft: Tensor, target: Tensor, stop_tokens: frozenset[int], limit: int) -> Acceptance:
    """Compare ``draft`` ``[k]`` with ``target`` ``[k + 1]``, both int64, and commit at most ``limit >= 1`` tokens."""
    drafted, wanted = draft.tolist(), target.tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == wanted[accepted]:
        accepted += 1
    committed = []
    for token in wanted[: min(accepted + 1, limit)]:
        committed.append(token)
        if token in stop_tokens:
            return Acceptance(accepted, committed, stopped=True)
    return Acceptance(accepted, committed, stopped=False)
