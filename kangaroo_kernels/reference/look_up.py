"""``look_up``: what followed the text's last tokens where they stood before. A drafter that needs no training.

    same(p) = the largest k <= 15 with text[p - k : p] == text[n - k : n];  place = the last p < n with the largest same

Of several longest matches the last one decides, since what a text said last it says again soonest.
"""

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, Match
from kangaroo_kernels.shared.checks import check_look_up


def look_up(
    text: Tensor,
    length: int | Tensor,
    most: int,
    least: int,
    *,
    flags: Tensor | None = None,
    arrivals: Tensor | None = None,
    out: Match | None = None,
) -> Match:
    """Find the longest match of the text's end, and of several the last.

    Args:
        text: ``[T]`` int64; what lies beyond ``length`` is not looked at.
        length: n, tokens of the text, from 1 to T.
        most: R, how many tokens are wanted, 0 to 15.
        least: a match of fewer tokens is none, 1 to 15.
        flags: ``[>= R + 1]`` int32, of which the first says whether anything is drafted. The first R are written: flag
            j says whether draft j is. A match of m tokens is worth m drafts. None writes no flags.
        arrivals: ``[2]`` int64, two zeros, which the kernel's programs meet at and leave as zeros; launches that may
            run at the same time must not share them. None lets the kernel make its own, which costs a launch. The
            reference does not look at them.
        out: made if None.

    Returns:
        What followed the match, gone through again where the text ends, and the length of the match, 15 at most.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a length in device memory of another dtype.
    """
    check_look_up(text, length, most, least, flags, arrivals, out)
    n, device, matched = int(length), text.device, 0
    places = torch.arange(n, device=device)  # where the token after a match stands
    while matched < MAX_SPECULATIVE_TOKENS:
        longer = places[places > matched]
        longer = longer[text[longer - matched - 1] == text[n - matched - 1]]
        if not len(longer):
            break
        places, matched = longer, matched + 1
    place = int(places[-1])
    tokens = text[place + torch.arange(most, device=device) % (n - place)]
    matched = matched if matched >= least else 0
    if flags is not None:
        flags[:most] = (torch.arange(most, device=device) < matched * flags[:1]).int()
    found = Match(tokens, torch.tensor([matched], device=device))
    return found if out is None else Match(*(kept.copy_(new) for kept, new in zip(out, found, strict=True)))
