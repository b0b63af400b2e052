"""Top-k and top-p in kernels: the smallest logit of a row that they keep, and a list of where the kept ones lie.

A row is taken in groups of ``GROUP`` neighbouring logits. A first kernel, with many programs a row, leaves the largest
logit of each group and its sums of exponentials. From then on one program a row looks at little:

1. It searches the smallest number that the filter would keep if the groups' largest logits were all there is. They are
   some of the row, so the filter of the whole row keeps nothing smaller.
2. It lists the groups whose largest logit is at least that number. All that is kept lies in them.
3. It searches the listed groups for the smallest logit that is kept.

A search finds the 32 bits of its number one by one, the highest first, with one count (top-k) or sum (top-p) for each
bit. It holds its first ``FILTERED`` numbers in registers: the largest logits of 131,072 tokens, or 128 listed groups.

The sums have an order that follows from the row alone: within a group, then over the groups from the first to the last.
A flat distribution lists every group and costs a pass over the row for each bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.head import exponential_sum, nan_wins
from kangaroo_kernels.shared.launch import launch_options
from kangaroo_kernels.shared.noise import gumbel_of, gumbel_words
from kangaroo_kernels.shared.operands import Looked
from kangaroo_kernels.shared.tiles import skipped

FILTERED = tl.constexpr(4096)
"""Numbers that a program takes at a time where it has a row alone."""

GROUP = tl.constexpr(32)
"""Neighbouring logits of a group: 128 bytes, a line of the L2."""

ALIGNED = tl.constexpr(16)
"""A row has a multiple of so many groups, so that a thread reads several at once; the last may lie beyond the row."""

GROUPS_AT_ONCE = tl.constexpr(32)
"""Groups of a program where a row has many programs."""

A_ROW_ALONE = {"num_warps": 8, "maxnreg": 128}
"""How a program that has a row alone is launched. Left to itself, the assembler may choose 80 registers and spill one,
so that three such programs would fit an SM, of which there is one at most."""

SMALLEST_TOP_P = tl.constexpr(1e-30)
"""Far below any token's share, and far enough from 0 for its product with the sum to be a normal float32."""


@triton.jit
def order_bits(values):
    """Float32 to uint32 that sort the same way; a NaN sorts highest, -0 as 0."""
    bits = tl.where(values == 0.0, 0.0, nan_wins(values)).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


# ---- what is known of each group


@triton.jit
def groups_in(V):
    """How many groups a row has."""
    return tl.cdiv(V, GROUP * ALIGNED) * ALIGNED


@stable_key
@triton.jit(do_not_specialize_on_alignment=["active_ptr", "temperature_ptr"])
def group_kernel(
    logits_ptr,  # [M, V] float32
    largest_ptr,  # [M, groups] float32
    sum_ptr,  # [M, groups] float32 or None
    mass_ptr,  # [M, groups] float32 or None
    active_ptr,  # [1] int32 or None
    temperature_ptr,  # [1] float32
    V,
    CHAINED: tl.constexpr,
):
    """One program owns ``GROUPS_AT_ONCE`` groups of one row."""
    follow(CHAINED)
    if skipped(active_ptr):
        return
    row, count = tl.program_id(0), groups_in(V)
    groups = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    offs = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + offs, mask=offs < V, other=float("-inf"))
    largest = tl.max(nan_wins(logits), axis=1)
    slots, there = row * count + groups, groups < count
    tl.store(largest_ptr + slots, largest, mask=there)
    if sum_ptr is not None:
        tl.store(sum_ptr + slots, exponential_sum(logits, largest, 1), mask=there)
    if mass_ptr is not None:
        shares = shares_of(logits, tl.expand_dims(largest, 1), tl.load(temperature_ptr))
        tl.store(mass_ptr + slots, tl.sum(shares, axis=1), mask=there)


@triton.jit
def shares_of(logits, largest, temperature):
    """exp((logit - largest) / T): shares of a distribution that is not normalised; of -inf below -inf it is 0."""
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp((logits - pivot) / temperature)


@triton.jit
def largest_of(groups):
    """The largest logit of a row; infinity where there is a NaN."""
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    for first in range(0, groups.count, FILTERED):
        offs = first + tl.arange(0, FILTERED)
        tops = tl.load(groups.largest_ptr + offs, mask=offs < groups.count, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(tops, axis=0))
    return largest


@triton.jit
def sum_over_groups(groups, part_ptr, largest, temperature):
    """Sum of exp((logit - largest) / T) over a row, from those of its groups ``[groups]`` below their own largest."""
    total = tl.zeros((), dtype=tl.float32)
    for first in range(0, groups.count, FILTERED):
        offs = first + tl.arange(0, FILTERED)
        there = offs < groups.count
        tops = tl.load(groups.largest_ptr + offs, mask=there, other=float("-inf"))
        parts = tl.load(part_ptr + offs, mask=there, other=0.0)
        total += tl.sum(parts * shares_of(tops, largest, temperature), axis=0)
    return total


# ---- the search


@triton.jit
def groups_at(looked, first):
    """The listed groups of the ``FILTERED`` numbers from ``first`` on; behind the last one, a group beyond the row."""
    slots = first // GROUP + tl.arange(0, FILTERED // GROUP)
    return tl.load(looked.listed_ptr + slots, mask=slots * GROUP < looked.count, other=tl.cdiv(looked.size, GROUP))


@triton.jit
def places_at(looked, first):
    """Where ``FILTERED`` numbers from ``first`` on lie in the row."""
    if looked.listed_ptr is None:
        places = first + tl.arange(0, FILTERED)
    else:
        places = groups_at(looked, first)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return places


@triton.jit
def numbers_at(looked, first):
    """``FILTERED`` numbers from ``first`` on, -inf behind the last one."""
    places = places_at(looked, first)
    return tl.load(looked.ptr + places, mask=places < looked.size, other=float("-inf"))


@triton.jit
def kept_by_top_k(looked, top_k):
    """The order bits of the k-th largest number."""
    at_hand = order_bits(numbers_at(looked, 0))
    kept = tl.zeros((), dtype=tl.uint32)
    for step in range(32):
        candidate = kept | (tl.full((), 1, dtype=tl.uint32) << (31 - step))
        count = tl.sum((at_hand >= candidate).to(tl.int32))
        for first in range(FILTERED, looked.count, FILTERED):
            count += tl.sum((order_bits(numbers_at(looked, first)) >= candidate).to(tl.int32))
        kept = tl.where(count >= top_k, candidate, kept)
    return kept


@triton.jit
def shares_from(looked, first, largest, temperature, kept):
    """The shares of ``FILTERED`` numbers from ``first`` on, 0 below ``kept``; and the order bits of the numbers."""
    numbers = numbers_at(looked, first)
    order = order_bits(numbers)
    return tl.where(order >= kept, shares_of(numbers, largest, temperature), 0.0), order


@triton.jit
def mass_from(looked, largest, temperature, kept):
    """The sum of the shares from ``kept`` on."""
    mass = tl.zeros((), dtype=tl.float32)
    for first in range(0, looked.count, FILTERED):
        shares, _ = shares_from(looked, first, largest, temperature, kept)
        mass += tl.sum(shares)
    return mass


@triton.jit
def kept_by_top_p(looked, largest, temperature, wanted, kept):
    """The order bits of the smallest number among the fewest from ``kept`` on whose shares reach ``wanted``."""
    at_hand, order = shares_from(looked, 0, largest, temperature, kept)
    smallest = tl.zeros((), dtype=tl.uint32)
    for step in range(32):
        candidate = smallest | (tl.full((), 1, dtype=tl.uint32) << (31 - step))
        mass = tl.sum(tl.where(order >= candidate, at_hand, 0.0))
        for first in range(FILTERED, looked.count, FILTERED):
            shares, _ = shares_from(looked, first, largest, temperature, tl.maximum(candidate, kept))
            mass += tl.sum(shares)
        smallest = tl.where(mass >= wanted, candidate, smallest)
    return tl.maximum(smallest, kept)


@triton.jit
def list_groups(groups, least):
    """List the groups whose largest logit has order bits of at least ``least``, in ascending order; how many.

    Groups of nothing but -inf are left out: none of their tokens is ever drawn.
    """
    listed = tl.zeros((), dtype=tl.int32)
    for first in range(0, groups.count, FILTERED):
        offs = first + tl.arange(0, FILTERED)
        tops = tl.load(groups.largest_ptr + offs, mask=offs < groups.count, other=float("-inf"))
        chosen = ((order_bits(tops) >= least) & (tops > float("-inf"))).to(tl.int32)
        slots = listed + tl.cumsum(chosen, axis=0) - 1
        tl.store(groups.listed_ptr + slots, offs, mask=chosen == 1)
        listed += tl.sum(chosen, axis=0)
    tl.debug_barrier()  # every thread has written what others read
    return listed


@triton.jit
def kept_of(row_ptr, V, groups, largest, temperature, top_k_ptr, top_p_ptr):
    """The order bits of the smallest logit that is kept, and in how many listed groups all kept logits lie."""
    tops = Looked(groups.largest_ptr, groups.count, None, groups.count)
    if top_p_ptr is not None:
        top_p = tl.maximum(tl.load(top_p_ptr), SMALLEST_TOP_P)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr)
        least = kept_by_top_k(tops, top_k)
    else:
        wanted = top_p * sum_over_groups(groups, groups.mass_ptr, largest, temperature)
        least = kept_by_top_p(tops, largest, temperature, wanted, tl.zeros((), dtype=tl.uint32))
    listed = list_groups(groups, least)
    looked = Looked(row_ptr, V, groups.listed_ptr, listed * GROUP)
    kept = least
    if top_k_ptr is not None:
        kept = tl.maximum(kept_by_top_k(looked, top_k), least)
        if top_p_ptr is not None:
            wanted = top_p * mass_from(looked, largest, temperature, kept)
    if top_p_ptr is not None:
        kept = kept_by_top_p(looked, largest, temperature, wanted, kept)
    return kept, listed


@triton.jit
def noise_at(seed, stream, positions, looked, first, tokens_ptr):
    """The noise of ``FILTERED`` listed rows of the head from ``first`` on, in their groups."""
    groups: tl.constexpr = FILTERED // GROUP
    if tokens_ptr is None:
        words = groups_at(looked, first)[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
        noise = gumbel_words(seed, stream, positions, tl.reshape(words, (FILTERED // 4,)), 1, FILTERED)
    else:
        places = tl.reshape(places_at(looked, first), (FILTERED,))
        tokens = tl.load(tokens_ptr + tl.minimum(places, looked.size - 1))
        noise = gumbel_of(seed, stream, positions, tokens, 1, FILTERED)
    return tl.reshape(noise, (groups, GROUP))


# ---- the launcher


class GroupResults(NamedTuple):
    """The workspace of a filter, ``[M, groups]`` each: what ``Groups`` is on the device."""

    largest: Tensor
    sums: Tensor | None
    masses: Tensor | None
    listed: Tensor


def group(
    logits: Tensor, active: Tensor | None, temperature: Tensor, *, with_sums: bool, with_masses: bool
) -> GroupResults:
    """Launch the kernel that looks at each group of ``logits`` ``[M, V]``."""
    rows, size = logits.shape
    count = triton.cdiv(size, GROUP.value * ALIGNED.value) * ALIGNED.value

    def empty(dtype: torch.dtype) -> Tensor:  # each begins at an aligned address, whatever the number of rows
        return torch.empty((rows, count), dtype=dtype, device=logits.device)

    sums, masses = (empty(torch.float32) if wanted else None for wanted in (with_sums, with_masses))
    results = GroupResults(empty(torch.float32), sums, masses, empty(torch.int32))
    group_kernel[(rows, triton.cdiv(count, GROUPS_AT_ONCE.value))](
        logits, *results[:3], active, temperature, size, num_warps=4, **launch_options(logits)
    )
    return results


def real_filter(value: Any, all_of_it: float) -> Any:
    """``value``, a top-k or top-p, or None for one that is known to keep everything."""
    return None if value is None or (not isinstance(value, Tensor) and value >= all_of_it) else value
