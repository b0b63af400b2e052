"""``walk``: through a tree of drafts, from each row to the one that was drafted with the target's token.

    path = 0;  while a child c of path[-1] has draft[c] == target[path[-1]]: path += c;  committed = target[path]

Every row has the target's own choice, greedy or sampled, so this is plain decoding over the rows that are there. In a
chain it is ``accept``.
"""

import math

import torch
from torch import Tensor

from kangaroo_kernels.contract import Walk
from kangaroo_kernels.shared.checks import check_walk


def walk(
    draft: Tensor,
    target: Tensor,
    ancestors: Tensor,
    stop_tokens: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    *,
    confidence: Tensor | None = None,
    out: Walk | None = None,
) -> Walk:
    """Find the path that the target takes, and decide which of its tokens are committed.

    Args:
        draft: ``[R]`` int64, the token of each row but the root; -1 for rows of padding.
        target: ``[R + 1]`` int64, the target's token after each row.
        ancestors: ``[R + 1]`` int32, as ``reference/ancestors.py`` has it, of a whole tree. Of siblings with one token
            the first is taken.
        stop_tokens: as for ``accept``.
        length: tokens of the text before this step.
        limit: the most tokens that the text may have, not below ``length``.
        confidence: ``[R + 1]`` float32, the head's of ``target``; a NaN says that the row's logits are not finite. None
            means that all are.
        out: made if None.

    Returns:
        The decision, as ``accept`` makes it, with the rows of the path and the target's tokens after them. Of
        ``tokens``, those before the new length are committed; those beyond the path's end are the target's after the
        rows of the same number.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a tensor of another dtype or device, or not contiguous.
    """
    check_walk(draft, target, ancestors, stop_tokens, length, limit, confidence, out)
    drafted, wanted, masks, stops = draft.tolist(), target.tolist(), ancestors.tolist(), stop_tokens.tolist()
    finite = [True] * len(wanted) if confidence is None else [not math.isnan(value) for value in confidence.tolist()]
    path = [0]
    while finite[path[-1]]:
        here = path[-1]
        children = (row for row in range(here + 1, len(masks)) if masks[row] == masks[here] | 1 << row)
        following = next((row for row in children if drafted[row - 1] == wanted[here]), None)
        if following is None:
            break
        path.append(following)
    tokens = [wanted[row] for row in (*path, *range(len(path), len(wanted)))]
    before, accepted = int(length), len(path) - 1
    committed, stopped = min(accepted + finite[path[-1]], int(limit) - before), 0
    for index in range(committed):
        if tokens[index] in stops:
            committed, stopped = index + 1, 1
            break
    rows = [*path, *range(len(path), len(wanted))]
    found = ([accepted, before + committed, stopped], rows, tokens)
    result = Walk(*(torch.tensor(each, device=draft.device) for each in found))
    return result if out is None else Walk(*(kept.copy_(new) for kept, new in zip(out, result, strict=True)))
