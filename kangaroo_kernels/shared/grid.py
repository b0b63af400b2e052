"""A barrier across the grid of a persistent kernel, whose programs are all resident at once (a cooperative launch).

A counter on the device goes up by one a program and round. A program has arrived when everything that its threads wrote
is visible (a release, behind a barrier of the program), and goes on when the counter says that all have (an acquire).
Who waits in vain, since a program was lost, says so in the counter and in an error word, and leaves; so do all others.
"""

import triton
import triton.language as tl

BROKEN = tl.constexpr(1 << 30)
"""A counter from here on is that of a grid that has lost a program."""

COUNTER, LEFT, ERROR = tl.constexpr(0), tl.constexpr(32), tl.constexpr(64)
"""Words of the grid's state, each in a cache line of its own."""

STATE_WORDS = 96
"""Of the grid's state, int32, all 0 before the first launch."""


@triton.jit
def is_whole(state_ptr):
    """Whether no program of this launch or of one before was lost; the same for all threads."""
    return tl.atomic_add(state_ptr + COUNTER, 0, sem="relaxed") < BROKEN


@triton.jit
def arrive(state_ptr):
    """What this program wrote is for all to see, and it is done with what it read."""
    tl.debug_barrier()  # every thread's writes are behind it: the release below is one thread's
    tl.atomic_add(state_ptr + COUNTER, 1, sem="release")


@triton.jit
def wait(state_ptr, arrivals, polls, cause):
    """Whether the counter reached ``arrivals`` and the grid is whole; after ``polls`` looks it is not, for ``cause``.

    An atomic is one thread's, and its result is handed to the others: they all decide alike.
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
def prefetch(ptrs):
    """Have what ``ptrs`` point at brought to the L2; nothing waits for it. Inline assembly: not for the interpreter."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
