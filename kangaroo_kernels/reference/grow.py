"""``grow``: a round of a tree of drafts. The likeliest of all candidates become rows, wherever they hang.

    share(child) = share(row) * confidence(child behind row);  the best ``count`` shares become rows, the best first

What a candidate is worth is its share, by the drafter's own distribution (as in EAGLE-2, arXiv 2406.16858). Looked-up
tokens are candidates, too. Where the drafter ranks such a token as well, it is one candidate, as sure as the surer of
the two says.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kangaroo_kernels.contract import LEAST_SHARE, NO_TOKEN, Hint, Ranked, Tree
from kangaroo_kernels.shared.checks import check_grow


def grow(
    tree: Tree,
    ranked: Ranked,
    first: int,
    count: int,
    threshold: Tensor,
    *,
    hint: Hint | None = None,
    active: Tensor | None = None,
    flags: Tensor | None = None,
    following: Tensor | None = None,
) -> None:
    """Add ``count`` rows to a tree, in place.

    The rows from ``first`` to ``first + m - 1`` are the tree's last ones so far, and get their candidates now. All new
    rows come behind them.

    Args:
        tree: of R + 1 rows, at most 16.
        ranked: ``[m, C]`` tokens and confidences, C from 1 to 4: what may follow each of the last m rows. A NaN counts
            as 0.
        first: the number of the first of these rows; 0 begins a tree.
        count: of new rows, 1 to 4.
        threshold: ``[1]`` float32; a row that is less sure has no candidates. Row 0 has a confidence of 1.
        hint: looked-up tokens behind row 0; None where there are none.
        active: ``[1]`` int32; where it is 0, all new rows are padding.
        flags: ``[count]`` int32, written: whether each new row is a draft. Candidates below ``LEAST_SHARE`` are none:
            the last of the new rows then are padding, which follows the row before it, so that it adds no path.
        following: ``[1]`` int32; becomes 0 where no new row is as sure as the threshold wants.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a tensor of another dtype or device, or not contiguous.
    """
    check_grow(tree, ranked, first, count, threshold, hint, active, flags, following)
    last, width = first + len(ranked.tokens), tree.offers.shape[1]
    expected = expected_behind(tree, last, hint)
    going = active is None or bool(active.item())
    if going:
        offer(tree, ranked, first, threshold, expected, hint)
    best = tree.offers[:last].flatten().sort(descending=True, stable=True)
    shares, places = (each[:count] for each in best)
    worth = going & (shares >= torch.tensor(LEAST_SHARE))
    found = zip(shares.tolist(), places.tolist(), worth.tolist(), strict=True)
    for row, (share, place, draft) in enumerate(found, start=last):
        parent, column = divmod(place, width)
        token = int(tree.offered[parent, column]) if draft else NO_TOKEN
        tree.tokens[row], tree.shares[row] = token, share if draft else 0.0
        tree.confidences[row] = tree.chances[parent, column] if draft else 0.0
        tree.ancestors[row] = tree.ancestors[parent if draft else row - 1] | 1 << row
        tree.said[row] = tree.said[parent] + 1 if draft and token == expected[parent] else -1
        if draft:
            tree.offers[parent, column] = 0.0
        if flags is not None:
            flags[row - last] = draft
    if following is not None:
        new = slice(last, last + count)
        following.mul_(((tree.tokens[new] != NO_TOKEN) & (tree.confidences[new] >= threshold)).any())


def expected_behind(tree: Tree, last: int, hint: Hint | None) -> list[int]:
    """The token that lookup expects behind each of the first ``last`` rows; ``NO_TOKEN`` where it expects none."""
    looked_up = [] if hint is None else hint.tokens[: int(hint.matched)].tolist()
    return [looked_up[said] if 0 <= said < len(looked_up) else NO_TOKEN for said in tree.said[:last].tolist()]


def offer(tree: Tree, ranked: Ranked, first: int, threshold: Tensor, expected: list[int], hint: Hint | None) -> None:
    """The candidates of the rows from ``first`` on; there are none behind an unsure row."""
    sure, width = (tree.confidences >= threshold).tolist(), tree.offers.shape[1]
    of_each = zip(ranked.tokens.tolist(), ranked.confidences.nan_to_num().tolist(), strict=True)
    for row, (tokens, confidences) in enumerate(of_each, start=first):
        if hint is not None and expected[row] != NO_TOKEN:
            if expected[row] not in tokens:
                tokens.append(expected[row])
                confidences.append(0.0)
            place = tokens.index(expected[row])
            confidences[place] = max(confidences[place], float(hint.sure))
        chances, nothing = torch.tensor(confidences), width - len(tokens)
        tree.offered[row] = torch.tensor(tokens + [NO_TOKEN] * nothing)
        tree.chances[row] = F.pad(chances, (0, nothing)) * sure[row]
        torch.mul(tree.chances[row], tree.shares[row], out=tree.offers[row])
