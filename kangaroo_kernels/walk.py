"""``walk`` in Triton: the path that the target takes through a tree of drafts, and ``accept``'s decision about it.

One program does the whole step on the device; it moves only a few bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, MAX_STOPS, Walk
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_walk
from kangaroo_kernels.shared.launch import device_count, launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M


@triton.jit
def pick(values, offs, index):
    """``values[index]``."""
    return tl.sum(tl.where(offs == index, values, 0), axis=0)


@stable_key
@triton.jit(
    do_not_specialize=["R", "STOPS"],
    do_not_specialize_on_alignment=[
        "draft_ptr",
        "target_ptr",
        "ancestors_ptr",
        "stop_ptr",
        "confidence_ptr",
        "length_ptr",
        "limit_ptr",
        "decision_ptr",
        "path_ptr",
        "tokens_ptr",
    ],
)
def walk_kernel(
    draft_ptr,  # [R] int64
    target_ptr,  # [R + 1] int64
    ancestors_ptr,  # [R + 1] int32
    stop_ptr,  # [STOPS] int64
    confidence_ptr,  # [R + 1] float32 or None
    length_ptr,  # [1] int64
    limit_ptr,  # [1] int64
    decision_ptr,  # [3] int64: accepted, new length, stopped
    path_ptr,  # [R + 1] int64
    tokens_ptr,  # [R + 1] int64
    R,
    STOPS,
    BLOCK_S: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program does the whole step."""
    follow(CHAINED)
    offs = tl.arange(0, BLOCK_M)
    length = tl.load(length_ptr)
    room = tl.load(limit_ptr) - length
    is_draft = (offs > 0) & (offs <= R)
    draft = tl.load(draft_ptr + offs - 1, mask=is_draft, other=-1)
    target = tl.load(target_ptr + offs, mask=offs <= R, other=-2)
    masks = tl.load(ancestors_ptr + offs, mask=offs <= R, other=0)
    nan = tl.zeros((BLOCK_M,), dtype=tl.int32)
    if confidence_ptr is not None:
        confidence = tl.load(confidence_ptr + offs, mask=offs <= R, other=0.0)
        nan = (confidence != confidence).to(tl.int32)  # noqa: PLR0124 (a NaN differs from itself)

    path = offs
    here = tl.zeros((), dtype=tl.int32)
    accepted = tl.zeros((), dtype=tl.int32)
    for step in range(R + 1):  # a row in each step until none follows; then nothing changes any more
        wanted, mask, spoiled = pick(target, offs, here), pick(masks, offs, here), pick(nan, offs, here)
        follows = (masks == (mask | (1 << offs))) & (draft == wanted) & (offs > here) & is_draft & (spoiled == 0)
        child = tl.min(tl.where(follows, offs, BLOCK_M), axis=0)
        goes_on = (child < BLOCK_M) & (accepted == step)
        accepted += goes_on.to(tl.int32)
        here = tl.where(goes_on, child, here)
        path = tl.where(goes_on & (offs == accepted), child, path)
    tokens = tl.sum(tl.where(path[:, None] == offs[None, :], target[None, :], 0), axis=1)

    finite = 1 - pick(nan, offs, here)
    committed = tl.minimum((accepted + finite).to(tl.int64), room)
    stop_offs = tl.arange(0, BLOCK_S)
    stops = tl.load(stop_ptr + stop_offs, mask=stop_offs < STOPS, other=-3)
    stops_here = tl.max((tokens[:, None] == stops[None, :]).to(tl.int32), axis=1) > 0
    stop = tl.min(tl.where(stops_here & (offs < committed), offs, BLOCK_M), axis=0).to(tl.int64)
    stopped = stop < BLOCK_M
    tl.store(decision_ptr, accepted.to(tl.int64))
    tl.store(decision_ptr + 1, length + tl.where(stopped, stop + 1, committed))
    tl.store(decision_ptr + 2, stopped.to(tl.int64))
    tl.store(path_ptr + offs, path.to(tl.int64), mask=offs <= R)
    tl.store(tokens_ptr + offs, tokens, mask=offs <= R)


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
    """Walk through a tree of drafts; arguments and result as for ``reference.walk``."""
    require_interpreter("walk", draft)
    check_walk(draft, target, ancestors, stop_tokens, length, limit, confidence, out)
    most, device = len(draft), draft.device
    if most >= MAX_ROWS or len(stop_tokens) > MAX_STOPS:
        raise ValueError(
            f"walk takes fewer than {MAX_ROWS} drafts and at most {MAX_STOPS} stop tokens, got {most} and "
            f"{len(stop_tokens)}."
        )
    if out is None:
        out = Walk.empty(most + 1, device)
    walk_kernel[(1,)](
        draft,
        target,
        ancestors,
        stop_tokens,
        confidence,
        device_count(length, device),
        device_count(limit, device),
        *out,
        most,
        stop_tokens.shape[0],
        BLOCK_S=triton.next_power_of_2(max(1, stop_tokens.shape[0])),
        num_warps=1,
        **launch_options(draft),
    )
    return out
