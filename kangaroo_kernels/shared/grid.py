"""How programs of one launch meet: a barrier, and a counter that tells the last one to arrive.

The barrier is for a persistent kernel, whose programs are all resident at once (a cooperative launch).

In every round each program adds one to a counter on the device. It does so when everything that its threads wrote is
visible (a barrier within the program, then a release), and goes on when the counter shows that all programs have done
the same (an acquire). If a program is lost, the others give up after a limited number of looks at the counter: one
marks the counter as broken and sets an error word, and all of them leave.
"""

import triton
import triton.language as tl

BROKEN = tl.constexpr(1 << 30)
"""A counter of at least this value means that the grid has lost a program."""

COUNTER, LEFT, ERROR = tl.constexpr(0), tl.constexpr(32), tl.constexpr(64)
"""Words of the grid's state, each in a cache line of its own."""

STATE_WORDS = 96
"""Size of the grid's state in words of int32, all of them 0 before the first launch."""


@triton.jit
def is_whole(state_ptr):
    """Whether no program of this launch or of one before was lost; the same for all threads."""
    return tl.atomic_add(state_ptr + COUNTER, 0, sem="relaxed") < BROKEN


@triton.jit
def arrive(state_ptr):
    """Announce that all can see what this program wrote, and that it is done with what it read."""
    tl.debug_barrier()  # every thread has written before the release below, which only one thread does
    tl.atomic_add(state_ptr + COUNTER, 1, sem="release")


@triton.jit
def wait(state_ptr, arrivals, polls, cause):
    """Wait until the counter reaches ``arrivals``; return whether the grid is whole.

    After ``polls`` looks it is broken, and ``cause`` becomes its error word. One thread does each atomic and hands the
    result to the others, so all threads decide alike.
    """
    seen = tl.atomic_add(state_ptr + COUNTER, 0, sem="acquire")
    looks = 1
    while (seen < arrivals) & (looks < polls):
        seen = tl.atomic_add(state_ptr + COUNTER, 0, sem="acquire")
        looks += 1
    tl.debug_barrier()
    if seen < arrivals:
        tl.atomic_max(state_ptr + COUNTER, BROKEN)
        tl.store(state_ptr + ERROR, cause)
    return (seen >= arrivals) & (seen < BROKEN)


@triton.jit
def leave(state_ptr, programs):
    """The last program to leave puts the counters back, for the next launch."""
    if tl.atomic_add(state_ptr + LEFT, 1) == programs - 1:
        tl.store(state_ptr + COUNTER, 0)
        tl.store(state_ptr + LEFT, 0)


@triton.jit
def is_last(counter_ptr, programs):
    """Arrive at a counter; whether all others have: then this program sees what they wrote, and the counter is 0 again.

    Nobody waits, so the programs need not be resident at once.
    """
    tl.debug_barrier()  # every thread has written before the release below, which only one thread does
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def prefetch(ptrs):
    """Prefetch what ``ptrs`` point at into the L2; nothing waits for it. The interpreter cannot run inline assembly."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
