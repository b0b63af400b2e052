"""``accept`` in Triton: prefix match, bonus token, finite logits, stop tokens, the limit and the new length.

One program does the whole step on the device; it moves only a few bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, MAX_STOPS
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_accept
from kangaroo_kernels.shared.launch import device_count, launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M


@stable_key
@triton.jit(
    do_not_specialize=["STOPS", "COUNTS"],
    do_not_specialize_on_alignment=[
        "draft_ptr",
        "target_ptr",
        "stop_ptr",
        "confidence_ptr",
        "drafted_ptr",
        "length_ptr",
        "limit_ptr",
    ],
)
def accept_kernel(
    draft_ptr,  # [R] int64
    target_ptr,  # [R + 1] int64
    stop_ptr,  # [STOPS] int64
    confidence_ptr,  # [R + 1] float32 or None
    drafted_ptr,  # [COUNTS] integers: their sum is the number of drafts
    length_ptr,  # [1] int64
    limit_ptr,  # [1] int64
    out_ptr,  # [3] int64: accepted, new length, stopped
    STOPS,
    COUNTS,
    BLOCK_S: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program does the whole step."""
    follow(CHAINED)
    offs = tl.arange(0, BLOCK_M)
    drafted = tl.sum(tl.load(drafted_ptr + offs, mask=offs < COUNTS, other=0).to(tl.int64), axis=0)
    length = tl.load(length_ptr)
    room = tl.load(limit_ptr) - length
    there = offs < drafted
    draft = tl.load(draft_ptr + offs, mask=there, other=-1)
    target = tl.load(target_ptr + offs, mask=offs <= drafted, other=-1)
    agrees = there & (draft == target)
    accepted = tl.min(tl.where(agrees, BLOCK_M, offs), axis=0).to(tl.int64)
    committed = tl.minimum(accepted + 1, room)
    if confidence_ptr is not None:
        confidence = tl.load(confidence_ptr + offs, mask=offs <= drafted, other=0.0)
        is_nan = confidence != confidence  # noqa: PLR0124 (a NaN differs from itself)
        finite = tl.min(tl.where(is_nan, offs, BLOCK_M), axis=0).to(tl.int64)
        accepted, committed = tl.minimum(accepted, finite), tl.minimum(committed, finite)
    stop_offs = tl.arange(0, BLOCK_S)
    stops = tl.load(stop_ptr + stop_offs, mask=stop_offs < STOPS, other=-2)
    stops_here = tl.max((target[:, None] == stops[None, :]).to(tl.int32), axis=1) > 0
    stop = tl.min(tl.where(stops_here & (offs < committed), offs, BLOCK_M), axis=0).to(tl.int64)
    stopped = stop < BLOCK_M
    tl.store(out_ptr, accepted)
    tl.store(out_ptr + 1, length + tl.where(stopped, stop + 1, committed))
    tl.store(out_ptr + 2, stopped.to(tl.int64))


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
    """Compare drafts with the target's tokens; arguments and result as for ``reference.accept``."""
    require_interpreter("accept", draft)
    check_accept(draft, target, stop_tokens, length, limit, confidence, drafted, out)
    most, device = len(draft), draft.device
    if most >= MAX_ROWS or len(stop_tokens) > MAX_STOPS:
        raise ValueError(
            f"accept takes fewer than {MAX_ROWS} drafts and at most {MAX_STOPS} stop tokens, got {most} and "
            f"{len(stop_tokens)}; its reference takes any number."
        )
    counts = device_count(most if drafted is None else drafted, device)
    if out is None:
        out = torch.empty(3, dtype=torch.int64, device=device)
    accept_kernel[(1,)](
        draft,
        target,
        stop_tokens,
        confidence,
        counts,
        device_count(length, device),
        device_count(limit, device),
        out,
        stop_tokens.shape[0],
        counts.numel(),
        BLOCK_S=triton.next_power_of_2(max(1, stop_tokens.shape[0])),
        num_warps=1,
        **launch_options(draft),
    )
    return out
