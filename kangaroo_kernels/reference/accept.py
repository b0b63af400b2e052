"""``accept``: how many drafted tokens are accepted, and how long the text becomes.

    accepted = length of the longest prefix with draft[i] == target[i];  committed = target[:accepted + 1]

The last committed token is the target's own (the bonus token). A stop token or the length limit ends the commit early,
and so does a row whose logits are not finite: nothing from it on is committed.
The rule is Kangaroo's (arXiv 2404.18911, section 3) for greedy decoding; with coupled noise it serves sampling too.
"""

import math

import torch
from torch import Tensor

from kangaroo_kernels.shared.checks import check_accept


def accept(
    draft: Tensor,
    target: Tensor,
    stop_tokens: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    *,
    confidence: Tensor | None = None,
    drafted: int | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compare drafts with the target's tokens and decide which tokens are committed.

    Args:
        draft: ``[R]`` int64.
        target: ``[R + 1]`` int64, the target's token after the newest one and after every draft.
        stop_tokens: ``[S]`` int64, in any order; may be empty (the kernel: up to ``MAX_STOPS``).
        length: tokens of the text before this step.
        limit: the most tokens that the text may have, not below ``length``.
        confidence: ``[R + 1]`` float32, the head's of ``target``; a NaN says that the row's logits are not finite. None
            means that all are.
        drafted: how many entries of ``draft`` are real: a number, or flags whose sum it is (those that are 1 come
            first); None means all of them.
        out: ``[3]`` int64, made if None.

    Returns:
        ``[3]`` int64: how many drafts the target agreed with (also beyond an early end), the new length, and 1 if the
        last committed token is a stop token. The committed tokens are ``target[: new length - length]``, of which there
        is none only where the first row's logits are not finite, or the limit is reached.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a tensor of another dtype or device, or not contiguous.
    """
    check_accept(draft, target, stop_tokens, length, limit, confidence, drafted, out)
    count, before = len(draft), int(length)
    if drafted is not None:
        count = int(drafted.sum()) if isinstance(drafted, Tensor) else drafted
    guessed, wanted, stops = draft.tolist(), target.tolist(), stop_tokens.tolist()
    finite = [True] * (count + 1) if confidence is None else [not math.isnan(value) for value in confidence.tolist()]
    accepted = 0
    while accepted < count and guessed[accepted] == wanted[accepted] and finite[accepted]:
        accepted += 1
    committed, stopped = min(accepted + finite[accepted], int(limit) - before), 0
    for index in range(committed):
        if wanted[index] in stops:
            committed, stopped = index + 1, 1
            break
    result = torch.tensor([accepted, before + committed, stopped], device=draft.device)
    return result if out is None else out.copy_(result)
