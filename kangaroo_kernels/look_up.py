"""``look_up`` in Triton: the longest match of the text's last tokens, and what followed it.

A program owns ``BLOCK`` places, and compares backwards from all of them at once, as long as one of them still matches.
Its best place is one number, the length of the match above the place, so the largest number is the longest match and of
several the last: programs may add theirs in any order. The last one to arrive reads the tokens behind the winner.

Bytes moved: ``8 * n`` for n tokens, each read from memory once (what a longer match compares again lies in the L1), and
16 of state. At 8,192 tokens these are 64 KB; such a launch takes as long as any small one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, Match
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_look_up
from kangaroo_kernels.shared.grid import is_last
from kangaroo_kernels.shared.launch import device_count, launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M

PLACES = 1024
"""Places a program: 8 KB of text."""

LONGEST_MATCH = tl.constexpr(MAX_SPECULATIVE_TOKENS)
ABOVE = tl.constexpr(1 << 32)
"""Where the length of a match stands above its place."""

NOTHING = tl.constexpr(-1)
"""Stands before the text's beginning, where every match ends: no token equals it."""


@triton.jit
def longest_match(text_ptr, length, places):
    """The best of some places, as one number: the length of its match above its place."""
    going = places < length
    matched = tl.zeros(places.shape, dtype=tl.int64)
    back, found = 0, 1
    while (back < LONGEST_MATCH) & (found > 0):
        back += 1
        wanted = tl.load(text_ptr + length - back)
        here = tl.load(text_ptr + places - back, mask=going & (back <= places), other=NOTHING)
        going &= here == wanted
        matched += going.to(tl.int64)
        found = tl.max(going.to(tl.int32), axis=0)
    return tl.max(tl.where(places < length, matched * ABOVE + places, 0), axis=0)


@stable_key
@triton.jit(
    do_not_specialize=["R", "LEAST"],
    do_not_specialize_on_alignment=[
        "text_ptr",
        "length_ptr",
        "flags_ptr",
        "arrivals_ptr",
        "tokens_ptr",
        "matched_ptr",
    ],
)
def look_up_kernel(
    text_ptr,  # [T] int64
    length_ptr,  # [1] int64
    flags_ptr,  # [>= R + 1] int32 or None
    arrivals_ptr,  # [2] int64: the best match so far, programs that have arrived
    tokens_ptr,  # [R] int64
    matched_ptr,  # [1] int64
    R,
    LEAST,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns ``BLOCK`` places; those behind the text's end are left out."""
    follow(CHAINED)
    length = tl.load(length_ptr)
    tile = tl.program_id(0)
    tiles = tl.minimum(tl.maximum(tl.cdiv(length, BLOCK), 1), tl.num_programs(0))
    if tile >= tiles:
        return
    best = longest_match(text_ptr, length, tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64))
    tl.atomic_max(arrivals_ptr, best, sem="relaxed")  # to arrive is what makes it visible
    if is_last(arrivals_ptr + 1, tiles):
        best = tl.atomic_xchg(arrivals_ptr, 0, sem="relaxed")
        place, matched = best % ABOVE, best // ABOVE
        matched = tl.where(matched >= LEAST, matched, 0)
        offs = tl.arange(0, BLOCK_M)
        again = place + offs % tl.maximum(length - place, 1)  # the text may end within the drafts
        tl.store(tokens_ptr + offs, tl.load(text_ptr + again, mask=offs < R), mask=offs < R)
        tl.store(matched_ptr, matched)
        if flags_ptr is not None:
            worth = tl.where(tl.load(flags_ptr) != 0, matched, 0)
            tl.debug_barrier()  # the first flag is read before it is written
            tl.store(flags_ptr + offs, (offs < worth).to(tl.int32), mask=offs < R)


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
    """Find the longest match of the text's end; arguments and result as for ``reference.look_up``."""
    require_interpreter("look_up", text)
    check_look_up(text, length, most, least, flags, arrivals, out)
    device = text.device
    if arrivals is None:
        arrivals = torch.zeros(2, dtype=torch.int64, device=device)
    if out is None:
        out = Match.empty(most, device)
    look_up_kernel[(triton.cdiv(len(text), PLACES),)](
        text,
        device_count(length, device),
        flags,
        arrivals,
        *out,
        most,
        least,
        BLOCK=PLACES,
        num_warps=4,
        **launch_options(text),
    )
    return out
