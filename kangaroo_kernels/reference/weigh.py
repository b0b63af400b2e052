"""``weigh``: is a step drafted by lookup or by a drafter beside it? Whichever expects more of its drafts to stand.

    sure = (3 usual + stood) / (3 + tried);  by lookup, if sure >= threshold and sure + sure^2 + ... + sure^k > beside

for k looked-up tokens after a match whose kind has these counts. The longer a match, the surer what followed it (SAM
Decoding, arXiv 2411.10666, decides so between a lookup and another drafter). The counts grow here, too: how long the
text has become since the last call says how many of that step's drafts stood.
"""

from bisect import bisect_right

import torch
from torch import Tensor

from kangaroo_kernels.contract import EXPERIENCE_MEMORY, USUAL_WEIGHT, Experience, Weighed
from kangaroo_kernels.shared.checks import check_weigh


def weigh(
    matched: Tensor,
    thresholds: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    experience: Experience,
    *,
    flags: Tensor | None = None,
    out: Weighed | None = None,
) -> Weighed:
    """Learn from the last step, and decide which of the looked-up tokens are drafts of the next.

    Args:
        matched: ``[1]`` int64, the length of the match, from ``look_up``; a match of m tokens is worth m drafts.
        thresholds: ``[R]`` float32, R from 0 to 15. As many drafts are allowed as thresholds are at most 1; the first
            says how sure a match must be.
        length: tokens of the text.
        limit: the most tokens that the text may have; a step drafts nothing past it.
        experience: of this text; written.
        flags: ``[>= 1]`` int32, of which the first says whether anything is drafted. It is lowered where looked-up
            tokens are drafts, so that the other drafter makes none. Where it is down nothing is learned. None means
            that it is up.
        out: made if None.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a length in device memory of another dtype.
    """
    check_weigh(matched, thresholds, length, limit, experience, flags, out)
    drafts, sure, most = 0, 0.0, len(thresholds)
    if flags is None or int(flags[0]):
        learn(experience, int(length))
        allowed = sum(threshold <= 1 for threshold in thresholds.tolist())
        room = min(allowed, int(limit) - int(length) - 1)
        found, kind = int(matched), bisect_right(experience.kinds.tolist(), int(matched)) - 1
        if kind >= 0 and room > 0:
            usual, stood, tried = (float(counts[kind]) for counts in experience[1:4])
            sure = (USUAL_WEIGHT * usual + stood) / (USUAL_WEIGHT + tried)
            expected, power = 0.0, 1.0
            for _ in range(min(found, room)):
                power *= sure
                expected += power
            if sure >= float(thresholds[0]) and expected > float(experience.beside):
                drafts = min(found, room)
        latest = [int(length), found, drafts] if drafts else [int(length), 0, min(room, 1)]
        experience.latest.copy_(torch.tensor(latest))
    if flags is not None and drafts:
        flags[0] = 0
    result = Weighed(torch.arange(most, device=matched.device).lt(drafts).int(), thresholds.new_zeros(most))
    result.sure[:drafts] = sure
    return result if out is None else Weighed(*(kept.copy_(new) for kept, new in zip(out, result, strict=True)))


def learn(experience: Experience, length: int) -> None:
    """What became of the step that was under way, now that the text has ``length`` tokens."""
    before, matched, drafts = experience.latest.tolist()
    agreed = length - before - 1
    experience.stood.mul_(EXPERIENCE_MEMORY)
    experience.tried.mul_(EXPERIENCE_MEMORY)
    if matched:
        kind = bisect_right(experience.kinds.tolist(), matched) - 1
        experience.stood[kind] += agreed
        experience.tried[kind] += min(agreed + 1, drafts)
    elif drafts:
        experience.beside.add_((1 - EXPERIENCE_MEMORY) * (agreed - experience.beside))
