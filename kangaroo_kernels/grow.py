"""``grow`` in Triton: a round of a tree of drafts, in one launch instead of some fifty small ones.

One program does the whole round: all candidates of a tree fit into the registers of a warp. It moves a few hundred
bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import CANDIDATES, LEAST_SHARE, NO_TOKEN, Hint, Ranked, Tree
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_grow
from kangaroo_kernels.shared.launch import launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M

WIDTH = tl.constexpr(CANDIDATES)
WORTH, NOTHING = tl.constexpr(LEAST_SHARE), tl.constexpr(NO_TOKEN)
NO_SHARE = tl.constexpr(-1.0)
"""Below every share: of rows that are not there."""


@triton.jit
def at(values, offs, index):
    """``values[index]`` of a vector."""
    return tl.sum(tl.where(offs == index, values, 0), axis=0)


@triton.jit
def cell(values, places, place):
    """The value of a matrix at one of its places."""
    return tl.sum(tl.sum(tl.where(places == place, values, 0), axis=1), axis=0)


@stable_key
@triton.jit(
    do_not_specialize=["first", "last", "count", "C"],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "ancestors_ptr",
        "confidences_ptr",
        "shares_ptr",
        "said_ptr",
        "offers_ptr",
        "chances_ptr",
        "offered_ptr",
        "ranked_ptr",
        "ranked_confidences_ptr",
        "threshold_ptr",
        "hint_ptr",
        "matched_ptr",
        "sure_ptr",
        "active_ptr",
        "flags_ptr",
        "following_ptr",
    ],
)
def grow_kernel(
    tokens_ptr,  # [R + 1] int64
    ancestors_ptr,  # [R + 1] int32
    confidences_ptr,  # [R + 1] float32
    shares_ptr,  # [R + 1] float32
    said_ptr,  # [R + 1] int64
    offers_ptr,  # [R + 1, WIDTH] float32
    chances_ptr,  # [R + 1, WIDTH] float32
    offered_ptr,  # [R + 1, WIDTH] int64
    ranked_ptr,  # [last - first, C] int64
    ranked_confidences_ptr,  # [last - first, C] float32
    threshold_ptr,  # [1] float32
    hint_ptr,  # [>= R] int64; this and the next two None without a hint
    matched_ptr,  # [1] int64
    sure_ptr,  # [1] float32
    active_ptr,  # [1] int32 or None
    flags_ptr,  # [count] int32 or None
    following_ptr,  # [1] int32 or None
    first,
    last,
    count,
    C,
    CHAINED: tl.constexpr,
):
    """One program does the whole round."""
    follow(CHAINED)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    places = rows[:, None] * WIDTH + columns[None, :]
    is_there, is_new = rows < last, (rows >= first) & (rows < last)
    going = tl.full((), 1, dtype=tl.int32)
    if active_ptr is not None:
        going = tl.load(active_ptr)
    threshold = tl.load(threshold_ptr)
    ancestors = tl.load(ancestors_ptr + rows, mask=is_there, other=0)
    confidences = tl.load(confidences_ptr + rows, mask=is_there, other=0.0)
    shares = tl.load(shares_ptr + rows, mask=is_there, other=0.0)
    said = tl.load(said_ptr + rows, mask=is_there, other=-1)

    ranked = is_new[:, None] & (columns < C)[None, :]
    candidates = (rows - first)[:, None] * C + columns[None, :]
    offered = tl.load(ranked_ptr + candidates, mask=ranked, other=NOTHING)
    chances = tl.load(ranked_confidences_ptr + candidates, mask=ranked, other=0.0)
    chances = tl.where(chances == chances, chances, 0.0)  # noqa: PLR0124 (a NaN differs from itself)
    expected = tl.full((BLOCK_M,), NOTHING, dtype=tl.int64)
    if hint_ptr is not None:
        expects = (said >= 0) & (said < tl.load(matched_ptr))
        expected = tl.load(hint_ptr + tl.maximum(said, 0), mask=expects, other=NOTHING)
        sure = tl.load(sure_ptr)
        both = (offered == expected[:, None]) & expects[:, None] & ranked
        found = tl.min(tl.where(both, columns[None, :], WIDTH), axis=1)
        both &= columns[None, :] == found[:, None]  # behind a top-k or top-p the last token may stand there repeatedly
        alone = expects & (found == WIDTH)
        chances = tl.where(both, tl.maximum(chances, sure), chances)
        one_more = alone[:, None] & (columns == C)[None, :]
        chances = tl.where(one_more, sure, chances)
        offered = tl.where(one_more, expected[:, None], offered)
    has_candidates = (confidences >= threshold) & (going != 0)  # nothing was ranked where it is 0
    chances = tl.where(has_candidates[:, None], chances, 0.0)

    earlier = (rows < first)[:, None] & (columns >= 0)[None, :]
    offers = tl.load(offers_ptr + places, mask=earlier, other=NO_SHARE)
    offers = tl.where(is_new[:, None], shares[:, None] * chances, offers)
    chances = tl.where(is_new[:, None], chances, tl.load(chances_ptr + places, mask=earlier, other=0.0))
    offered = tl.where(is_new[:, None], offered, tl.load(offered_ptr + places, mask=earlier, other=NOTHING))

    tl.debug_barrier()  # everything is read before anything is written

    before = at(ancestors, rows, last - 1)
    goes_on = tl.zeros((), dtype=tl.int32)
    for row in range(last, last + count):
        share = tl.max(tl.max(offers, axis=1), axis=0)
        place = tl.min(tl.min(tl.where(offers == share, places, BLOCK_M * WIDTH), axis=1), axis=0)
        parent = place // WIDTH
        draft = (share >= WORTH) & (going != 0)
        token, chance = cell(offered, places, place), cell(chances, places, place)
        follows = draft & (token == at(expected, rows, parent)) & (token != NOTHING)
        before = tl.where(draft, at(ancestors, rows, parent), before) | (1 << row)
        tl.store(tokens_ptr + row, tl.where(draft, token, NOTHING))
        tl.store(ancestors_ptr + row, before)
        tl.store(confidences_ptr + row, tl.where(draft, chance, 0.0))
        tl.store(shares_ptr + row, tl.where(draft, share, 0.0))
        tl.store(said_ptr + row, tl.where(follows, at(said, rows, parent) + 1, -1))
        if flags_ptr is not None:
            tl.store(flags_ptr + row - last, draft.to(tl.int32))
        goes_on |= (draft & (chance >= threshold)).to(tl.int32)
        offers = tl.where(places == tl.where(draft, place, -1), 0.0, offers)
    written = is_there[:, None] & (columns >= 0)[None, :]
    tl.store(offers_ptr + places, offers, mask=written)
    tl.store(chances_ptr + places, chances, mask=written)
    tl.store(offered_ptr + places, offered, mask=written)
    if following_ptr is not None:
        tl.store(following_ptr, tl.load(following_ptr) * goes_on)


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
    """Add rows to a tree, in place; arguments as for ``reference.grow``."""
    require_interpreter("grow", ranked.tokens)
    check_grow(tree, ranked, first, count, threshold, hint, active, flags, following)
    grow_kernel[(1,)](
        *tree,
        *ranked,
        threshold,
        *((None, None, None) if hint is None else hint),
        active,
        flags,
        following,
        first,
        first + len(ranked.tokens),
        count,
        ranked.tokens.shape[1],
        num_warps=1,
        **launch_options(ranked.tokens),
    )
