"""``weigh`` in Triton: learn what became of the last drafts, and choose between looked-up tokens and another drafter.

One program does the whole step on the device, in float64 and in the reference's order, so that the choice is the same
on both loops; it moves only a few bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import EXPERIENCE_MEMORY, USUAL_WEIGHT, Experience, Weighed
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_weigh
from kangaroo_kernels.shared.launch import device_count, launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M

REMEMBERED, FORGOTTEN = tl.constexpr(EXPERIENCE_MEMORY), tl.constexpr(1 - EXPERIENCE_MEMORY)
WEIGHT_OF_USUAL = tl.constexpr(USUAL_WEIGHT)
FORBIDDEN = tl.constexpr(2.0)
"""A threshold behind the last one."""


@triton.jit
def kind_of(matched, kinds, offs, K):
    """Where the kind of a match stands, as a mask; nowhere for a match that is too short."""
    return offs == tl.sum(((offs < K) & (kinds <= matched)).to(tl.int32), axis=0) - 1


@triton.jit
def learned(length, latest_ptr, kinds, offs, stood, tried, beside, K):
    """The counts after the step that was under way."""
    before, matched, drafts = tl.load(latest_ptr), tl.load(latest_ptr + 1), tl.load(latest_ptr + 2)
    agreed = length - before - 1
    looked_up = kind_of(matched, kinds, offs, K) & (matched > 0)
    stood = stood * REMEMBERED + tl.where(looked_up, agreed, 0).to(tl.float64)
    tried = tried * REMEMBERED + tl.where(looked_up, tl.minimum(agreed + 1, drafts), 0).to(tl.float64)
    nearer = beside + FORGOTTEN * (agreed.to(tl.float64) - beside)
    return stood, tried, tl.where((matched == 0) & (drafts > 0), nearer, beside)


@stable_key
@triton.jit(
    do_not_specialize=["R", "K"],
    do_not_specialize_on_alignment=[
        "matched_ptr",
        "thresholds_ptr",
        "length_ptr",
        "limit_ptr",
        "kinds_ptr",
        "usual_ptr",
        "stood_ptr",
        "tried_ptr",
        "beside_ptr",
        "latest_ptr",
        "flags_ptr",
        "made_ptr",
        "sure_ptr",
    ],
)
def weigh_kernel(
    matched_ptr,  # [1] int64
    thresholds_ptr,  # [R] float32
    length_ptr,  # [1] int64
    limit_ptr,  # [1] int64
    kinds_ptr,  # [K] int64
    usual_ptr,  # [K] float64
    stood_ptr,  # [K] float64
    tried_ptr,  # [K] float64
    beside_ptr,  # [1] float64
    latest_ptr,  # [3] int64
    flags_ptr,  # [>= 1] int32 or None
    made_ptr,  # [R] int32
    sure_ptr,  # [R] float32
    R,
    K,
    CHAINED: tl.constexpr,
):
    """One program does the whole step."""
    follow(CHAINED)
    offs = tl.arange(0, BLOCK_M)
    is_kind, is_draft = offs < K, offs < R
    length, matched = tl.load(length_ptr), tl.load(matched_ptr)
    kinds = tl.load(kinds_ptr + offs, mask=is_kind, other=0)
    usual = tl.load(usual_ptr + offs, mask=is_kind, other=0.0)
    stood = tl.load(stood_ptr + offs, mask=is_kind, other=0.0)
    tried = tl.load(tried_ptr + offs, mask=is_kind, other=0.0)
    thresholds = tl.load(thresholds_ptr + offs, mask=is_draft, other=FORBIDDEN)
    grows = tl.full((), 1, dtype=tl.int32)
    if flags_ptr is not None:
        grows = tl.load(flags_ptr)
    stood, tried, beside = learned(length, latest_ptr, kinds, offs, stood, tried, tl.load(beside_ptr), K)

    kind = kind_of(matched, kinds, offs, K)
    room = tl.minimum(tl.sum((thresholds <= 1.0).to(tl.int64), axis=0), tl.load(limit_ptr) - length - 1)
    count = tl.maximum(tl.minimum(tl.where(tl.max(kind.to(tl.int32), axis=0) > 0, matched, 0), room), 0)
    standing = WEIGHT_OF_USUAL * usual + stood
    sure = tl.sum(tl.where(kind, standing / (WEIGHT_OF_USUAL + tried), 0.0), axis=0)
    power, expected = sure * 0.0 + 1.0, sure * 0.0
    for place in range(R):
        power *= sure
        expected += tl.where(place < count, power, 0.0)
    first = tl.load(thresholds_ptr, mask=R > 0, other=FORBIDDEN)
    by_lookup = (grows != 0) & (count > 0) & (sure >= first.to(tl.float64)) & (expected > beside)
    made = (offs < count) & by_lookup
    tl.debug_barrier()  # everything is read before anything is written

    tl.store(made_ptr + offs, made.to(tl.int32), mask=is_draft)
    tl.store(sure_ptr + offs, tl.where(made, sure, 0.0).to(tl.float32), mask=is_draft)
    if grows != 0:
        tl.store(stood_ptr + offs, stood, mask=is_kind)
        tl.store(tried_ptr + offs, tried, mask=is_kind)
        tl.store(beside_ptr, beside)
        tl.store(latest_ptr, length)
        tl.store(latest_ptr + 1, tl.where(by_lookup, matched, 0))
        tl.store(latest_ptr + 2, tl.where(by_lookup, count, tl.minimum(room, 1)))
        if flags_ptr is not None:
            tl.store(flags_ptr, (by_lookup == 0).to(tl.int32))


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
    """Choose between looked-up tokens and another drafter; arguments and result as for ``reference.weigh``."""
    require_interpreter("weigh", matched)
    check_weigh(matched, thresholds, length, limit, experience, flags, out)
    most, device = len(thresholds), matched.device
    if out is None:
        out = Weighed.empty(most, device)
    weigh_kernel[(1,)](
        matched,
        thresholds,
        device_count(length, device),
        device_count(limit, device),
        *experience,
        flags,
        *out,
        most,
        len(experience.kinds),
        num_warps=1,
        **launch_options(matched),
    )
    return out
